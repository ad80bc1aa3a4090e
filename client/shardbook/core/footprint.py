"""What a checkpoint needs of its data files: which there must be, how long, and which extents get in each other's way.

Columns over chunks, and Python objects over files alone. No I/O: what is found on storage comes in as a column too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from shardbook.core import limits
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.extents import NO_CHECKSUM
from shardbook.core.locate import Located
from shardbook.errors import CorruptManifestError

#: Value of ``ranks`` for a file of which nobody knows who wrote it.
NO_RANK: Final = -1
#: Size that stands for a file that is not there.
NOT_THERE: Final = -1

#: How DCP's writers call their files: `__{rank}_{n}.distcp`.
_RANKED: Final = re.compile(r"(?:.*/)?__([0-9]{1,10})_[^/]+", re.DOTALL)


def rank_of_file(path: str) -> int | None:
    """Returns the rank that a file is of, by the name that DCP's writers give it; None when it has another."""
    match = _RANKED.fullmatch(path)
    return int(match[1]) if match is not None and int(match[1]) < limits.MAX_WORLD_SIZE else None


@dataclass(frozen=True, eq=False)
class Lost:
    """What files that are too short, or not there, take from a checkpoint of F files and N extents.

    Attributes:
        rows: (N,) True for extents that are not there as a whole.
        counts: (F,) how many of a file's extents.
        first: (F,) first byte that an extent has and the file has not; 0 where nothing is lost.
        lost_bytes: (F,) bytes of extents that are not there.
    """

    rows: BoolArray
    counts: Int64Array
    first: Int64Array
    lost_bytes: Int64Array


