"""What is said of checkpoints: who wrote them, how long that took, and the aliases that mean them. Frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from shardbook._times import datetime_of, rfc3339
from shardbook.core.names import AliasName, CheckpointName
from shardbook.core.retention import RetentionPolicy
from shardbook.v1 import catalog_pb2, retention_pb2, types_pb2

Json = dict[str, Any]


@dataclass(frozen=True)
class Writer:
    """Who and what wrote a checkpoint; each may be empty.

    Attributes:
        host: Host of the coordinator.
        user: User that ran the job.
        job_id: Scheduler's id of the job.
        client_version: Version of Shardbook.
        torch_version: Version of torch.
        git_commit: Commit of the training code (``SHARDBOOK_GIT_COMMIT``).
    """

    host: str = ""
    user: str = ""
    job_id: str = ""
    client_version: str = ""
    torch_version: str = ""
    git_commit: str = ""

    @classmethod
    def of(cls, message: types_pb2.Writer) -> Writer:
        """Returns what ``message`` says."""
        return cls(
            host=message.host,
            user=message.user,
            job_id=message.job_id,
            client_version=message.client_version,
            torch_version=message.torch_version,
            git_commit=message.git_commit,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return dict(vars(self))


@dataclass(frozen=True)
class PhaseTiming:
    """How long the ranks took for one phase of a save.

    Attributes:
        phase: ``plan``, ``write`` or ``register``.
        slowest_s: What the slowest rank took, seconds.
        slowest_rank: That rank.
        slowest_host: Its host; empty when it is not known.
        median_s: What the rank in the middle took, seconds.
    """

    phase: str
    slowest_s: float
    slowest_rank: int
    slowest_host: str
    median_s: float

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return dict(vars(self))


@dataclass(frozen=True)
class SaveTiming:
    """How long a save took, and what its ranks wrote.

    Attributes:
        phases: What the ranks measured; empty when they did not.
        commit_s: What the service took to assemble and commit, seconds.
        largest_rank: Rank that wrote most.
        largest_rank_bytes: Bytes that it wrote.
        median_rank_bytes: Bytes of the rank in the middle.
    """

    phases: tuple[PhaseTiming, ...]
    commit_s: float
    largest_rank: int
    largest_rank_bytes: int
    median_rank_bytes: int

    @classmethod
    def of(cls, message: types_pb2.SaveTiming) -> SaveTiming:
        """Returns what ``message`` says."""
        return cls(
            phases=tuple(
                PhaseTiming(
                    one.phase,
                    one.slowest.ToMilliseconds() / 1e3,
                    one.slowest_rank,
                    one.slowest_host,
                    one.median.ToMilliseconds() / 1e3,
                )
                for one in message.phases
            ),
            commit_s=message.commit.ToMilliseconds() / 1e3,
            largest_rank=message.largest_rank,
            largest_rank_bytes=message.largest_rank_bytes,
            median_rank_bytes=message.median_rank_bytes,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {**vars(self), "phases": [one.to_json() for one in self.phases]}


@dataclass(frozen=True)
class RankInfo:
    """What a rank took and wrote; times are 0 when they are not known.

    Attributes:
        rank: Rank in the save's process group.
        size_bytes: Bytes that it wrote.
        plan_s: Until its plan was decided, seconds.
        write_s: While it wrote data, seconds.
        register_s: Until its record lay on storage, seconds.
    """

    rank: int
    size_bytes: int
    plan_s: float
    write_s: float
    register_s: float

    @classmethod
    def of(cls, message: catalog_pb2.RankInfo) -> RankInfo:
        """Returns what ``message`` says."""
        return cls(
            message.rank, message.size_bytes, message.plan_ms / 1e3, message.write_ms / 1e3, message.register_ms / 1e3
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return dict(vars(self))


class Direction(StrEnum):
    """Which value of a metric is best."""

    MIN = "min"
    MAX = "max"


_DIRECTIONS = {catalog_pb2.Alias.DIRECTION_MIN: Direction.MIN, catalog_pb2.Alias.DIRECTION_MAX: Direction.MAX}


@dataclass(frozen=True)
class Alias:
    """A name for a checkpoint that can be moved.

    Attributes:
        name: Resource name.
        ref: Short form, ``project/run@best``.
        checkpoint: Resource name of what it means; empty when that is none yet.
        checkpoint_ref: Short form of the same.
        metric: Metric that it follows; empty when it is set by hand.
        direction: Which value is best; None when it is set by hand.
        protected: It is not moved or deleted, nor its checkpoint deleted, without force.
        update_time: When it was last set or moved; None for ``latest``.
        etag: Changes with what it means and how; empty for ``latest``.
    """

    name: str
    ref: str
    checkpoint: str
    checkpoint_ref: str
    metric: str
    direction: Direction | None
    protected: bool
    update_time: datetime | None
    etag: str = ""

    @classmethod
    def of(cls, message: catalog_pb2.Alias) -> Alias:
        """Returns what ``message`` says."""
        return cls(
            name=message.name,
            ref=AliasName.parse(message.name).ref,
            checkpoint=message.checkpoint,
            checkpoint_ref=CheckpointName.parse(message.checkpoint).ref if message.checkpoint else "",
            metric=message.metric,
            direction=_DIRECTIONS.get(message.direction),
            protected=message.protected,
            update_time=datetime_of(message.update_time),
            etag=message.etag,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "direction": None if self.direction is None else self.direction.value,
            "update_time": rfc3339(self.update_time),
            "etag": self.etag or None,
        }


@dataclass(frozen=True)
class StoredPolicy:
    """What ``prune`` keeps when it is told nothing.

    Attributes:
        policy: The policy; None when there is none.
        inherited: True when a part has it from its run.
        update_time: When it was stored.
        etag: Of what is stored in the very place that was asked about; of nothing, where it is inherited.
    """

    policy: RetentionPolicy | None
    inherited: bool
    update_time: datetime | None
    etag: str


@dataclass(frozen=True)
class Project:
    """A team's namespace.

    Attributes:
        name: Resource name.
        ref: Short form, ``project``.
        run_count: Its runs.
    """

    name: str
    ref: str
    run_count: int

    @classmethod
    def of(cls, message: catalog_pb2.Project) -> Project:
        """Returns what ``message`` says."""
        return cls(message.name, message.name.removeprefix("projects/"), message.run_count)

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return dict(vars(self))


@dataclass(frozen=True)
class Hold:
    """Somebody's word that they need a checkpoint for a while: it is not deleted meanwhile.

    Attributes:
        holder: Who.
        create_time: Since when.
        expire_time: Until when, unless it is extended.
    """

    holder: str
    create_time: datetime | None
    expire_time: datetime | None

    @classmethod
    def of(cls, message: types_pb2.Hold) -> Hold:
        """Returns what ``message`` says."""
        return cls(message.holder, datetime_of(message.create_time), datetime_of(message.expire_time))

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        times = {"create_time": rfc3339(self.create_time), "expire_time": rfc3339(self.expire_time)}
        return {"holder": self.holder, **times}


@dataclass(frozen=True)
class PruneDecision:
    """What becomes of a checkpoint under a retention policy.

    Attributes:
        name: Resource name; empty when no catalogue was asked.
        ref: Short form of the name.
        keep: False when it is deleted, or would be.
        reasons: Why, for people.
        size_bytes: Bytes that its extents cover.
        create_time: When it was saved.
    """

    name: str
    ref: str
    keep: bool
    reasons: tuple[str, ...]
    size_bytes: int
    create_time: datetime | None

    @classmethod
    def of(cls, message: retention_pb2.PruneDecision) -> PruneDecision:
        """Returns what ``message`` says."""
        return cls(
            message.name,
            message.ref,
            message.keep,
            tuple(message.reasons),
            message.size_bytes,
            datetime_of(message.create_time),
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {**vars(self), "reasons": list(self.reasons), "create_time": rfc3339(self.create_time)}
