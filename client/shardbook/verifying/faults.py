"""What was found of a checkpoint's data files, made a report: by columns, but for the few faults that are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from shardbook._described import Described
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.footprint import NO_RANK, NOT_THERE, Footprint, Lost
from shardbook.core.limits import MAX_NAMED_FILES, MAX_NAMED_RANKS
from shardbook.verifying.report import FaultKind, FileFault, VerifyReport

#: Most entries that one fault names.
_MAX_FQNS: Final = 5


@dataclass(frozen=True, eq=False)
class Looked:
    """What was found of F files and N extents.

    Attributes:
        found: The checkpoint.
        ranks: The ranks chosen; None for all.
        footprint: What they wrote.
        sizes: (F,) bytes of each file; NOT_THERE for one that is not there.
        lost: What these lack.
        altered: (N,) True for extents whose bytes are not what was written; None when they were not read.
        checked_count: How many were read; None likewise.
    """

    found: Described
    ranks: tuple[int, ...] | None
    footprint: Footprint
    sizes: Int64Array
    lost: Lost
    altered: BoolArray | None = None
    checked_count: int | None = None


def report_of(looked: Looked) -> VerifyReport:
    """Returns what is wrong, the first 50 faults by rank and file, and all sums in full."""
    footprint, lost, found = looked.footprint, looked.lost, looked.found
    later, earlier = footprint.overlaps()
    altered = np.zeros(0, np.int64) if looked.altered is None else np.flatnonzero(looked.altered)
    doubled, changed = _counts(footprint, later), _counts(footprint, altered)
    missing = (looked.sizes == NOT_THERE) & (lost.counts > 0)
    counts = {
        FaultKind.MISSING: missing,
        FaultKind.TRUNCATED: (lost.counts > 0) & ~missing,
        FaultKind.OVERLAPPING: doubled > 0,
        FaultKind.ALTERED: changed > 0,
    }
    # Everyone sees the same ones first: by rank, then as the files follow each other.
    faulty = np.flatnonzero((lost.counts > 0) | (doubled > 0) | (changed > 0))
    faulty = faulty[np.argsort(footprint.ranks[faulty], kind="stable")]

    def faults() -> Iterator[FileFault]:
        for file in faulty.tolist():
            size_bytes = int(looked.sizes[file])
            if lost.counts[file]:
                rows = footprint.rows_of(file)
                yield _loss(footprint, file, size_bytes, rows[lost.rows[rows]], int(lost.first[file]))
            if doubled[file]:
                rows = footprint.file[later] == file
                yield _overlap(footprint, file, size_bytes, later[rows], earlier[rows])
            if changed[file]:
                rows = altered[footprint.file[altered] == file]
                yield _alteration(footprint, file, size_bytes, rows)

    hurt = np.unique(footprint.ranks[faulty])
    hurt = hurt[hurt != NO_RANK]
    return VerifyReport(
        ref=found.ref,
        directory=found.directory,
        source=found.source,
        world_size=found.world_size,
        ranks=looked.ranks,
        file_count=footprint.file_count,
        extent_count=footprint.extent_count,
        size_bytes=footprint.size_bytes,
        checked_count=looked.checked_count,
        fault_counts={kind: int(files.sum()) for kind, files in counts.items()},
        faults=tuple(islice(faults(), MAX_NAMED_FILES)),
        faulty_ranks=tuple(hurt[:MAX_NAMED_RANKS].tolist()),
        faulty_rank_count=len(hurt),
        lost_bytes=int(lost.lost_bytes.sum()) + int(footprint.length[altered].sum()),
        name=found.name,
    )


def _counts(footprint: Footprint, rows: Int64Array) -> Int64Array:
    """(F,) how many of ``rows`` each file has."""
    return np.bincount(footprint.file[rows], minlength=footprint.file_count).astype(np.int64)


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


def _alteration(footprint: Footprint, file: int, size_bytes: int, rows: Int64Array) -> FileFault:
    """What is not what was written to a file."""
    rows = rows[np.argsort(footprint.start[rows], kind="stable")]
    return _fault(
        footprint,
        FaultKind.ALTERED,
        file,
        size_bytes,
        rows,
        offset=int(footprint.start[rows[0]]),
        lost_bytes=int(footprint.length[rows].sum()),
        count=len(rows),
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


__all__ = ["Looked", "report_of"]
