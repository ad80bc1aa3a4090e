"""``verify``: whether everything that a checkpoint's metadata names is still on storage, file by file. No torch.

Sizes come from listings, a directory at a time, and are held against all extents at once; no data file is opened.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from threading import Lock
from typing import Any, Final

import numpy as np

from shardbook._described import Described, Source, Target, describe, told_as_ours
from shardbook._trees import Tree
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.columns import Int64Array
from shardbook.core.footprint import NO_RANK, NOT_THERE, Footprint
from shardbook.core.limits import MAX_NAMED_FILES, MAX_NAMED_RANKS
from shardbook.errors import InvalidArgumentError

#: Hears how many files of how many were looked at; called from several threads, one at a time.
Progress = Callable[[int, int], None]

#: Most entries that one fault names.
_MAX_FQNS: Final = 5


class FaultKind(StrEnum):
    """What is wrong with a data file."""

    #: It is not there.
    MISSING = "missing"
    #: It ends before an extent does.
    TRUNCATED = "truncated"
    #: Extents claim the same bytes of it.
    OVERLAPPING = "overlapping"


@dataclass(frozen=True)
class FileFault:
    """What is wrong with one data file.

    Attributes:
        kind: `missing`, `truncated` or `overlapping`.
        file: The file, relative to the checkpoint's directory.
        rank: Rank that wrote it; None when nobody knows.
        expected_bytes: Least size that its extents need.
        found_bytes: Size that it has; None when it is not there.
        offset: First byte of an extent that is not there, or that two extents claim.
        extent_count: Extents that are not there as a whole, or that claim bytes of an earlier one.
        lost_bytes: Bytes of extents that are not there.
        fqns: Entries of the checkpoint that this hurts, the first 5.
    """

    kind: FaultKind
    file: str
    rank: int | None
    expected_bytes: int
    found_bytes: int | None
    offset: int
    extent_count: int
    lost_bytes: int
    fqns: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "kind": self.kind.value, "fqns": list(self.fqns)}


@dataclass(frozen=True)
class VerifyReport:
    """What was found of a checkpoint's data files.

    Attributes:
        ref: Short form of the checkpoint's name; None for a directory by plain DCP.
        directory: Path or URL of the checkpoint.
        source: What said which bytes there should be: `catalogue`, `manifest`, or `dcp` for DCP's own `.metadata`.
        world_size: Ranks that saved it; of plain DCP's directories what the names of their files tell.
        ranks: The ranks that were looked at; None for all.
        file_count: Files that were looked at.
        extent_count: Extents in them.
        size_bytes: Bytes that these cover.
        fault_counts: How many faults of each kind, in full.
        faults: What is wrong, by rank and file, the first 50.
        faulty_ranks: Ranks with a fault, the first 50.
        faulty_rank_count: How many there are.
        lost_bytes: Bytes of extents that are not there, in full.
    """

    ref: str | None
    directory: str
    source: Source
    world_size: int
    ranks: tuple[int, ...] | None
    file_count: int
    extent_count: int
    size_bytes: int
    fault_counts: dict[FaultKind, int]
    faults: tuple[FileFault, ...]
    faulty_ranks: tuple[int, ...]
    faulty_rank_count: int
    lost_bytes: int

    @property
    def fault_count(self) -> int:
        """How many faults there are, in full."""
        return sum(self.fault_counts.values())

    @property
    def is_ok(self) -> bool:
        """True when everything is there."""
        return not self.fault_count

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "source": self.source.value,
            "ranks": None if self.ranks is None else list(self.ranks),
            "fault_counts": {kind.value: count for kind, count in self.fault_counts.items()},
            "faults": [fault.to_json() for fault in self.faults],
            "faulty_ranks": list(self.faulty_ranks),
        }


def verify(
    ref_or_path: Target,
    *,
    ranks: Iterable[int] | None = None,
    trusted: bool = False,
    config: ClientConfig | None = None,
    client: Client | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Looks whether every data file of a checkpoint is there and long enough for every extent in it.

    Directories are listed, files are not opened: what is altered without a change of size is not noticed. A directory
    is judged by itself, without any service; torch is needed for one that plain DCP wrote, and for nothing else. Safe
    while jobs save; writes nothing. Can be called from several threads.

    Args:
        ref_or_path: ``project/run@1500``, ``@latest``, ...; or a directory or URL that Shardbook or plain DCP saved
            into, whose newest whole checkpoint counts.
        ranks: Look at what these ranks wrote; None for all.
        trusted: Unpickle a ``.metadata`` that holds more than DCP's metadata, which can run any code in it.
        config: Settings; those of the environment when None.
        client: The server, for refs; by default the one that ``config`` names.
        progress: Hears how far it is, in files.

    Returns:
        What was found. A loss is no error: ``report.is_ok`` says.

    Raises:
        NotFoundError: There is no such checkpoint or directory. A checkpoint of the catalogue whose directory is gone
            is one of which everything is lost.
        InvalidArgumentError: A rank is none of the checkpoint's; its store is not configured; a package is not
            installed (``MISSING_PACKAGE``).
        FailedPreconditionError: ``.metadata`` is not DCP's metadata alone (``UNSAFE_METADATA``), or does not say where
            things are (``NO_STORAGE_DATA``).
        CorruptManifestError: What describes the directory is damaged.
        StorageError: The storage could not be asked.
        PermissionDeniedError: It did not let itself be asked (``STORAGE_DENIED``).
        ShardbookError: The service could not be asked.
    """
    found = describe(ref_or_path, trusted=trusted, config=config, client=client)
    chosen = None if ranks is None else _checked_ranks(ranks, found)
    footprint = found.footprint if chosen is None else found.footprint.of_ranks(chosen)
    with told_as_ours(f"cannot look at the files in {found.directory}"):
        sizes = _sizes(found, footprint.paths, progress)
    return _report(found, chosen, footprint, sizes)


