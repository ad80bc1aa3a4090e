"""Hypothesis strategies for the columnar types: tables, plans, structures and extents that are valid but odd."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from shardbook.core.dtype import DTYPE_COUNT, ITEMSIZES, LAYOUT_COUNT, MEMORY_FORMAT_COUNT
from shardbook.core.extents import Extents
from shardbook.core.structure import FileName, RankPlan, RankStructure
from shardbook.core.table import EntryKind, KeyPaths, TensorTable

#: Every fqn that DCP accepts, the ugly ones too: NUL, lone surrogates, empty.
fqns = st.text(st.characters() | st.sampled_from("\0\ud800\udfff./"), max_size=12)
int64 = st.integers(-(2**63), 2**63 - 1)
sizes = st.one_of(st.integers(0, 12), st.sampled_from([2**31, 2**40, 2**61]))


@st.composite
def key_paths(draw: st.DrawFn) -> KeyPaths | None:
    """planner_data: None, or unique keys with paths of str and int."""
    if draw(st.booleans()):
        return None
    keys = draw(st.lists(fqns, max_size=4, unique=True))
    segment = st.one_of(fqns, int64)
    return tuple((key, tuple(draw(st.lists(segment, max_size=3)))) for key in keys)


@st.composite
def tables(draw: st.DrawFn, max_entries: int = 5, max_ndim: int = 4) -> TensorTable:
    """Tables of tensors, shards and bytes entries in any mix, at most one dimension of which is huge."""
    names = tuple(draw(st.lists(fqns, max_size=max_entries, unique=True)))
    count = len(names)
    kinds = [draw(st.sampled_from(EntryKind)) for _ in names]
    ndims = [0 if kind is EntryKind.BYTES else draw(st.integers(0, max_ndim)) for kind in kinds]
    width = max([1, *ndims])
    shapes = np.ones((count, width), dtype=np.int64)
    for row, ndim in enumerate(ndims):
        shape = draw(st.lists(st.integers(0, 9), min_size=ndim, max_size=ndim))
        if ndim and draw(st.booleans()):
            shape = [draw(sizes), *([1] * (ndim - 1))]
        shapes[row, :ndim] = shape

    def codes(limit: int, low: int) -> np.ndarray:
        drawn = [0 if kind is EntryKind.BYTES else draw(st.integers(low, limit - 1)) for kind in kinds]
        return np.array(drawn, dtype=np.uint8)

    return TensorTable(
        names,
        np.array(kinds, dtype=np.uint8),
        codes(DTYPE_COUNT, 1),
        codes(LAYOUT_COUNT, 0),
        codes(MEMORY_FORMAT_COUNT, 0),
        np.array(ndims, dtype=np.int64),
        shapes,
        draw(st.one_of(key_paths(), st.just(tuple((name, ("x", name)) for name in names)))),
    )


@st.composite
def plans(draw: st.DrawFn) -> RankPlan:
    """Plans with any boxes, also ones that leave their tensor: those are refused at assembly, not by the codec."""
    table = draw(tables())
    count = draw(st.integers(0, 6)) if table.entry_count else 0
    entry = np.array([draw(st.integers(0, table.entry_count - 1)) for _ in range(count)], dtype=np.int64)
    width = table.shapes.shape[1]
    offsets = np.zeros((count, width), dtype=np.int64)
    box_sizes = np.ones((count, width), dtype=np.int64)
    for row in range(count):
        for dim in range(int(table.ndims[entry[row]])):
            box_sizes[row, dim] = draw(st.one_of(st.integers(0, 12), sizes))
            offsets[row, dim] = draw(st.one_of(st.integers(0, 12), st.sampled_from([0, 2**40, 2**61])))
    return RankPlan(table, entry, offsets, box_sizes)


@st.composite
def structures(draw: st.DrawFn) -> RankStructure:
    """Structures that keep some items of a plan, in files of any number and order."""
    plan = draw(plans())
    keep = np.array(draw(st.lists(st.booleans(), min_size=plan.item_count, max_size=plan.item_count)), dtype=np.bool_)
    kept = np.flatnonzero(keep).astype(np.int64)
    count = len(kept)
    order = np.array(draw(st.permutations(range(count))), dtype=np.int64)
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=3))) if count > 1 else []
    ends = np.array([*cuts, count] if count else [], dtype=np.int64)
    bounds = ends - np.array([0, *cuts] if count else [], dtype=np.int64)
    files = tuple(FileName(draw(st.booleans()), f"{number}.distcp") for number in range(len(bounds)))
    transformed = draw(st.booleans())
    lengths = np.zeros(count, dtype=np.int64)
    if not transformed:
        fixed = ~plan.variable[kept]
        header = np.array(draw(st.lists(st.integers(0, 2000), min_size=count, max_size=count)), dtype=np.int64)
        itemsize = ITEMSIZES[plan.table.dtypes[plan.entry[kept]]]
        lengths[fixed] = (header + itemsize)[fixed]
    return RankStructure(plan, kept, files, bounds, order, lengths)


@st.composite
def extents_of(draw: st.DrawFn, item_count: int, variable_count: int) -> Extents:
    """Extents that fit a structure of so many items."""
    length = st.integers(0, 2**40)

    def column(values: st.SearchStrategy[int], count: int) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)), dtype=np.int64)

    explicit = draw(st.booleans())
    checksums = column(st.integers(-1, 2**32 - 1), item_count) if draw(st.booleans()) else np.zeros(0, np.int64)
    transforms = tuple(draw(st.lists(st.lists(fqns, max_size=2).map(tuple), max_size=2, unique=True)))
    return Extents(
        variable_lengths=column(length, 0 if explicit else variable_count),
        lengths=column(length, item_count) if explicit else None,
        starts=column(length, item_count) if explicit else None,
        transforms=transforms,
        transform_index=column(st.integers(0, len(transforms)), item_count) if transforms else None,
        hints=column(st.integers(0, 9), item_count) if draw(st.booleans()) else None,
        attributes=column(st.integers(0, 1), item_count) if draw(st.booleans()) else None,
        checksums=checksums if (checksums >= 0).any() else None,
    )
