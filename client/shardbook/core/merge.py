"""The ranks of a save side by side: who has which structure, and what their tables declare together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardbook.core import limits
from shardbook.core.checkpoint import RankFiles
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.dtype import dtype_name
from shardbook.core.structure import FileName, RankStructure
from shardbook.core.table import EntryKind, KeyPath, KeyPaths, TensorTable, UInt8Array
from shardbook.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class World:
    """The structures of a save in the order of the lowest rank that has each, and who has which.

    Equal structures hold equal chunks, so those of all ranks but the lowest are duplicates: nothing is lost by
    looking at each structure once.

    Attributes:
        structures: Distinct structures that some rank has.
        tables: Their distinct tables, by first appearance. Tables are told apart as objects: decoders share one, and
            equal ones that are not shared only cost time.
        table_of: (S,) the table of each structure.
        lowest: (S,) lowest rank that has each; climbs.
        index: (R,) the structure of each rank.
    """

    structures: tuple[RankStructure, ...]
    tables: tuple[TensorTable, ...]
    table_of: Int64Array
    lowest: Int64Array
    index: Int64Array

    @classmethod
    def of(cls, structures: Sequence[RankStructure], rank_index: Int64Array) -> World:
        """Returns the world in which rank r has ``structures[rank_index[r]]``.

        Raises:
            InvalidArgumentError: There are no ranks or too many, or a rank has no structure.
        """
        first, index = ranked(rank_index, len(structures))
        present = tuple(structures[at] for at in rank_index[first].tolist())
        tables, table_of = distinct_tables([structure.plan.table for structure in present])
        return cls(present, tables, table_of, first, index)

    def ranks_with(self, structures: Int64Array) -> Int64Array:
        """Returns the ranks, ascending, that have one of ``structures``."""
        return np.flatnonzero(np.isin(self.index, structures)).astype(np.int64)

    def rank_files(self) -> RankFiles:
        """Returns the names of the files of every rank."""
        distinct: dict[tuple[FileName, ...], int] = {}
        of_structure = [distinct.setdefault(structure.files, len(distinct)) for structure in self.structures]
        return RankFiles(tuple(distinct), np.array(of_structure, dtype=np.int64)[self.index])


def ranked(rank_index: Int64Array, choices: int) -> tuple[Int64Array, Int64Array]:
    """Numbers anew, by lowest rank, what ``rank_index`` (R,) says each rank has of so many choices.

    Returns:
        (S,) the lowest rank that has each of those in use, climbing, and (R,) which of them each rank has.

    Raises:
        InvalidArgumentError: There are no ranks or too many, or a rank names none of the choices.
    """
    if not 0 < len(rank_index) <= limits.MAX_WORLD_SIZE:
        raise InvalidArgumentError(
            f"{len(rank_index)} ranks, expected 1 to {limits.MAX_WORLD_SIZE}", field="rank_index"
        )
    if int(rank_index.min()) < 0 or int(rank_index.max()) >= choices:
        raise InvalidArgumentError("a rank names what is not there", field="rank_index")
    _, first, inverse = np.unique(rank_index, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return first[order].astype(np.int64), number[inverse].astype(np.int64)


@dataclass(frozen=True, eq=False)
class Declared:
    """The entries of several tables, one row each, and the entries of the checkpoint they make.

    Attributes:
        fqns: (T,) names, by first appearance.
        entry: (S,) the entry each row declares.
        first_row: (T,) first row that declares each entry.
        bases: (tables + 1,) first row of each table.
        kinds: (S,) EntryKind.
        dtypes: (S,) codes.
        layouts: (S,) codes.
        memory_formats: (S,) codes.
        ndims: (S,) dimensions.
        shapes: (S, D) elements, padded to the largest D of the tables.
    """

    fqns: tuple[str, ...]
    entry: Int64Array
    first_row: Int64Array
    bases: Int64Array
    kinds: UInt8Array
    dtypes: UInt8Array
    layouts: UInt8Array
    memory_formats: UInt8Array
    ndims: Int64Array
    shapes: Int64Array

    def count(self, row: Int64Array) -> Int64Array:
        """Returns (T,) the items of each entry, of items that have the rows ``row`` (N,)."""
        counts = np.zeros(len(self.fqns), dtype=np.int64)
        np.add.at(counts, self.entry, np.bincount(row, minlength=len(self.entry)))
        return counts

    def within(self, row: Int64Array, first: int, end: int) -> Int64Array:
        """Returns the numbers of those items, climbing, whose entries are from ``first`` up to ``end``."""
        of_row = (self.entry >= first) & (self.entry < end)
        return np.arange(len(row)) if of_row.all() else np.flatnonzero(of_row[row])

    def differs(self, row: Int64Array, other: Int64Array) -> BoolArray:
        """Returns whether each of ``row`` and ``other`` declare unlike tensors: kind, dtype or shape."""
        unlike: BoolArray = (
            (self.kinds[row] != self.kinds[other])
            | (self.dtypes[row] != self.dtypes[other])
            | (self.ndims[row] != self.ndims[other])
            | (self.shapes[row] != self.shapes[other]).any(axis=1)
        )
        return unlike

    def describe(self, row: int) -> str:
        """Returns what ``row`` declares, for a message."""
        kind = EntryKind(int(self.kinds[row]))
        if kind is EntryKind.BYTES:
            return "bytes"
        shape = self.shapes[row, : int(self.ndims[row])].tolist()
        form = "a whole" if kind is EntryKind.TENSOR else "shards of a"
        return f"{form} {dtype_name(int(self.dtypes[row]))} tensor {shape}"


def declare(tables: Sequence[TensorTable]) -> Declared:
    """Returns what ``tables``, in the order of the lowest rank that has each, declare together."""
    numbers: dict[str, int] = {}
    entry = [numbers.setdefault(fqn, len(numbers)) for table in tables for fqn in table.fqns]
    bases = np.cumsum([0, *(table.entry_count for table in tables)], dtype=np.int64)
    shapes = np.ones((len(entry), max(table.shapes.shape[1] for table in tables)), dtype=np.int64)
    for table, base in zip(tables, bases.tolist(), strict=False):
        shapes[base : base + table.entry_count, : table.shapes.shape[1]] = table.shapes
    entries = np.array(entry, dtype=np.int64)
    return Declared(
        fqns=tuple(numbers),
        entry=entries,
        first_row=np.unique(entries, return_index=True)[1].astype(np.int64),
        bases=bases,
        kinds=np.concatenate([table.kinds for table in tables]),
        dtypes=np.concatenate([table.dtypes for table in tables]),
        layouts=np.concatenate([table.layouts for table in tables]),
        memory_formats=np.concatenate([table.memory_formats for table in tables]),
        ndims=np.concatenate([table.ndims for table in tables]),
        shapes=shapes,
    )


def distinct_tables(tables: Sequence[TensorTable]) -> tuple[tuple[TensorTable, ...], Int64Array]:
    """Returns the distinct objects among ``tables``, by first appearance, and which of them each is."""
    numbers: dict[int, int] = {}
    index = [numbers.setdefault(id(table), len(numbers)) for table in tables]
    by_id = {id(table): table for table in tables}
    return tuple(by_id[key] for key in numbers), np.array(index, dtype=np.int64)


def merge_key_paths(world: World) -> KeyPaths | None:
    """Returns ``dict(ChainMap(*planner_data))`` over the ranks in order, as DCP merges them; None when none has any.

    A value is that of the lowest rank, and keys come in the order of the highest rank's mapping first. Ranks without
    key paths (planners that do not flatten) add nothing.
    """
    tables = world.tables
    with_paths = [at for at, table in enumerate(tables) if table.key_paths is not None]
    if not with_paths:
        return None
    lowest: dict[int, int] = {}
    highest: dict[int, int] = {}
    for rank, at in enumerate(world.table_of[world.index].tolist()):
        lowest.setdefault(at, rank)
        highest[at] = rank
    keys: dict[str, None] = {}
    for at in sorted(with_paths, key=lambda at: -highest[at]):
        keys.update(dict.fromkeys(key for key, _ in tables[at].key_paths or ()))
    values: dict[str, KeyPath] = {}
    for at in sorted(with_paths, key=lambda at: -lowest[at]):
        values.update(tables[at].key_paths or ())
    return tuple((key, values[key]) for key in keys)
