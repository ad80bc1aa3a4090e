"""What the services answer: frozen dataclasses, times in microseconds since the epoch (UTC, the database's clock)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

from shardbook.core.retention import RetentionPolicy
from shardbook_server.service.describing import NO_WRITER, Writer
from shardbook_server.service.types import AttemptLocation, BlobRef, RankFailure

T = TypeVar("T")


class CheckpointState(IntEnum):
    """Life of a checkpoint; numbers as in ``shardbook.v1.CheckpointState`` and in the database."""

    OPEN = 1
    COMMITTED = 2
    FAILED = 3
    EXPIRED = 4
    DELETED = 5


class FileDeletion(IntEnum):
    """How far the deletion of data files is; numbers as in ``shardbook.v1.FileDeletion``."""

    NONE = 0
    BEGUN = 1
    DONE = 2


class PlanState(IntEnum):
    """Answer to a plan; numbers as in ``shardbook.v1.PlanSaveResponse.State``."""

    STRUCTURE_UNKNOWN = 1
    WAITING = 2
    DECIDED = 3


@dataclass(frozen=True)
class SessionInfo:
    """A session as StartSession answers it.

    Attributes:
        session: Its number.
        lease_ttl_s: The lease ends this long after the last sign of life.
        current: False when a later session has taken the (run, part).
        latest: Resource name of what ``latest`` means; empty when nothing is committed.
    """

    session: int
    lease_ttl_s: float
    current: bool
    latest: str


@dataclass(frozen=True)
class LeaseInfo:
    """When a lease ends unless it is renewed."""

    expire_time_us: int


@dataclass(frozen=True)
class PlanAnswer:
    """Answer to one plan.

    Attributes:
        state: What the fields below say.
        unknown: With STRUCTURE_UNKNOWN: blobs to send. Nothing was stored.
        drop: With DECIDED: one bit an item as sent, most significant first; 1 means that another rank writes it.
            Empty means 0 everywhere.
        planned_count: With WAITING: ranks that are in. When that is all of them the decision has not been made yet:
            call ``PlanService.decide``.
        checkpoint_id: Key of the attempt for ``PlanService.decide`` and ``ProgressService.counts``; 0 when nothing
            was stored.
        opened_us: With WAITING: for ``PlanService.decide``.
    """

    state: PlanState
    unknown: tuple[BlobRef, ...] = ()
    drop: bytes = b""
    planned_count: int = 0
    checkpoint_id: int = 0
    opened_us: int = 0


@dataclass(frozen=True)
class RegistrationAnswer:
    """Answer to one registration.

    Attributes:
        unknown: Blobs to send with the same call; empty when the registration is durable.
        checkpoint_id: Key of the attempt for ``ProgressService.counts``; 0 when nothing was stored.
    """

    unknown: tuple[BlobRef, ...] = ()
    checkpoint_id: int = 0


@dataclass(frozen=True)
class AttemptCounts:
    """How far an attempt has come, in numbers that one grouped statement reads for many.

    Attributes:
        state: Where it is in its life.
        planned_count: Ranks that submitted a plan; 0 once the attempt is closed.
        registered_count: Ranks that registered; all of them once it is committed, 0 once it failed.
        world_size: Ranks that take part.
        registration_count: Registrations that make it whole: ``world_size``, except for imports.
    """

    state: CheckpointState
    planned_count: int
    registered_count: int
    world_size: int
    registration_count: int


@dataclass(frozen=True)
class RankHost:
    """A rank and the host it runs on; ``host`` is known only for ranks that planned."""

    rank: int
    host: str


@dataclass(frozen=True)
class Progress:
    """How far an attempt has come, for people.

    Attributes:
        checkpoint_id: Key of the attempt for ``ProgressService.counts``.
        counts: Numbers.
        missing: The lowest ranks not registered yet, at most ``limits.MAX_NAMED_RANKS``; empty once closed.
        failure: What a rank reported; None when none did.
    """

    checkpoint_id: int
    counts: AttemptCounts
    missing: tuple[RankHost, ...]
    failure: RankFailure | None


@dataclass(frozen=True)
class PhaseTiming:
    """How long the ranks took for one phase of a save, as ``shardbook.v1.PhaseTiming``."""

    phase: str
    slowest_ms: int
    slowest_rank: int
    slowest_host: str
    median_ms: int


@dataclass(frozen=True)
class SaveTiming:
    """How long a save took and what its ranks wrote, as ``shardbook.v1.SaveTiming``; no phases when none is known."""

    phases: tuple[PhaseTiming, ...]
    commit_ms: int
    largest_rank_bytes: int
    largest_rank: int
    median_rank_bytes: int


@dataclass(frozen=True)
class HoldView:
    """Somebody's hold of a checkpoint, as ``shardbook.v1.Hold``."""

    holder: str
    create_time_us: int
    expire_time_us: int


