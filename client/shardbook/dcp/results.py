"""What a save returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class SaveState(StrEnum):
    """How far a save has come when it returns. The data is on storage in every one of them."""

    #: In the catalogue, whole and validated; loadable by ref and by path.
    COMMITTED = "COMMITTED"
    #: This rank's part is registered; the commit is the coordinator's business.
    REGISTERED = "REGISTERED"
    #: Not in the catalogue; loadable by path. ``shardbook sync DIR``, or the session's next save, brings it in.
    UNREGISTERED = "UNREGISTERED"


@dataclass(frozen=True)
class SaveStats:
    """What one rank's save did and what it cost.

    Attributes:
        planned_count: Items of the rank's plan.
        written_count: Items that it wrote; the rest other ranks wrote.
        written_bytes: Bytes of its items on storage.
        sent_bytes: Bytes of the messages that it sent to the service; 0 when nothing was sent.
        plan_s: Until it knew what to write, seconds.
        write_s: Until its data was on storage, seconds.
        finish_s: Until the rest was done: registration, commit, manifest, seconds.
    """

    planned_count: int = 0
    written_count: int = 0
    written_bytes: int = 0
    sent_bytes: int = 0
    plan_s: float = 0.0
    write_s: float = 0.0
    finish_s: float = 0.0


@dataclass(frozen=True)
class SaveResult:
    """Outcome of a save on one rank.

    Attributes:
        state: How far it has come.
        ref: What ``load`` takes: ``project/run@1500`` once committed, else the path.
        reason: Why it is not further, or what was left undone; empty when all is well.
        path: Directory or URL of the checkpoint.
        step: Training step.
        name: Resource name of this very attempt; empty unless committed.
        attempt: Attempt within the session.
        prefix: Directory of the attempt's data files, relative to ``path``.
        stats: What it did and cost.
    """

    state: SaveState
    ref: str
    reason: str = ""
    path: str = ""
    step: int = 0
    name: str = ""
    attempt: int = 1
    prefix: str = ""
    stats: SaveStats = field(default_factory=SaveStats)

    def __repr__(self) -> str:
        why = f", reason={self.reason!r}" if self.reason else ""
        return f"SaveResult({self.state}, {self.ref!r}, step={self.step}{why})"
