"""What the services are asked: frozen dataclasses that validate themselves.

Field names are those of the protos, so that an error's field path means the same on both sides of the wire; whoever
converts a message adds the prefix with ``ShardbookError.within``. Answers are in ``views``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from shardbook.core import limits
from shardbook.core.digest import check_digest
from shardbook.core.names import CheckpointId, CheckpointName, PartName, check_incarnation
from shardbook.core.structure import BlobKind
from shardbook.errors import InvalidArgumentError
from shardbook_server.service import checks
from shardbook_server.service.describing import NO_DESCRIPTION, PHASES, Description


class OnLive(IntEnum):
    """What StartSession does when another job's lease is alive; numbers as in ``shardbook.v1.OnLive``."""

    FAIL = 1
    WAIT = 2
    TAKEOVER = 3


@dataclass(frozen=True)
class SessionStart:
    """A job that wants to write a (run, part). ``incarnation`` is the natural key.

    Attributes:
        run: ``projects/{project}/runs/{run}``.
        part: Empty means ``default``.
        incarnation: 16 bytes of the client's UUID.
        job_id: The scheduler's id; may be empty.
        on_live: WAIT refuses like FAIL here: whoever waits asks again until the lease ends.
        resumed_from: Name or ref of a committed checkpoint of this (run, part); may be empty.
        host: For people.
        user: For people.
        known_session: Highest session number that the caller has seen; None does not say.
        age_us: How long ago the incarnation began, microseconds.
    """

    run: str
    part: str
    incarnation: bytes
    job_id: str = ""
    on_live: OnLive = OnLive.FAIL
    resumed_from: str = ""
    host: str = ""
    user: str = ""
    known_session: int | None = None
    age_us: int = 0

    def __post_init__(self) -> None:
        check_incarnation(self.incarnation)
        _ = self.part_name
        for field in ("job_id", "host", "user"):
            checks.check_label(getattr(self, field), field)
        checks.check_text(self.resumed_from, "resumed_from", limits.MAX_LOCATION_BYTES)
        checks.check_int(self.known_session or 0, "known_session")
        checks.check_int(self.age_us, "age", largest=checks.LONGEST_AGE_US)

    @cached_property
    def part_name(self) -> PartName:
        """The (run, part)."""
        return checks.check_part(self.run, self.part)


@dataclass(frozen=True)
class SessionKey:
    """Names one session of a (run, part); both number and incarnation have to be right.

    Attributes:
        run: ``projects/{project}/runs/{run}``.
        part: Empty means ``default``.
        session: 1 or more.
        incarnation: 16 bytes.
    """

    run: str
    part: str
    session: int
    incarnation: bytes

    def __post_init__(self) -> None:
        _ = self.part_name
        checks.check_int(self.session, "session", smallest=1)
        check_incarnation(self.incarnation)

    @cached_property
    def part_name(self) -> PartName:
        """The (run, part)."""
        return checks.check_part(self.run, self.part)


@dataclass(frozen=True)
class AttemptKey:
    """Names one attempt to save, as ``shardbook.v1.AttemptKey``.

    Attributes:
        run: ``projects/{project}/runs/{run}``.
        part: Empty means ``default``.
        step: 0 or more.
        session: 0 only for attempts made offline.
        incarnation: 16 bytes.
        attempt: 1 or more.
        world_size: Ranks that take part, 1 or more.
    """

    run: str
    part: str
    step: int
    session: int
    incarnation: bytes
    attempt: int
    world_size: int

    def __post_init__(self) -> None:
        _ = self.part_name
        checks.check_int(self.step, "step")
        checks.check_int(self.session, "session")
        check_incarnation(self.incarnation)
        checks.check_int(self.attempt, "attempt", smallest=1, largest=limits.MAX_ATTEMPT)
        checks.check_int(self.world_size, "world_size", smallest=1, largest=limits.MAX_WORLD_SIZE)

    @cached_property
    def part_name(self) -> PartName:
        """The (run, part)."""
        return checks.check_part(self.run, self.part)

    @property
    def checkpoint_name(self) -> CheckpointName:
        """Resource name of the attempt."""
        full = CheckpointId.full(self.step, self.session, self.attempt, self.incarnation)
        return CheckpointName(self.part_name, full)


@dataclass(frozen=True)
class AttemptLocation:
    """Where the files of an attempt are, as ``shardbook.v1.AttemptLocation``.

    Attributes:
        location: ``store:relative/path``, URL or absolute path, without user information.
        prefix: Directory of the attempt below ``location``; may be empty.
    """

    location: str
    prefix: str = ""

    def __post_init__(self) -> None:
        checks.check_location(self.location, "location")
        checks.check_prefix(self.prefix, "prefix")


@dataclass(frozen=True)
class BlobUpload:
    """A content-addressed blob as sent, not looked at yet.

    Attributes:
        kind: What it holds.
        payload: Framed bytes.
    """

    kind: BlobKind
    payload: bytes

    def __post_init__(self) -> None:
        if len(self.payload) > limits.MAX_BLOB_BYTES:
            raise InvalidArgumentError(
                f"a blob of {len(self.payload)} bytes, the limit is {limits.MAX_BLOB_BYTES}",
                reason="LIMIT_EXCEEDED",
                field="payload",
            )


@dataclass(frozen=True, order=True)
class BlobRef:
    """Names a blob by content.

    Attributes:
        kind: What it holds.
        digest: 32 bytes.
    """

    kind: BlobKind
    digest: bytes


