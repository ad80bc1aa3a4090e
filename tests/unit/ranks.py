"""Ranks' plans and structures in few words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardbook.core.assembly import assemble
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.dtype import ITEMSIZES, dtype_code, layout_code
from shardbook.core.structure import FileName, RankPlan, RankStructure
from shardbook.core.table import EntryKind, KeyPaths, TensorTable


@dataclass(frozen=True)
class Item:
    """One write item of a rank, unpadded; ``offsets`` None declares the entry and writes nothing."""

    kind: EntryKind
    fqn: str
    shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] | None = ()
    sizes: tuple[int, ...] = ()
    dtype: str = "float32"
    layout: str = "strided"


def shard(
    fqn: str,
    shape: tuple[int, ...],
    offsets: tuple[int, ...] | None,
    sizes: tuple[int, ...] = (),
    dtype: str = "float32",
    layout: str = "strided",
) -> Item:
    """Returns a box of a sharded tensor."""
    return Item(EntryKind.SHARD, fqn, shape, offsets, sizes, dtype, layout)


def whole(fqn: str, shape: tuple[int, ...] = (), dtype: str = "float32") -> Item:
    """Returns a plain tensor."""
    return Item(EntryKind.TENSOR, fqn, shape, (0,) * len(shape), shape, dtype)


def raw(fqn: str) -> Item:
    """Returns a bytes entry."""
    return Item(EntryKind.BYTES, fqn)


def declared(item: Item) -> Item:
    """Returns the entry of ``item`` without anything to write."""
    return Item(item.kind, item.fqn, item.shape, None, (), item.dtype, item.layout)


def table_of(items: Sequence[Item], key_paths: KeyPaths | None = None) -> TensorTable:
    """Returns the table of a rank: entries by first appearance, as the first item of each declares it."""
    entries: dict[str, Item] = {}
    for item in items:
        entries.setdefault(item.fqn, item)
    specs = list(entries.values())
    width = max([1, *(len(spec.shape) for spec in specs)])
    is_bytes = np.array([spec.kind is EntryKind.BYTES for spec in specs], dtype=np.bool_)
    return TensorTable(
        fqns=tuple(entries),
        kinds=np.array([spec.kind for spec in specs], dtype=np.uint8),
        dtypes=np.where(is_bytes, 0, [dtype_code(spec.dtype) for spec in specs]).astype(np.uint8),
        layouts=np.where(is_bytes, 0, [layout_code(spec.layout) for spec in specs]).astype(np.uint8),
        memory_formats=np.zeros(len(specs), dtype=np.uint8),
        ndims=np.array([len(spec.shape) for spec in specs], dtype=np.int64),
        shapes=_padded([spec.shape for spec in specs], width, 1),
        key_paths=key_paths,
    )


def plan_of(items: Sequence[Item], key_paths: KeyPaths | None = None, table: TensorTable | None = None) -> RankPlan:
    """Returns the plan of a rank with ``items``; its table is made of them unless given."""
    table = table or table_of(items, key_paths)
    number = {fqn: at for at, fqn in enumerate(table.fqns)}
    written = [item for item in items if item.offsets is not None]
    width = table.shapes.shape[1]
    return RankPlan(
        table,
        np.array([number[item.fqn] for item in written], dtype=np.int64),
        _padded([item.offsets or () for item in written], width, 0),
        _padded([item.sizes for item in written], width, 1),
    )


def structure_of(plan: RankPlan, kept: Sequence[int] | None = None) -> RankStructure:
    """Returns what a rank wrote that kept ``kept`` of its plan's items, all in one file in plan order."""
    items = np.arange(plan.item_count) if kept is None else np.array(kept, dtype=np.int64)
    lengths = plan.sizes[items].prod(axis=1) * ITEMSIZES[plan.table.dtypes[plan.entry[items]]] + 100
    return RankStructure(
        plan,
        items,
        (FileName(True, "0.distcp"),) * (len(items) > 0),
        np.array([len(items)][: len(items)], dtype=np.int64),
        np.arange(len(items)),
        np.where(plan.variable[items], 0, lengths),
    )


def assembled(*ranks: Sequence[Item], at_once: int = 1 << 20) -> CheckpointStructure:
    """Returns the checkpoint of ranks that wrote all of their items."""
    return assemble([structure_of(plan_of(items)) for items in ranks], np.arange(len(ranks)), at_once=at_once)


def chunks_of(checkpoint: CheckpointStructure, fqn: str) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Returns (rank, offsets, sizes) of the chunks of an entry, in order."""
    at = checkpoint.fqns.index(fqn)
    first, end, ndim = int(checkpoint.firsts[at]), int(checkpoint.firsts[at + 1]), int(checkpoint.ndims[at])
    return [
        (
            int(checkpoint.owner[row]),
            tuple(checkpoint.offsets[row, :ndim].tolist()),
            tuple(checkpoint.sizes[row, :ndim].tolist()),
        )
        for row in range(first, end)
    ]


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    out = np.full((len(rows), width), fill, dtype=np.int64)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out