def _checked_ranks(ranks: Iterable[int], found: Described) -> tuple[int, ...]:
    chosen = tuple(sorted(set(ranks)))
    wrong = [rank for rank in chosen if not 0 <= rank < found.world_size]
    if wrong:
        raise InvalidArgumentError(
            f"rank {wrong[0]} is not one of the {found.world_size} that saved this checkpoint",
            reason="RANK_OUT_OF_RANGE",
            field="ranks",
        )
    if (found.footprint.ranks == NO_RANK).any():
        raise InvalidArgumentError(
            "nobody knows which ranks wrote this checkpoint: its files do not have DCP's names",
            reason="RANKS_UNKNOWN",
            field="ranks",
        )
    return chosen


# ---------------------------------------------------------------- what is there


def _sizes(found: Described, paths: Sequence[str], progress: Progress | None) -> Int64Array:
    """(F,) bytes of each file; NOT_THERE for one that is not there."""
    sizes = np.full(len(paths), NOT_THERE, dtype=np.int64)
    if found.tree is None:
        return sizes
    folders: dict[str, dict[str, int]] = {}
    for at, path in enumerate(paths):
        folder, name = posixpath.split(path)
        folders.setdefault(folder, {})[name] = at
    tell = _Told(len(paths), progress)
    for folder, wanted in folders.items():
        for name, size in _listed(found.tree, found.directory, folder, wanted, tell).items():
            sizes[wanted[name]] = size
    return sizes


def _listed(
    tree: Tree, directory: str, folder: str, wanted: dict[str, int], tell: Callable[[int], None]
) -> dict[str, int]:
    return tree.sizes(f"{directory}/{folder}" if folder else directory, wanted, tell)


