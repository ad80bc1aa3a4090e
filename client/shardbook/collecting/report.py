"""What ``find_orphans`` finds, as plain values. Frozen, so they may be shared by threads.

``to_json`` returns the object that the command line prints with ``--json``. Its keys are only ever added.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """Why an attempt's files are kept, or that nobody needs them."""

    #: The save never finished and cannot any more.
    ORPHAN = "orphan"
    #: A manifest says what it holds, or one is there that cannot be read.
    MANIFEST = "manifest"
    #: DCP's own ``.metadata`` names its files.
    REFERENCED = "referenced"
    #: Every rank left a record: `shardbook sync` makes a checkpoint of it.
    WHOLE = "whole"
    #: A record is there that cannot be read, so nobody knows how many there should be.
    UNREADABLE = "unreadable"
    #: Something in it was written lately.
    YOUNG = "young"
    #: The storage does not say when something in it was written.
    UNDATED = "undated"
    #: The catalogue has it open: its ranks are at work.
    OPEN = "open"
    #: The catalogue has it committed.
    COMMITTED = "committed"
    #: The catalogue had it committed and has deleted it, which may be undone.
    DELETED = "deleted"
    #: It expired, and the session that wrote it is alive and may take it up again.
    REVIVABLE = "revivable"


@dataclass(frozen=True)
class LeftAttempt:
    """Files that one attempt to save left in a checkpoint directory.

    Attributes:
        directory: Path or URL of the checkpoint directory.
        prefix: Directory of the attempt's data files in it.
        verdict: `orphan`, or why it is kept: `manifest`, `referenced`, `whole`, `unreadable`, `young`, `undated`,
            `open`, `committed`, `deleted`, `revivable`.
        ref: Short form of what it would have become; None when no record says.
        state: What the catalogue says of it, such as `FAILED`; empty when it was not asked, or does not know it.
        record_count: Ranks that left a record.
        world_size: Ranks that took part; None when no record says.
        file_count: Files, records included; of an attempt with a manifest its data files are not looked at.
        size_bytes: Bytes of them.
        last_write_time: When the youngest of them was written; None when the storage does not say of all.
    """

    directory: str
    prefix: str
    verdict: Verdict
    ref: str | None
    state: str
    record_count: int
    world_size: int | None
    file_count: int
    size_bytes: int
    last_write_time: datetime | None

    @property
    def is_orphan(self) -> bool:
        """True when nobody needs it."""
        return self.verdict is Verdict.ORPHAN

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        written = self.last_write_time
        told = None if written is None else written.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {**vars(self), "verdict": self.verdict.value, "last_write_time": told}


def time_of(mtime_s: float | None) -> datetime | None:
    """Returns a time, as far as one can be told."""
    try:
        return None if mtime_s is None else datetime.fromtimestamp(mtime_s, UTC)
    except (OverflowError, OSError, ValueError):
        return None


__all__ = ["LeftAttempt", "Verdict", "time_of"]