@dataclass(frozen=True)
class PlanSubmission:
    """A rank's plan, by digest.

    Attributes:
        key: The attempt; opened by this call when it is new.
        location: Where its files will be.
        rank: 0 to world_size - 1.
        plan_digest: 32 bytes.
        host: For people.
        save_to_lowest_rank: Replicated items go to the lowest rank that holds them; the ranks must agree.
    """

    key: AttemptKey
    location: AttemptLocation
    rank: int
    plan_digest: bytes
    host: str = ""
    save_to_lowest_rank: bool = False

    def __post_init__(self) -> None:
        checks.check_rank(self.rank, self.key.world_size, "rank")
        check_digest(self.plan_digest, "plan_digest")
        checks.check_label(self.host, "host")


@dataclass(frozen=True)
class ShardRegistration:
    """What a rank wrote: a structure by digest, and where its bytes are.

    Attributes:
        rank: 0 or more; checked against the attempt by whoever holds both.
        structure_digest: 32 bytes.
        extents: Payload of ``shardbook.core.extents``.
        volatile_properties: Payload of the same; may be empty.
        phase_ms: What the rank took for each of ``timing.PHASES``, milliseconds; empty when it does not say.
    """

    rank: int
    structure_digest: bytes
    extents: bytes
    volatile_properties: bytes = b""
    phase_ms: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.check_int(self.rank, "rank", largest=limits.MAX_WORLD_SIZE - 1)
        check_digest(self.structure_digest, "structure_digest")
        for field in ("extents", "volatile_properties"):
            checks.check_size(getattr(self, field), field, limits.MAX_EXTENTS_BYTES)
        if len(self.phase_ms) not in (0, len(PHASES)):
            raise InvalidArgumentError(f"{len(self.phase_ms)} phases, not {len(PHASES)}", field="phase_ms")


@dataclass(frozen=True)
class Registration:
    """A rank's registration within an attempt.

    Attributes:
        key: The attempt; opened by this call when it is new.
        location: Where its files are.
        registration: What the rank wrote.
        host: For people.
    """

    key: AttemptKey
    location: AttemptLocation
    registration: ShardRegistration
    host: str = ""

    def __post_init__(self) -> None:
        checks.check_rank(self.registration.rank, self.key.world_size, "registration.rank")
        checks.check_label(self.host, "host")


@dataclass(frozen=True)
class RankFailure:
    """A rank's own word that it cannot finish.

    Attributes:
        rank: Rank in the save's process group.
        host: For people; may be empty.
        phase: ``plan``, ``write`` or ``register``.
        reason: For people.
    """

    rank: int
    host: str
    phase: str
    reason: str

    def __post_init__(self) -> None:
        checks.check_int(self.rank, "rank", largest=limits.MAX_WORLD_SIZE - 1)
        checks.check_label(self.host, "host")
        if self.phase not in ("plan", "write", "register"):
            raise InvalidArgumentError("phase is not one of plan, write, register", field="phase")
        object.__setattr__(self, "reason", checks.prose(self.reason, limits.MAX_REASON_CHARS))


@dataclass(frozen=True)
class FailureReport:
    """A failed rank within an attempt.

    Attributes:
        key: The attempt; opened by this call when it is new.
        location: Where its files would have been.
        failure: What happened to which rank.
    """

    key: AttemptKey
    location: AttemptLocation
    failure: RankFailure

    def __post_init__(self) -> None:
        checks.check_rank(self.failure.rank, self.key.world_size, "failure.rank")


@dataclass(frozen=True)
class RecordRequest:
    """A whole attempt, or a part of one, from one process; see ``shardbook.v1.RecordCheckpointRequest``.

    Attributes:
        key: The attempt.
        location: Where its files are.
        registrations: At most ``limits.MAX_RECORD_REGISTRATIONS``, no rank twice.
        registration_count: Registrations of the whole attempt: world_size, or the slices of an import.
        complete: True in the last call.
        recovered: True for sync and import only.
        write_time_us: When the attempt was written, microseconds since the epoch; None when not known.
        metadata_header: Payload of ``shardbook.core.head``; may be empty.
        description: What is said of the checkpoint; counts in the last call.
    """

    key: AttemptKey
    location: AttemptLocation
    registrations: tuple[ShardRegistration, ...]
    registration_count: int
    complete: bool = False
    recovered: bool = False
    write_time_us: int | None = None
    metadata_header: bytes = b""
    description: Description = NO_DESCRIPTION

    def __post_init__(self) -> None:
        checks.check_int(self.registration_count, "registration_count", smallest=1, largest=limits.MAX_WORLD_SIZE)
        if len(self.registrations) > limits.MAX_RECORD_REGISTRATIONS:
            raise InvalidArgumentError(
                f"{len(self.registrations)} registrations, the limit is {limits.MAX_RECORD_REGISTRATIONS} a call",
                reason="LIMIT_EXCEEDED",
                field="registrations",
            )
        for at, registration in enumerate(self.registrations):
            checks.check_rank(registration.rank, self.registration_count, f"registrations[{at}].rank")
        if len({registration.rank for registration in self.registrations}) != len(self.registrations):
            raise InvalidArgumentError("a rank is registered twice in one call", field="registrations")
        # Session numbers go on from the highest one recorded, and must not run out.
        checks.check_int(self.key.session, "key.session", largest=checks.MAX_RECORDED_SESSION)
        if self.key.session == 0 and not self.recovered:
            raise InvalidArgumentError("session 0 is for recovered attempts", field="key.session")
        if self.write_time_us is not None:
            checks.check_int(self.write_time_us, "write_time", largest=checks.LATEST_TIME_US)
        checks.check_size(self.metadata_header, "metadata_header", limits.MAX_EXTENTS_BYTES)