@dataclass(frozen=True, eq=False)
class Footprint:
    """Extents of a checkpoint by data file: N extents in F files.

    Attributes:
        paths: (F,) files, relative to the checkpoint's directory; distinct, and each has an extent.
        ranks: (F,) rank that wrote each; NO_RANK where nobody knows.
        file: (N,) which file.
        start: (N,) first byte in it.
        length: (N,) bytes.
        entry: (N,) index into ``fqns``.
        checksum: (N,) CRC32C of its bytes; NO_CHECKSUM where none was kept.
        fqns: Names of the checkpoint's entries.

    Raises:
        CorruptManifestError: An extent lies in no file, or outside of what a file can have.
    """

    paths: tuple[str, ...]
    ranks: Int64Array
    file: Int64Array
    start: Int64Array
    length: Int64Array
    entry: Int64Array
    checksum: Int64Array
    fqns: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.start) and (
            int(self.start.min()) < 0
            or int(self.length.min()) < 0
            or (self.start > limits.INT64_MAX - self.length).any()
        ):
            raise CorruptManifestError("an extent begins before its file, or ends beyond 2**63")
        if (np.bincount(self.file, minlength=self.file_count) == 0).any():
            raise CorruptManifestError("a file has no extent")

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        ranks: Sequence[int | None],
        number: Int64Array,
        start: Int64Array,
        length: Int64Array,
        entry: Int64Array,
        fqns: tuple[str, ...],
        checksum: Int64Array | None = None,
    ) -> Footprint:
        """Returns the footprint of extents in files that may be named more than once, or have no extent at all.

        Args:
            names: Files by number.
            ranks: Who wrote each; None where nobody knows.
            number: (N,) number of each extent's file.
            start: (N,) first byte.
            length: (N,) bytes.
            entry: (N,) index into ``fqns``.
            fqns: Names of entries.
            checksum: (N,) checksums; None when none was kept.
        """
        used = np.flatnonzero(np.bincount(number, minlength=len(names)) > 0).tolist()
        distinct: dict[str, int] = {}
        index = np.zeros(len(names), dtype=np.int64)
        writers: list[int] = []
        for at in used:
            file = index[at] = distinct.setdefault(names[at], len(distinct))
            if file == len(writers):
                rank = ranks[at]
                writers.append(NO_RANK if rank is None else rank)
        if checksum is None:
            checksum = np.full(len(number), NO_CHECKSUM, dtype=np.int64)
        writer = np.array(writers, dtype=np.int64)
        return cls(tuple(distinct), writer, index[number], start, length, entry, checksum, fqns)

    @classmethod
    def of_columns(
        cls, structure: CheckpointStructure, located: Located, prefix: str, *, has_ranks: bool = True
    ) -> Footprint:
        """Returns the footprint of a checkpoint.

        Args:
            structure: Entries and chunks.
            located: Where they lie.
            prefix: Directory of the data files, relative to the checkpoint's; empty when they lie in it.
            has_ranks: False for imports, in which slices stand where ranks would: names say who wrote a file.
        """
        files = structure.rank_files
        counts = np.array([len(one) for one in files.distinct], dtype=np.int64)[files.index]
        if len(structure.owner) and (
            int(structure.owner.min()) < 0
            or int(structure.owner.max()) >= len(counts)
            or (structure.file < 0).any()
            or (structure.file >= counts[structure.owner]).any()
        ):
            raise CorruptManifestError("a chunk lies in a file that its rank did not write")
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        number: Int64Array = first[structure.owner] + structure.file
        used = np.flatnonzero(np.bincount(number, minlength=int(first[-1])))
        owners = np.searchsorted(first, used, side="right") - 1
        pairs = zip(owners.tolist(), (used - first[owners]).tolist(), strict=True)
        head = f"{prefix}/" if prefix else ""
        names = [head + files.path(rank, file) for rank, file in pairs]
        ranks: list[int | None] = [*owners.tolist()] if has_ranks else list(map(rank_of_file, names))
        place = np.zeros(int(first[-1]), dtype=np.int64)
        place[used] = np.arange(len(used))
        entry = np.repeat(np.arange(structure.entry_count), structure.chunk_counts).astype(np.int64)
        start, length = located.start, located.length
        return cls.of(names, ranks, place[number], start, length, entry, structure.fqns, located.checksum)

    @property
    def file_count(self) -> int:
        """Number of files, F."""
        return len(self.paths)

    @property
    def extent_count(self) -> int:
        """Number of extents, N."""
        return len(self.file)

    @property
    def size_bytes(self) -> int:
        """Bytes that the extents cover."""
        return int(self.length.sum())

    @cached_property
    def end(self) -> Int64Array:
        """(N,) first byte behind each extent."""
        return self.start + self.length

    @cached_property
    def needed(self) -> Int64Array:
        """(F,) bytes that each file must have."""
        needed = np.zeros(self.file_count, dtype=np.int64)
        np.maximum.at(needed, self.file, self.end)
        return needed

    @cached_property
    def _order(self) -> Int64Array:
        """(N,) extents by file, then by where they begin."""
        return np.lexsort((self.start, self.file)).astype(np.int64, copy=False)

    @cached_property
    def _files_in_order(self) -> Int64Array:
        return self.file[self._order]

    def rows_of(self, file: int) -> Int64Array:
        """Returns the extents of a file, by where they begin."""
        low, high = np.searchsorted(self._files_in_order, [file, file + 1])
        return self._order[int(low) : int(high)]

    def of_ranks(self, ranks: Sequence[int]) -> Footprint:
        """Returns what some ranks wrote."""
        chosen = np.isin(self.ranks, np.array(ranks, dtype=np.int64))
        number = np.cumsum(chosen) - 1
        rows = chosen[self.file]
        return replace(
            self,
            paths=tuple(path for path, is_chosen in zip(self.paths, chosen.tolist(), strict=True) if is_chosen),
            ranks=self.ranks[chosen],
            file=number[self.file[rows]].astype(np.int64),
            start=self.start[rows],
            length=self.length[rows],
            entry=self.entry[rows],
            checksum=self.checksum[rows],
        )

    def lost(self, sizes: Int64Array) -> Lost:
        """Returns what is not there of files that have ``sizes`` (F,) bytes, NOT_THERE for one that is not there."""
        rows = self.end > sizes[self.file]
        file = self.file[rows]
        begin = np.maximum(self.start[rows], sizes[file])
        first = np.full(self.file_count, limits.INT64_MAX, dtype=np.int64)
        np.minimum.at(first, file, begin)
        lost_bytes = np.zeros(self.file_count, dtype=np.int64)
        np.add.at(lost_bytes, file, self.end[rows] - begin)
        counts = np.bincount(file, minlength=self.file_count).astype(np.int64)
        return Lost(rows, counts, np.where(counts > 0, first, 0), lost_bytes)

    def overlaps(self) -> tuple[Int64Array, Int64Array]:
        """Returns the extents that begin before one ends that begins no later in the same file, and that one of each.

        Of several such the one that ends last. Extents without bytes overlap nothing.
        """
        order = self._order[self.length[self._order] > 0]
        count = len(order)
        if count < 2:
            none = np.zeros(0, dtype=np.int64)
            return none, none
        by_end = np.argsort(self.end[order], kind="stable")
        place = np.empty(count, dtype=np.int64)
        place[by_end] = np.arange(count)
        file = self.file[order]
        # The place of an end among all ends instead of the end itself: so files are kept apart by an addition.
        furthest = np.maximum.accumulate(file * count + place)[:-1]
        holder = order[by_end[furthest % count]]
        later = order[1:]
        hit = (furthest // count == file[1:]) & (self.start[later] < self.end[holder])
        return later[hit], holder[hit]


__all__ = ["NOT_THERE", "NO_RANK", "Footprint", "Lost", "rank_of_file"]
