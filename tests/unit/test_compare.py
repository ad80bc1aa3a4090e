"""Entries of two checkpoints are held against each other as columns."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.compare import Geometry, differences

#: An entry: (is a tensor, dtype code, shape, boxes as (offsets, sizes)).
Box = tuple[tuple[int, ...], tuple[int, ...]]
Entry = tuple[bool, int, tuple[int, ...], tuple[Box, ...]]


def geometry(entries: list[Entry]) -> Geometry:
    """Returns entries as columns, padded to their largest dimension."""
    width = max([1, *(len(shape) for _, _, shape, _ in entries)])
    counts = np.array([len(boxes) for *_, boxes in entries], np.int64)
    shapes = np.ones((len(entries), width), np.int64)
    offsets = np.zeros((int(counts.sum()), width), np.int64)
    sizes = np.ones_like(offsets)
    at = 0
    for row, (_, _, shape, boxes) in enumerate(entries):
        shapes[row, : len(shape)] = shape
        for offset, size in boxes:
            offsets[at, : len(shape)], sizes[at, : len(shape)] = offset, size
            at += 1
    return Geometry(
        fqns=tuple(map(str, range(len(entries)))),
        is_tensor=np.array([is_tensor for is_tensor, *_ in entries], np.bool_),
        dtypes=np.array([dtype for _, dtype, *_ in entries], np.uint8),
        ndims=np.array([len(shape) for _, _, shape, _ in entries], np.int64),
        shapes=shapes,
        chunk_counts=counts,
        offsets=offsets,
        sizes=sizes,
    )


@st.composite
def an_entry(draw: st.DrawFn) -> Entry:
    """A bytes entry, or a tensor of few sizes, so that pairs often agree in all but one thing."""
    if draw(st.integers(0, 5)) == 0:
        return False, 0, (), (((), ()),)
    ndim = draw(st.integers(0, 2))
    cell = st.tuples(*[st.integers(1, 2)] * ndim)
    corner = st.tuples(*[st.integers(0, 2)] * ndim)
    boxes = draw(st.lists(st.tuples(corner, cell), max_size=3, unique=True))
    return True, draw(st.integers(1, 2)), draw(cell), tuple(boxes)


@st.composite
def a_pair(draw: st.DrawFn) -> tuple[Entry, Entry]:
    """An entry beside itself with its boxes in another order, or beside any other."""
    one = draw(an_entry())
    is_tensor, dtype, shape, boxes = one
    if draw(st.booleans()):
        return one, (is_tensor, dtype, shape, tuple(draw(st.permutations(boxes))))
    return one, draw(an_entry())


@given(st.lists(a_pair(), max_size=6), st.randoms(use_true_random=False))
def test_differences_are_what_a_look_at_each_pair_finds(pairs: list[tuple[Entry, Entry]], random: object) -> None:
    """Rule: dtype, shape, and the set of boxes; neither the order of entries nor that of boxes counts."""
    order = list(range(len(pairs)))
    random.shuffle(order)  # type: ignore[attr-defined]
    others: list[Entry] = [pairs[at][1] for at in order]
    partner = np.array([order.index(at) for at in range(len(pairs))], np.int64)
    ones = np.arange(len(pairs), dtype=np.int64)
    found = differences(geometry([one for one, _ in pairs]), geometry(others), ones, partner)
    for at, (one, other) in enumerate(pairs):
        both = one[0] and other[0]
        expected = (
            one[0] != other[0],
            both and one[1] != other[1],
            both and one[2] != other[2],
            both and one[2] == other[2] and sorted(one[3]) != sorted(other[3]),
        )
        assert expected == (found.kind[at], found.dtype[at], found.shape[at], found.sharding[at])
        assert any(expected) == found.any[at]


def test_a_box_that_another_pair_has_is_no_excuse() -> None:
    """Two tensors that swapped their boxes both differ, though all boxes together are the same."""
    left: Box = ((0,), (1,))
    right: Box = ((1,), (1,))
    one = geometry([(True, 1, (2,), (left,)), (True, 1, (2,), (right,))])
    other = geometry([(True, 1, (2,), (right,)), (True, 1, (2,), (left,))])
    rows = np.arange(2, dtype=np.int64)
    assert [True, True] == differences(one, other, rows, rows).sharding.tolist()
