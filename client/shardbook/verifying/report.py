"""What ``verify`` returns, as plain values. Frozen, so they may be shared by threads.

``to_json`` returns the object that the command line prints with ``--json``. Its keys are only ever added.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shardbook._described import Source


class FaultKind(StrEnum):
    """What is wrong with a data file."""

    #: It is not there.
    MISSING = "missing"
    #: It ends before an extent does.
    TRUNCATED = "truncated"
    #: Extents claim the same bytes of it.
    OVERLAPPING = "overlapping"
    #: It holds other bytes than were written.
    ALTERED = "altered"


@dataclass(frozen=True)
class FileFault:
    """What is wrong with one data file.

    Attributes:
        kind: `missing`, `truncated`, `overlapping` or `altered`.
        file: The file, relative to the checkpoint's directory.
        rank: Rank that wrote it; None when nobody knows.
        expected_bytes: Least size that its extents need.
        found_bytes: Size that it has; None when it is not there.
        offset: First byte of an extent that is not there, that two extents claim, or of an extent that is altered.
        extent_count: Extents that are not there as a whole, that claim bytes of an earlier one, or that are altered.
        lost_bytes: Bytes of extents that are not there, or that are altered.
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
        checked_count: Extents whose bytes were compared with their checksum; None when that was not asked for.
        fault_counts: How many faults of each kind, in full.
        faults: What is wrong, by rank and file, the first 50.
        faulty_ranks: Ranks with a fault, the first 50.
        faulty_rank_count: How many there are.
        lost_bytes: Bytes of extents that are not there, or that are altered, in full.
        name: Full name in the catalogue; None when a directory was asked.
        faulty_directories: Where else the checkpoint is, or should be, and not all is there.
        unknown_locations: Locations that nobody looked at: their stores are not configured here, or out of reach.
    """

    ref: str | None
    directory: str
    source: Source
    world_size: int
    ranks: tuple[int, ...] | None
    file_count: int
    extent_count: int
    size_bytes: int
    checked_count: int | None
    fault_counts: dict[FaultKind, int]
    faults: tuple[FileFault, ...]
    faulty_ranks: tuple[int, ...]
    faulty_rank_count: int
    lost_bytes: int
    name: str | None = None
    faulty_directories: tuple[str, ...] = ()
    unknown_locations: tuple[str, ...] = ()

    @property
    def fault_count(self) -> int:
        """How many faults there are, in full."""
        return sum(self.fault_counts.values())

    @property
    def is_ok(self) -> bool:
        """True when everything is there."""
        return not self.fault_count

    @property
    def is_missing(self) -> bool:
        """True when files are lost or cut."""
        return bool(self.fault_counts[FaultKind.MISSING] or self.fault_counts[FaultKind.TRUNCATED])

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "source": self.source.value,
            "ranks": None if self.ranks is None else list(self.ranks),
            "fault_counts": {kind.value: count for kind, count in self.fault_counts.items()},
            "faults": [fault.to_json() for fault in self.faults],
            "faulty_ranks": list(self.faulty_ranks),
            "faulty_directories": list(self.faulty_directories),
            "unknown_locations": list(self.unknown_locations),
        }


__all__ = ["FaultKind", "FileFault", "Source", "VerifyReport"]
