"""What happens in the catalogue, as plain values. Frozen, so they may be shared by threads."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from shardbook._times import datetime_of, rfc3339
from shardbook.catalog import Checkpoint
from shardbook.core.names import CheckpointId, CheckpointName, PartName
from shardbook.v1 import events_pb2

Json = dict[str, Any]

#: Everything, as a pattern of runs.
EVERYTHING: Final = "*/*"
#: Where a watch begins that is not told: what happens from now on.
NOW: Final = "now"


class EventKind(StrEnum):
    """What can happen."""

    COMMITTED = "committed"
    FAILED = "failed"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    DELETED = "deleted"
    UNDELETED = "undeleted"
    DATA_LOST = "data-lost"
    DATA_FOUND = "data-found"
    #: It has other locations than before.
    MOVED = "moved"
    ALIAS_MOVED = "alias-moved"
    ALIAS_DELETED = "alias-deleted"
    #: A newer server's; known by its place alone.
    UNKNOWN = "unknown"


#: Numbers of kinds on the wire.
KINDS = {
    EventKind.COMMITTED: events_pb2.Event.KIND_COMMITTED,
    EventKind.FAILED: events_pb2.Event.KIND_FAILED,
    EventKind.EXPIRED: events_pb2.Event.KIND_EXPIRED,
    EventKind.SUPERSEDED: events_pb2.Event.KIND_SUPERSEDED,
    EventKind.DELETED: events_pb2.Event.KIND_DELETED,
    EventKind.UNDELETED: events_pb2.Event.KIND_UNDELETED,
    EventKind.DATA_LOST: events_pb2.Event.KIND_DATA_LOST,
    EventKind.DATA_FOUND: events_pb2.Event.KIND_DATA_FOUND,
    EventKind.MOVED: events_pb2.Event.KIND_MOVED,
    EventKind.ALIAS_MOVED: events_pb2.Event.KIND_ALIAS_MOVED,
    EventKind.ALIAS_DELETED: events_pb2.Event.KIND_ALIAS_DELETED,
}
_BY_NUMBER = {number: kind for kind, number in KINDS.items()}


@dataclass(frozen=True)
class Event:
    """One fact of a checkpoint's life, or of an alias.

    Attributes:
        cursor: Where it stands: ``Client.watch(since=cursor)`` goes on behind it.
        kind: What happened.
        time: When, by the database's clock.
        part: ``project/run`` or ``project/run:part`` that it happened in.
        checkpoint: The checkpoint as it was when the event was read; None for an alias that means none.
        alias: Name of the alias; empty for events of checkpoints.
    """

    cursor: str
    kind: EventKind
    time: datetime | None
    part: str
    checkpoint: Checkpoint | None
    alias: str

    @classmethod
    def of(cls, message: events_pb2.Event) -> Event:
        """Returns what ``message`` says."""
        return cls(
            cursor=message.cursor,
            kind=_BY_NUMBER.get(message.kind, EventKind.UNKNOWN),
            time=datetime_of(message.time),
            part=PartName.parse(message.part).ref,
            checkpoint=Checkpoint.of(message.checkpoint) if message.HasField("checkpoint") else None,
            alias=message.alias,
        )

    @property
    def alias_ref(self) -> str:
        """The alias as ``project/run@best``; empty for events of checkpoints."""
        return f"{self.part}@{self.alias}" if self.alias else ""

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "kind": self.kind.value,
            "time": rfc3339(self.time),
            "checkpoint": None if self.checkpoint is None else self.checkpoint.to_json(),
        }


class ClaimState(StrEnum):
    """Where the work on a checkpoint stands."""

    RUNNING = "running"
    WAITING = "waiting"
    FAILED = "failed"
    #: Done, or a newer server's.
    UNKNOWN = "unknown"


CLAIM_STATES = {
    events_pb2.Claim.STATE_RUNNING: ClaimState.RUNNING,
    events_pb2.Claim.STATE_WAITING: ClaimState.WAITING,
    events_pb2.Claim.STATE_FAILED: ClaimState.FAILED,
}


@dataclass(frozen=True)
class Claim:
    """One watcher's work on one checkpoint.

    Attributes:
        checkpoint: The checkpoint.
        state: Where the work stands.
        attempt: Which attempt at it this is, from 1.
        holder: Who claimed it last.
        due_time: When the lease of one that runs ends, one that waits is tried again, or one failed for good.
        failure: Why the last attempt failed; empty when none did.
    """

    checkpoint: Checkpoint
    state: ClaimState
    attempt: int
    holder: str
    due_time: datetime | None
    failure: str

    @classmethod
    def of(cls, message: events_pb2.Claim) -> Claim:
        """Returns what ``message`` says."""
        return cls(
            checkpoint=Checkpoint.of(message.checkpoint),
            state=CLAIM_STATES.get(message.state, ClaimState.UNKNOWN),
            attempt=message.attempt,
            holder=message.holder,
            due_time=datetime_of(message.due_time),
            failure=message.failure,
        )

    @property
    def ref(self) -> str:
        """Ref that means this very attempt for ever: ``project/run@1500.s3.a1``."""
        one = self.checkpoint
        full = CheckpointId.full(one.step, one.session, one.attempt, bytes.fromhex(one.incarnation))
        return CheckpointName(CheckpointName.parse(one.name).part, full).ref

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "checkpoint": self.checkpoint.to_json(),
            "state": self.state.value,
            "due_time": rfc3339(self.due_time),
        }


@dataclass(frozen=True)
class Subscription:
    """What several watchers work on together.

    Attributes:
        name: Its name.
        parent: Parts that it is about, as a resource name with ``-`` for all.
        filter: Which checkpoints.
        cursor: Where it has come to.
        behind_count: Events behind it, whatever they are about.
        done_count: Checkpoints that were done.
        claims: What is being worked on, waits to be tried again, or failed; at most 1,000.
        create_time: When it was made.
    """

    name: str
    parent: str
    filter: str
    cursor: str
    behind_count: int
    done_count: int
    claims: tuple[Claim, ...]
    create_time: datetime | None

    @classmethod
    def of(cls, message: events_pb2.Subscription) -> Subscription:
        """Returns what ``message`` says."""
        return cls(
            name=message.name.removeprefix("subscriptions/"),
            parent=message.parent,
            filter=message.filter,
            cursor=message.cursor,
            behind_count=message.behind_count,
            done_count=message.done_count,
            claims=tuple(map(Claim.of, message.claims)),
            create_time=datetime_of(message.create_time),
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "claims": [one.to_json() for one in self.claims],
            "create_time": rfc3339(self.create_time),
        }
