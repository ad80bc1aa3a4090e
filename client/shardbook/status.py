"""Where the saves of a run stand, as plain values. Frozen, so they may be shared by threads.

``to_json`` of each returns the object that the command line prints with ``--json``. Its keys are only ever added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from shardbook.catalog import Checkpoint, RunPart
from shardbook.descriptions import SaveTiming
from shardbook.v1 import metadata_pb2, registration_pb2, types_pb2

Json = dict[str, Any]


class SavePhase(StrEnum):
    """What the ranks of an open attempt are at."""

    #: Some ranks have not said what they hold.
    PLANNING = "planning"
    #: Some ranks have not said what they wrote.
    WRITING = "writing"
    #: All ranks are there; the coordinator is to commit, or the service does.
    COMMITTING = "committing"


@dataclass(frozen=True)
class ServerInfo:
    """Who answers.

    Attributes:
        version: Version of the server's release.
        database: What it keeps the catalogue in: `sqlite` or `postgresql`.
        time: Time of the database's clock.
    """

    version: str
    database: str
    time: datetime

    @classmethod
    def of(cls, message: metadata_pb2.GetServerInfoResponse) -> ServerInfo:
        """Returns what ``message`` says."""
        return cls(message.version, message.database, _time(message.time))


@dataclass(frozen=True)
class RankHost:
    """A rank and its host.

    Attributes:
        rank: Rank in the save's process group.
        host: Its host; empty when the rank has not planned.
    """

    rank: int
    host: str

    @classmethod
    def of(cls, message: types_pb2.RankHost) -> RankHost:
        """Returns what ``message`` says."""
        return cls(message.rank, message.host)

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return dict(vars(self))


@dataclass(frozen=True)
class HostRanks:
    """Ranks of one host.

    Attributes:
        host: The host; empty when it is not known.
        rank_count: How many.
        ranks: Which, as ranges: ``0-7,12``; ends with ``...`` where there are more.
    """

    host: str
    rank_count: int
    ranks: str

    @classmethod
    def of(cls, message: registration_pb2.HostRanks) -> HostRanks:
        """Returns what ``message`` says."""
        return cls(message.host, message.rank_count, _ranges(message.bounds, message.rank_count))

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return dict(vars(self))


@dataclass(frozen=True)
class OpenAttempt:
    """How far an open attempt has come.

    Attributes:
        checkpoint: The attempt.
        phase: `planning`, `writing` or `committing`.
        age_s: Seconds since its first rank spoke.
        plan_s: Seconds that planning took, or has taken so far; None when no rank is registered and the server that
            answered did not see its end.
        write_s: Seconds since then, to write and to commit; None like ``plan_s``, and while ranks plan.
        planned_count: Ranks that submitted a plan.
        registered_count: Ranks that are registered.
        world_size: Ranks that take part.
        missing: The lowest ranks that are not registered, at most 50.
        missing_count: How many there are.
        registered: The lowest ranks that are registered, at most 50.
        unplanned: The lowest ranks that submitted no plan, at most 50.
        missing_hosts: Ranks that are not registered, by host, at most 50 hosts.
        missing_host_count: How many hosts there are; unknown ones count as one.
        unplanned_ranks: Ranks that submitted no plan, as ranges: ``0-7,12``; ends with ``...`` where there are more.
        timing: What the ranks that are registered took so far; None while none said.
    """

    checkpoint: Checkpoint
    phase: SavePhase
    age_s: float
    plan_s: float | None
    write_s: float | None
    planned_count: int
    registered_count: int
    world_size: int
    missing: tuple[RankHost, ...]
    missing_count: int
    registered: tuple[RankHost, ...]
    unplanned: tuple[int, ...]
    missing_hosts: tuple[HostRanks, ...] = ()
    missing_host_count: int = 0
    unplanned_ranks: str = ""
    timing: SaveTiming | None = None

    @classmethod
    def of(cls, message: registration_pb2.AttemptStatus, read_time: datetime) -> OpenAttempt:
        """Returns what ``message`` says; ``read_time`` is when that was so."""
        checkpoint, progress = Checkpoint.of(message.checkpoint), message.progress
        phase = _phase(message)
        began = checkpoint.create_time or read_time
        planned: datetime | None = None
        if phase is SavePhase.PLANNING:
            planned = read_time
        elif message.HasField("plan_time"):
            planned = min(_time(message.plan_time), read_time)
        elif not progress.planned_count:
            planned = began  # one rank, or ranks that do not plan
        return cls(
            checkpoint=checkpoint,
            phase=phase,
            age_s=_seconds(began, read_time),
            plan_s=None if planned is None else _seconds(began, planned),
            write_s=None if planned is None or phase is SavePhase.PLANNING else _seconds(planned, read_time),
            planned_count=progress.planned_count,
            registered_count=progress.registered_count,
            world_size=progress.world_size,
            missing=tuple(map(RankHost.of, progress.missing)),
            missing_count=message.registration_count - progress.registered_count,
            registered=tuple(map(RankHost.of, message.registered)),
            unplanned=tuple(message.unplanned),
            missing_hosts=tuple(map(HostRanks.of, message.missing_hosts)),
            missing_host_count=message.missing_host_count,
            unplanned_ranks=_ranges(message.unplanned_bounds, progress.world_size - progress.planned_count),
            timing=SaveTiming.of(message.timing) if message.HasField("timing") else None,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "checkpoint": self.checkpoint.to_json(),
            "phase": self.phase.value,
            "missing": [rank.to_json() for rank in self.missing],
            "registered": [rank.to_json() for rank in self.registered],
            "unplanned": list(self.unplanned),
            "missing_hosts": [one.to_json() for one in self.missing_hosts],
            "timing": None if self.timing is None else self.timing.to_json(),
        }


@dataclass(frozen=True)
class PartStatus:
    """Where the saves of one part stand.

    Attributes:
        part: The part, and who writes it.
        last_commit: The newest committed checkpoint; None when there is none.
        last_commit_age_s: Seconds since it was committed, or written, when it was recorded afterwards; None like it.
        last_failure: The newest attempt when it failed or expired; else None.
        open: Open attempts, newest first, at most 10.
        open_count: How many there are.
    """

    part: RunPart
    last_commit: Checkpoint | None
    last_commit_age_s: float | None
    last_failure: Checkpoint | None
    open: tuple[OpenAttempt, ...]
    open_count: int

    @classmethod
    def of(cls, message: registration_pb2.PartStatus, read_time: datetime) -> PartStatus:
        """Returns what ``message`` says; ``read_time`` is when that was so."""
        last = Checkpoint.of(message.last_commit) if message.HasField("last_commit") else None
        saved = None if last is None else last.create_time if last.recovered else last.commit_time
        return cls(
            part=RunPart.of(message.part),
            last_commit=last,
            last_commit_age_s=None if saved is None else _seconds(saved, read_time),
            last_failure=Checkpoint.of(message.last_failure) if message.HasField("last_failure") else None,
            open=tuple(OpenAttempt.of(attempt, read_time) for attempt in message.open),
            open_count=message.open_count,
        )

    def is_fresh(self, max_age_s: float) -> bool:
        """Returns True when something was committed, and not longer ago than ``max_age_s``."""
        return self.last_commit_age_s is not None and self.last_commit_age_s <= max_age_s

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "part": self.part.to_json(),
            "last_commit": None if self.last_commit is None else self.last_commit.to_json(),
            "last_failure": None if self.last_failure is None else self.last_failure.to_json(),
            "open": [attempt.to_json() for attempt in self.open],
        }


@dataclass(frozen=True)
class RunStatus:
    """Where the saves of a run stand.

    Attributes:
        run: Short form, ``project/run``.
        read_time: When this was so, by the database's clock.
        parts: Its parts, in alphabetical order.
    """

    run: str
    read_time: datetime
    parts: tuple[PartStatus, ...]

    @classmethod
    def of(cls, run: str, message: registration_pb2.GetRunStatusResponse) -> RunStatus:
        """Returns what ``message`` says of ``run``."""
        read_time = _time(message.read_time)
        return cls(run, read_time, tuple(PartStatus.of(part, read_time) for part in message.parts))

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            "run": self.run,
            "read_time": self.read_time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "parts": [part.to_json() for part in self.parts],
        }


def _phase(message: registration_pb2.AttemptStatus) -> SavePhase:
    progress = message.progress
    if progress.registered_count >= message.registration_count:
        return SavePhase.COMMITTING
    # A rank that got no answer in time writes without one, and one rank alone never asks.
    if progress.registered_count or progress.planned_count in (0, progress.world_size):
        return SavePhase.WRITING
    return SavePhase.PLANNING


def _ranges(bounds: Sequence[int], count: int) -> str:
    """Returns ranges as text; ``count`` is how many ranks there are in all."""
    pairs = list(zip(bounds[::2], bounds[1::2], strict=True))
    told = [str(first) if first == last else f"{first}-{last}" for first, last in pairs]
    is_all = sum(last - first + 1 for first, last in pairs) >= count
    return ",".join(told if is_all else [*told, "..."])


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def _seconds(since: datetime, until: datetime) -> float:
    """Seconds between two times of the database's clock, which may be set back."""
    return max(0.0, (until - since).total_seconds())


__all__ = ["HostRanks", "OpenAttempt", "PartStatus", "RankHost", "RunStatus", "SavePhase", "ServerInfo"]
