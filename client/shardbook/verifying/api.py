"""``verify``: what should be there, what is there, and whether it is what was written."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from threading import Lock

import numpy as np

from shardbook._described import Described, Target, describe, told_as_ours
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.columns import Int64Array
from shardbook.core.extents import NO_CHECKSUM
from shardbook.core.footprint import NO_RANK, NOT_THERE
from shardbook.errors import InvalidArgumentError, PermissionDeniedError, StorageError
from shardbook.verifying.faults import Looked, report_of
from shardbook.verifying.report import VerifyReport
from shardbook.verifying.sums import altered_extents

#: Hears how many of how many are done, and of what: ``files`` that are looked at, then ``MiB`` that are read.
#: Called from several threads, one at a time.
Progress = Callable[[int, int, str], None]


def verify(
    ref_or_path: Target,
    *,
    ranks: Iterable[int] | None = None,
    checksums: bool = False,
    trusted: bool = False,
    config: ClientConfig | None = None,
    client: Client | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Looks whether every data file of a checkpoint is there and long enough for every extent in it.

    Directories are listed, files not opened: without ``checksums`` what is altered at the same size stays unnoticed.
    A directory is judged by itself, without any service; of a checkpoint that is in several places the first one where
    all is there. Safe while jobs save; writes nothing; needs no torch. Can be
    called from several threads.

    Args:
        ref_or_path: ``project/run@1500``, ``@latest``, ...; or a directory or URL that Shardbook or plain DCP saved
            into, whose newest whole checkpoint counts.
        ranks: Look at what these ranks wrote; None for all.
        checksums: Read every extent that a checksum was kept of, and compare; needs the extra ``[checksum]``.
        trusted: Have torch unpickle the ``.metadata`` of a directory by plain DCP, which can run any code in it.
        config: Settings; those of the environment when None.
        client: The server, for refs; by default the one that ``config`` names.
        progress: Hears how far it is.

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
    first = judged(found, chosen=chosen, checksums=checksums, progress=progress)
    faulty, unknown = [first.directory], list(found.unknown)
    for one in () if first.is_ok else found.elsewhere():
        try:
            report = judged(one, chosen=chosen, checksums=checksums, progress=progress)
        except (StorageError, PermissionDeniedError):
            unknown.append(one.directory)
            continue
        if report.is_ok:
            return replace(report, faulty_directories=tuple(faulty), unknown_locations=tuple(unknown))
        faulty.append(report.directory)
    return replace(first, faulty_directories=tuple(faulty[1:]), unknown_locations=tuple(unknown))


def judged(
    found: Described,
    *,
    chosen: tuple[int, ...] | None = None,
    checksums: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Returns what is wrong with a checkpoint in one directory; raises as ``verify`` does of the storage."""
    footprint = found.footprint if chosen is None else found.footprint.of_ranks(chosen)
    with told_as_ours(f"cannot look at the files in {found.directory}"):
        sizes = _sizes(found, footprint.paths, progress)
        looked = Looked(found, chosen, footprint, sizes, footprint.lost(sizes))
        if checksums:
            looked = _summed(looked, progress)
    return report_of(looked)


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


def _sizes(found: Described, paths: Sequence[str], progress: Progress | None) -> Int64Array:
    """(F,) bytes of each file; NOT_THERE for one that is not there."""
    sizes = np.full(len(paths), NOT_THERE, dtype=np.int64)
    if found.tree is None:
        return sizes
    folders: dict[str, dict[str, int]] = {}
    for at, path in enumerate(paths):
        folder, name = posixpath.split(path)
        folders.setdefault(folder, {})[name] = at
    tell = _Told("files", len(paths), progress)
    for folder, wanted in folders.items():
        where = f"{found.directory}/{folder}" if folder else found.directory
        for name, size in found.tree.sizes(where, wanted, tell).items():
            sizes[wanted[name]] = size
    return sizes


def _summed(looked: Looked, progress: Progress | None) -> Looked:
    """Reads what is there and has a checksum."""
    whole = looked.footprint
    rows = np.flatnonzero(~looked.lost.rows & (whole.checksum != NO_CHECKSUM)).astype(np.int64, copy=False)
    if looked.found.tree is None or not len(rows):
        return replace(looked, checked_count=0)
    tell = _Told("MiB", int(whole.length[rows].sum()), progress, unit=1 << 20)
    altered = altered_extents(looked.found.tree, looked.found.directory, whole, rows, tell)
    return replace(looked, altered=altered, checked_count=len(rows))


class _Told:
    """Adds up what threads have done, and passes it on."""

    def __init__(self, what: str, total: int, progress: Progress | None, unit: int = 1) -> None:
        self._what = what
        self._total = total
        self._progress = progress
        self._unit = unit
        self._done = 0
        self._lock = Lock()

    def __call__(self, count: int) -> None:
        """Counts more of it."""
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(-(-self._done // self._unit), -(-self._total // self._unit), self._what)


__all__ = ["Progress", "judged", "verify"]
