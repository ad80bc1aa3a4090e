"""The items that ranks kept, of all structures as columns: what they are, and where in their files they lie.

What a structure is asked for is computed once over all structures where it can be; boxes and lengths, the bulk of
them, are copied for the entries that are looked at only, so that memory is for a part of a large checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.merge import Declared, World, declare
from shardbook.core.ragged import firsts_of, group_count, runs_of
from shardbook.core.structure import RankStructure
from shardbook.core.table import EntryKind


@dataclass(frozen=True, eq=False)
class Kept:
    """All items that ranks kept.

    Items are numbered structure by structure, inside one in plan order: numbers climb by (rank, plan order).

    Attributes:
        world: The structures.
        declared: What their tables declare.
        row: (N,) declared row of each item.
        item_firsts: (S + 1,) first item of each structure.
        counts: (T,) items of each entry.
    """

    world: World
    declared: Declared
    row: Int64Array
    item_firsts: Int64Array
    counts: Int64Array

    @classmethod
    def of(cls, world: World) -> Kept:
        """Returns the items of ``world``."""
        declared = declare(world.tables)
        firsts = firsts_of(np.array([structure.item_count for structure in world.structures], dtype=np.int64))
        row = np.empty(int(firsts[-1]), dtype=np.int64)
        bases = declared.bases[world.table_of].tolist()
        for structure, base, first, end in zip(
            world.structures, bases, firsts.tolist(), firsts[1:].tolist(), strict=False
        ):
            np.add(structure.plan.entry[_kept(structure, slice(None))], base, out=row[first:end])
        return cls(world, declared, row, firsts, declared.count(row))

    def part(self, first: int, end: int) -> Chunks:
        """Returns the items of the entries from ``first`` up to ``end``."""
        items = self.declared.within(self.row, first, end)
        counts = np.zeros_like(self.counts)
        counts[first:end] = self.counts[first:end]
        order = _stable_order(self.declared.entry[self.row[items]] - first, end - first)
        return Chunks(self, counts, items, order)

    @cached_property
    def files(self) -> Files:
        """Where items lie in their files."""
        return Files.of(self)


@dataclass(frozen=True, eq=False)
class Chunks:
    """A selection of the items that ranks kept, entry by entry.

    Attributes:
        kept: All of them.
        counts: (T,) items selected of each entry.
        items: (M,) numbers of at least the items selected, climbing.
        picked: (N,) which of ``items`` are selected: entry by entry, inside one climbing.
    """

    kept: Kept
    counts: Int64Array
    items: Int64Array
    picked: Int64Array

    @property
    def world(self) -> World:
        """The structures."""
        return self.kept.world

    @property
    def declared(self) -> Declared:
        """What their tables declare."""
        return self.kept.declared

    @cached_property
    def order(self) -> Int64Array:
        """(N,) the items selected."""
        return self.items[self.picked]

    @cached_property
    def row(self) -> Int64Array:
        """(N,) declared row of each item selected."""
        return self.kept.row[self.order]

    @cached_property
    def firsts(self) -> Int64Array:
        """(T + 1,) where each entry begins in ``order``, and N."""
        return firsts_of(self.counts)

    @cached_property
    def winner_row(self) -> Int64Array:
        """(T,) the declared row whose word counts: that of an entry's first item, else the lowest rank's."""
        winner_row = self.declared.first_row.copy()
        held = self.counts > 0
        winner_row[held] = self.row[self.firsts[:-1][held]]
        return winner_row

    @property
    def shapes(self) -> Int64Array:
        """(T, D) elements of each entry."""
        shapes: Int64Array = self.declared.shapes[self.winner_row]
        return shapes

    def only(self, keep: BoolArray) -> Chunks:
        """Returns the items for which ``keep`` (N,) is set."""
        return Chunks(self.kept, group_count(keep, self.counts), self.items, self.picked[keep])

    def items_of(self, entry: int) -> Int64Array:
        """Returns the items of ``entry``."""
        return self.order[int(self.firsts[entry]) : int(self.firsts[entry + 1])]

    def structures_of(self, items: Int64Array) -> Int64Array:
        """Returns the structure of each item."""
        return (np.searchsorted(self.kept.item_firsts, items, side="right") - 1).astype(np.int64)

    def owners_of(self, items: Int64Array) -> Int64Array:
        """Returns the rank of each item: the lowest that has its structure."""
        owners: Int64Array = self.world.lowest[self.structures_of(items)]
        return owners

    def boxes(self) -> tuple[Int64Array, Int64Array]:
        """Returns the (offsets, sizes) of the items selected, each (N, D), padded."""
        shape = len(self.items), self.declared.shapes.shape[1]
        offsets = np.zeros(shape, dtype=np.int64)
        sizes = np.ones(shape, dtype=np.int64)
        for at, where, rows in runs_of(self.items, self.kept.item_firsts):
            plan = self.world.structures[at].plan
            width = plan.sizes.shape[1]
            own = _kept(self.world.structures[at], rows)
            offsets[where, :width] = plan.offsets[own]
            sizes[where, :width] = plan.sizes[own]
        return offsets.take(self.picked, axis=0), sizes.take(self.picked, axis=0)


@dataclass(frozen=True, eq=False)
class Files:
    """Where all items that ranks kept lie in their files.

    Positions run through all files of a structure in turn, and through all structures: a structure's first position
    has the number of its first item. Bytes are counted within a structure, without items of variable length.

    Attributes:
        position: (N,) position of each item.
        start: (N,) bytes before it.
        file_firsts: (S + 1,) number of each structure's first file, among the files of all.
        begins: (F,) position at which each file begins; climbs.
        starts: (F,) bytes before that.
        variable: (V,) positions of items of variable length; climb.
    """

    position: Int64Array
    start: Int64Array
    file_firsts: Int64Array
    begins: Int64Array
    starts: Int64Array
    variable: Int64Array

    @classmethod
    def of(cls, kept: Kept) -> Files:
        """Returns the places of all items."""
        structures, bounds = kept.world.structures, kept.item_firsts.tolist()
        position, start = np.empty_like(kept.row), np.empty_like(kept.row)
        begins: list[Int64Array] = []
        starts: list[Int64Array] = []
        for structure, first, end in zip(structures, bounds, bounds[1:], strict=False):
            # RankStructure holds the sum below 2**62.
            before = firsts_of(structure.lengths[structure.order])
            position[first:end][structure.order] = np.arange(first, end)
            start[first:end][structure.order] = before[:-1]
            file_begins = firsts_of(structure.file_items)[:-1]
            begins.append(file_begins + first)
            starts.append(before[file_begins])
        return cls(
            position=position,
            start=start,
            file_firsts=firsts_of(np.array([len(structure.files) for structure in structures], dtype=np.int64)),
            begins=np.concatenate(begins),
            starts=np.concatenate(starts),
            variable=np.sort(position[(kept.declared.kinds == EntryKind.BYTES)[kept.row]]),
        )

    def at(self, structure: Int64Array, position: Int64Array) -> Int64Array:
        """Returns (N,) the number of the file in which each position (N,) of a structure (N,) is."""
        if (np.diff(self.file_firsts) <= 1).all():
            return self.file_firsts[structure]
        return (np.searchsorted(self.begins, position, side="right") - 1).astype(np.int64)


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
    kept, files, items = chunks.kept, chunks.kept.files, chunks.items
    length = np.empty_like(items)
    for at, where, rows in runs_of(items, kept.item_firsts):
        length[where] = kept.world.structures[at].lengths[rows]
    structure_counts = np.diff(np.searchsorted(items, kept.item_firsts))
    structure = np.repeat(np.arange(len(structure_counts)), structure_counts)[chunks.picked]
    position = files.position[chunks.order]
    file = files.at(structure, position)
    first = kept.item_firsts[structure]
    var_lo, var_hi = np.zeros_like(position), np.zeros_like(position)
    if len(files.variable):
        before = np.searchsorted(files.variable, first)
        var_lo = np.searchsorted(files.variable, files.begins[file]) - before
        var_hi = np.searchsorted(files.variable, position) - before
    return Placement(
        owner=kept.world.lowest[structure],
        position=position - first,
        file=file - files.file_firsts[structure],
        base=files.start[chunks.order] - files.starts[file],
        var_lo=var_lo,
        var_hi=var_hi,
        length=length[chunks.picked],
    )


def _kept(structure: RankStructure, rows: slice | Int64Array) -> slice | Int64Array:
    """Returns the plan's items that ``rows`` of the kept ones are."""
    return rows if structure.item_count == structure.plan.item_count else structure.kept[rows]


def _stable_order(values: Int64Array, limit: int) -> Int64Array:
    """Returns the stable order of ``values`` (N,), which are below ``limit``; numpy sorts 16 bits fastest by far."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, limit.bit_length(), 16):
        digit = (values[order] >> shift & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order.astype(np.int64, copy=False)