@dataclass(frozen=True)
class CheckpointInfo:
    """One attempt to save and what became of it, as ``shardbook.v1.Checkpoint``.

    Times that are not known are None; counts are 0 until it is committed. What is said of it, from ``labels`` on, is
    filled in for those who ask the catalogue; ranks that save are spared it.
    """

    checkpoint_id: int
    name: str
    ref: str
    step: int
    session: int
    attempt: int
    incarnation: bytes
    world_size: int
    state: CheckpointState
    live: bool
    location: AttemptLocation
    tensor_count: int
    chunk_count: int
    bytes_entry_count: int
    size_bytes: int
    create_time_us: int
    commit_time_us: int | None
    warnings: tuple[str, ...]
    failure: str
    structure_digest: bytes
    recovered: bool
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    note: str = ""
    writer: Writer = NO_WRITER
    timing: SaveTiming | None = None
    delete_time_us: int | None = None
    purge_time_us: int | None = None
    data_missing: bool = False
    file_deletion: FileDeletion = FileDeletion.NONE
    holds: tuple[HoldView, ...] = ()
    other_locations: tuple[str, ...] = ()
    etag: str = ""


@dataclass(frozen=True)
class PruneView:
    """What becomes of a checkpoint under a policy, as ``shardbook.v1.PruneDecision``."""

    name: str
    ref: str
    keep: bool
    reasons: tuple[str, ...]
    size_bytes: int
    create_time_us: int


@dataclass(frozen=True)
class PolicyView:
    """A stored policy, as ``shardbook.v1.GetRetentionPolicyResponse``; None when there is none."""

    policy: RetentionPolicy | None
    is_inherited: bool = False
    update_time_us: int | None = None
    etag: str = ""


@dataclass(frozen=True)
class AliasInfo:
    """An alias, as ``shardbook.v1.Alias``; ``direction`` by number."""

    name: str
    checkpoint: str
    metric: str
    direction: int
    protected: bool
    update_time_us: int | None
    etag: str = ""


@dataclass(frozen=True)
class ProjectInfo:
    """A project, as ``shardbook.v1.Project``."""

    name: str
    run_count: int


@dataclass(frozen=True)
class RankView:
    """What a rank took and wrote, as ``shardbook.v1.RankInfo``."""

    rank: int
    size_bytes: int
    plan_ms: int
    write_ms: int
    register_ms: int


@dataclass(frozen=True)
class RecordAnswer:
    """Answer to one RecordCheckpoint call.

    Attributes:
        unknown: Blobs to send; when there are any, nothing of the call was stored.
        checkpoint: The committed checkpoint, in answer to the last call.
    """

    unknown: tuple[BlobRef, ...] = ()
    checkpoint: CheckpointInfo | None = None


@dataclass(frozen=True)
class RunPartInfo:
    """Where one part of a run stands, as ``shardbook.v1.RunPart``."""

    part: str
    session: int
    host: str
    user: str
    job_id: str
    writing: bool
    last_seen_time_us: int | None
    latest: str
    latest_step: int
    checkpoint_count: int


@dataclass(frozen=True)
class RunInfo:
    """A run and where it stands, as ``shardbook.v1.Run``; parts in alphabetical order."""

    name: str
    create_time_us: int
    parts: tuple[RunPartInfo, ...]


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a listing.

    Attributes:
        items: At most the page size.
        next_page_token: Empty on the last page.
        total_size: Items in all where the listing counts them, else 0.
    """

    items: tuple[T, ...]
    next_page_token: str = ""
    total_size: int = 0


@dataclass(frozen=True)
class HeaderView:
    """First item of a metadata stream, as ``shardbook.v1.MetadataHeader``."""

    checkpoint: CheckpointInfo
    head: bytes
    metadata_header: bytes


@dataclass(frozen=True)
class SegmentView:
    """Extents of consecutive ranks, as ``shardbook.v1.ExtentSegment``."""

    first_rank: int
    payload: bytes


@dataclass(frozen=True)
class BlockView:
    """Consecutive entries, as ``shardbook.v1.MetadataBlock``."""

    entries: tuple[bytes, ...]


MetadataView = HeaderView | SegmentView | BlockView


@dataclass(frozen=True)
class QueryView:
    """A page of the answer to a query, as ``shardbook.v1.QueryChunksResponse``.

    Attributes:
        checkpoint: The checkpoint.
        found: Payload of ``shardbook.core.found``; empty where nothing was found.
        next_page_token: Empty on the last page.
        metadata_header: Payload of ``shardbook.core.head``, on the first page.
        head: Likewise; empty unless it was asked for.
        found_digest: Of the canonical bytes of ``found``, which is left out where the asker holds it; empty unless the
            answer was asked for apart.
        places: Payload of ``shardbook.core.places``; empty likewise, and where nothing was found.
    """

    checkpoint: CheckpointInfo
    found: bytes
    next_page_token: str = ""
    metadata_header: bytes = b""
    head: bytes = b""
    found_digest: bytes = b""
    places: bytes = b""


@dataclass(frozen=True)
class TensorView:
    """One entry of a checkpoint for people, as ``shardbook.v1.TensorInfo``; ``fqn`` in UTF-8 with lone surrogates."""

    fqn: bytes
    dtype: str
    shape: tuple[int, ...]
    chunk_count: int
    size_bytes: int
    tensor: bool