class _Told:
    """Adds up what threads have looked at, and passes it on."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = Lock()

    def __call__(self, count: int) -> None:
        """Counts files."""
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


# ---------------------------------------------------------------- what is wrong


def _report(found: Described, ranks: tuple[int, ...] | None, footprint: Footprint, sizes: Int64Array) -> VerifyReport:
    lost = footprint.lost(sizes)
    later, earlier = footprint.overlaps()
    overlap_counts = np.bincount(footprint.file[later], minlength=footprint.file_count)
    short = np.flatnonzero(lost.counts)
    doubled = np.flatnonzero(overlap_counts)
    missing_count = int((sizes[short] == NOT_THERE).sum())
    counts = Counter(
        {
            FaultKind.MISSING: missing_count,
            FaultKind.TRUNCATED: len(short) - missing_count,
            FaultKind.OVERLAPPING: len(doubled),
        }
    )
    # Everyone sees the same ones first: by rank, then as the files follow each other.
    faulty = np.union1d(short, doubled)
    faulty = faulty[np.argsort(footprint.ranks[faulty], kind="stable")]

    def faults() -> Iterator[FileFault]:
        for file in faulty.tolist():
            if lost.counts[file]:
                rows = footprint.rows_of(file)
                yield _loss(footprint, file, int(sizes[file]), rows[lost.rows[rows]], int(lost.first[file]))
            if overlap_counts[file]:
                rows = footprint.file[later] == file
                yield _overlap(footprint, file, int(sizes[file]), later[rows], earlier[rows])

    hurt = np.unique(footprint.ranks[faulty])
    hurt = hurt[hurt != NO_RANK]
    return VerifyReport(
        ref=found.ref,
        directory=found.directory,
        source=found.source,
        world_size=found.world_size,
        ranks=ranks,
        file_count=footprint.file_count,
        extent_count=footprint.extent_count,
        size_bytes=footprint.size_bytes,
        fault_counts={kind: counts[kind] for kind in FaultKind},
        faults=tuple(islice(faults(), MAX_NAMED_FILES)),
        faulty_ranks=tuple(hurt[:MAX_NAMED_RANKS].tolist()),
        faulty_rank_count=len(hurt),
        lost_bytes=int(lost.lost_bytes.sum()),
    )


def _loss(footprint: Footprint, file: int, size_bytes: int, rows: Int64Array, first: int) -> FileFault:
    """What is not there of a file."""
    is_there = size_bytes != NOT_THERE
    begin = np.maximum(footprint.start[rows], size_bytes)
    return _fault(
        footprint,
        FaultKind.TRUNCATED if is_there else FaultKind.MISSING,
        file,
        size_bytes,
        rows,
        offset=first,
        lost_bytes=int((footprint.end[rows] - begin).sum()),
        count=len(rows),
    )


def _overlap(footprint: Footprint, file: int, size_bytes: int, later: Int64Array, earlier: Int64Array) -> FileFault:
    """What claims the same bytes of a file."""
    return _fault(
        footprint,
        FaultKind.OVERLAPPING,
        file,
        size_bytes,
        np.stack([earlier, later], axis=1).reshape(-1),
        offset=int(footprint.start[later].min()),
        lost_bytes=0,
        count=len(later),
    )


def _fault(
    footprint: Footprint,
    kind: FaultKind,
    file: int,
    size_bytes: int,
    rows: Int64Array,
    *,
    offset: int,
    lost_bytes: int,
    count: int,
) -> FileFault:
    rank = int(footprint.ranks[file])
    # The first ones by place in the file; each once.
    entries, at = np.unique(footprint.entry[rows], return_index=True)
    named = entries[np.argsort(at)][:_MAX_FQNS].tolist()
    return FileFault(
        kind=kind,
        file=footprint.paths[file],
        rank=None if rank == NO_RANK else rank,
        expected_bytes=int(footprint.needed[file]),
        found_bytes=None if size_bytes == NOT_THERE else size_bytes,
        offset=offset,
        extent_count=count,
        lost_bytes=lost_bytes,
        fqns=tuple(footprint.fqns[entry] for entry in named),
    )


__all__ = ["FaultKind", "FileFault", "Progress", "Source", "VerifyReport", "verify"]
