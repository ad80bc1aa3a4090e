"""The items that ranks kept, of all structures as columns: what they are, and where in their files they lie.

Everything is concatenated first and computed once over all structures: a call per structure and column would cost
more than the work itself where ranks are many and their shares small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.merge import Declared, World, declare
from shardbook.core.ragged import firsts_of, group_count, within_group
from shardbook.core.structure import RankStructure
from shardbook.core.table import EntryKind


@dataclass(frozen=True, eq=False)
class Chunks:
    """A selection of the items that ranks kept, entry by entry.

    Items are numbered structure by structure, inside one in plan order: numbers climb by (rank, plan order).

    Attributes:
        world: The structures.
        declared: What their tables declare.
        row: (all items,) declared row of each item, selected or not.
        item_firsts: (S + 1,) first item of each structure.
        counts: (T,) items selected of each entry.
        order: (N,) the items selected: entry by entry, inside one climbing.
    """

    world: World
    declared: Declared
    row: Int64Array
    item_firsts: Int64Array
    counts: Int64Array
    order: Int64Array

    @classmethod
    def of(cls, world: World) -> Chunks:
        """Returns all items that the ranks of ``world`` kept."""
        declared = declare(world.tables)
        counts = np.array([structure.item_count for structure in world.structures], dtype=np.int64)
        row = np.concatenate([_kept(structure, structure.plan.entry) for structure in world.structures])
        row += np.repeat(declared.bases[world.table_of], counts)
        entry = declared.entry[row]
        entry_counts = np.bincount(entry, minlength=len(declared.fqns)).astype(np.int64)
        return cls(world, declared, row, firsts_of(counts), entry_counts, _stable_order(entry, len(entry_counts)))

    @cached_property
    def firsts(self) -> Int64Array:
        """(T + 1,) where each entry begins in ``order``, and N."""
        return firsts_of(self.counts)

    @cached_property
    def winner_row(self) -> Int64Array:
        """(T,) the declared row whose word counts: that of an entry's first item, else the lowest rank's."""
        winner_row = self.declared.first_row.copy()
        held = self.counts > 0
        winner_row[held] = self.row[self.order[self.firsts[:-1][held]]]
        return winner_row

    @property
    def shapes(self) -> Int64Array:
        """(T, D) elements of each entry."""
        shapes: Int64Array = self.declared.shapes[self.winner_row]
        return shapes

    def only(self, keep: BoolArray) -> Chunks:
        """Returns the items for which ``keep`` (N,) is set."""
        counts = group_count(keep, self.counts)
        return Chunks(self.world, self.declared, self.row, self.item_firsts, counts, self.order[keep])

    def items_of(self, entry: int) -> Int64Array:
        """Returns the items of ``entry``."""
        return self.order[int(self.firsts[entry]) : int(self.firsts[entry + 1])]

    def structures_of(self, items: Int64Array) -> Int64Array:
        """Returns the structure of each item."""
        return (np.searchsorted(self.item_firsts, items, side="right") - 1).astype(np.int64)

    def owners_of(self, items: Int64Array) -> Int64Array:
        """Returns the rank of each item: the lowest that has its structure."""
        owners: Int64Array = self.world.lowest[self.structures_of(items)]
        return owners

    def boxes(self) -> tuple[Int64Array, Int64Array]:
        """Returns the (offsets, sizes) of the items selected, each (N, D), padded."""
        shape = len(self.row), self.declared.shapes.shape[1]
        offsets = np.zeros(shape, dtype=np.int64)
        sizes = np.ones(shape, dtype=np.int64)
        for at, structure in enumerate(self.world.structures):
            first, end, width = int(self.item_firsts[at]), int(self.item_firsts[at + 1]), structure.plan.sizes.shape[1]
            offsets[first:end, :width] = _kept(structure, structure.plan.offsets)
            sizes[first:end, :width] = _kept(structure, structure.plan.sizes)
        return offsets.take(self.order, axis=0), sizes.take(self.order, axis=0)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where chunks lie: the columns of ``CheckpointStructure`` of the same names."""

    owner: Int64Array
    position: Int64Array
    file: Int64Array
    base: Int64Array
    var_lo: Int64Array
    var_hi: Int64Array
    length: Int64Array


def place(chunks: Chunks) -> Placement:
    """Returns where each item selected lies in its owner's files."""
    structures = chunks.world.structures
    counts = np.diff(chunks.item_firsts)
    # The item at each file position, structure by structure; and the other way round for the items selected.
    item = np.concatenate([structure.order for structure in structures])
    item += np.repeat(chunks.item_firsts[:-1], counts)
    at = np.empty_like(item)
    at[item] = np.arange(len(item))
    at = at[chunks.order]

    file_items = np.concatenate([structure.file_items for structure in structures])
    file_firsts = firsts_of(file_items)[:-1]
    file_number = within_group(np.array([len(structure.files) for structure in structures], dtype=np.int64))
    length = np.concatenate([structure.lengths for structure in structures])[item]
    # Modulo 2**64: only differences inside a file are used, and RankStructure holds those below 2**62.
    start = np.cumsum(length) - length
    var_lo, var_hi = np.zeros_like(at), np.zeros_like(at)
    variable = chunks.declared.kinds[chunks.row] == EntryKind.BYTES
    if variable.any():
        before = firsts_of(variable[item].astype(np.int64))
        before_structure = np.repeat(before[chunks.item_firsts[:-1]], counts)[at]
        var_lo = np.repeat(before[file_firsts], file_items)[at] - before_structure
        var_hi = before[at] - before_structure
    return Placement(
        owner=np.repeat(chunks.world.lowest, counts)[at],
        position=at - np.repeat(chunks.item_firsts[:-1], counts)[at],
        file=np.repeat(file_number, file_items)[at],
        base=(start - np.repeat(start[file_firsts], file_items))[at],
        var_lo=var_lo,
        var_hi=var_hi,
        length=length[at],
    )


def _kept(structure: RankStructure, column: Int64Array) -> Int64Array:
    if structure.item_count == structure.plan.item_count:
        return column
    kept: Int64Array = column[structure.kept]
    return kept


def _stable_order(values: Int64Array, limit: int) -> Int64Array:
    """Returns the stable order of ``values`` (N,), which are below ``limit``; numpy sorts 16 bits fastest by far."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, limit.bit_length(), 16):
        digit = (values[order] >> shift & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order.astype(np.int64, copy=False)
