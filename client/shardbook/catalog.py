"""What the catalogue says about runs and checkpoints, as plain values. Frozen, so they may be shared by threads.

``to_json`` of each returns the object that the command line prints with ``--json``. Its schema is stable: keys are
only ever added. Times are RFC 3339 in UTC, missing ones null; sizes are bytes; digests and incarnations are hex.

Nothing here needs numpy, nor does a command that only lists: ``shardbook.stored_metadata`` has what does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from shardbook._times import datetime_of, rfc3339
from shardbook.core.description import decode_note
from shardbook.core.names import CheckpointName, RunName
from shardbook.core.texts import decode_name
from shardbook.descriptions import Hold, SaveTiming, Writer
from shardbook.v1 import metadata_pb2, types_pb2

Json = dict[str, Any]


class CheckpointState(StrEnum):
    """Life of a checkpoint."""

    UNKNOWN = "UNKNOWN"
    OPEN = "OPEN"
    COMMITTED = "COMMITTED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"
    DELETED = "DELETED"


_STATES = {
    types_pb2.CHECKPOINT_STATE_OPEN: CheckpointState.OPEN,
    types_pb2.CHECKPOINT_STATE_COMMITTED: CheckpointState.COMMITTED,
    types_pb2.CHECKPOINT_STATE_FAILED: CheckpointState.FAILED,
    types_pb2.CHECKPOINT_STATE_EXPIRED: CheckpointState.EXPIRED,
    types_pb2.CHECKPOINT_STATE_DELETED: CheckpointState.DELETED,
}


class FileDeletion(StrEnum):
    """How far the deletion of a checkpoint's data files is."""

    NONE = "none"
    #: Begun; some of them may be gone.
    BEGUN = "begun"
    #: All are gone but those that other checkpoints share.
    DONE = "done"


_FILE_DELETIONS = {
    types_pb2.FILE_DELETION_BEGUN: FileDeletion.BEGUN,
    types_pb2.FILE_DELETION_DONE: FileDeletion.DONE,
}


@dataclass(frozen=True)
class Checkpoint:
    """One attempt to save and what became of it.

    Attributes:
        name: Resource name.
        ref: Short form, ``project/run@1500``.
        part: Part of the run.
        step: Training step.
        session: Session that wrote it; 0 when it was written offline.
        attempt: Attempt within the session.
        incarnation: Incarnation that wrote it, hex.
        world_size: Ranks that wrote it.
        state: Where it is in its life.
        live: True for the one committed checkpoint that ``@step`` means.
        recovered: True when it was recorded after the fact, by sync or import.
        location: ``store:relative/path``, URL or absolute path of its directory.
        prefix: Directory of its data files below the location; empty for the location itself.
        tensor_count: Distinct tensors; 0 until it is committed.
        chunk_count: Distinct chunks; 0 until it is committed.
        bytes_entry_count: Entries that are no tensors; 0 until it is committed.
        size_bytes: Bytes its extents cover; 0 until it is committed.
        create_time: When its first rank spoke.
        commit_time: When it was committed.
        warnings: Facts worth a person's attention.
        failure: Why it failed; empty unless it did.
        structure_digest: Digest of its structure, hex; empty until it is committed.
        labels: What people and jobs call it, by key.
        metrics: Measured values, by name.
        aliases: Aliases that mean it now, ``latest`` among them.
        note: A person's or job's JSON value; None for none, and in listings.
        writer: Who and what wrote it; empty in listings.
        timing: How long it took and what the ranks wrote; None when it is not known, and in listings.
        delete_time: When it was deleted.
        purge_time: When what the catalogue knows of it may be dropped; None unless it is deleted, and once it is.
        data_missing: True when data files are known to be lost.
        file_deletion: How far the deletion of its data files is.
        holds: Who holds it now; empty in listings.
        other_locations: Where it is, too; readers try them in this order behind ``location``.
        etag: Changes with its state and all that people can change of it; empty in listings.
    """

    name: str
    ref: str
    part: str
    step: int
    session: int
    attempt: int
    incarnation: str
    world_size: int
    state: CheckpointState
    live: bool
    recovered: bool
    location: str
    prefix: str
    tensor_count: int
    chunk_count: int
    bytes_entry_count: int
    size_bytes: int
    create_time: datetime | None
    commit_time: datetime | None
    warnings: tuple[str, ...]
    failure: str
    structure_digest: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    note: Any = field(default=None, hash=False)
    writer: Writer = Writer()  # noqa: RUF009 - frozen
    timing: SaveTiming | None = None
    delete_time: datetime | None = None
    purge_time: datetime | None = None
    data_missing: bool = False
    file_deletion: FileDeletion = FileDeletion.NONE
    holds: tuple[Hold, ...] = ()
    other_locations: tuple[str, ...] = ()
    etag: str = ""

    @property
    def locations(self) -> tuple[str, ...]:
        """Where it is, in the order in which readers try them."""
        return self.location, *self.other_locations

    @classmethod
    def of(cls, message: types_pb2.Checkpoint) -> Checkpoint:
        """Returns what ``message`` says."""
        return cls(
            name=message.name,
            ref=message.ref,
            part=CheckpointName.parse(message.name).part.part,
            step=message.step,
            session=message.session,
            attempt=message.attempt,
            incarnation=message.incarnation.hex(),
            world_size=message.world_size,
            state=_STATES.get(message.state, CheckpointState.UNKNOWN),
            live=message.live,
            recovered=message.recovered,
            location=message.location.location,
            prefix=message.location.prefix,
            tensor_count=message.tensor_count,
            chunk_count=message.chunk_count,
            bytes_entry_count=message.bytes_entry_count,
            size_bytes=message.size_bytes,
            create_time=datetime_of(message.create_time),
            commit_time=datetime_of(message.commit_time),
            warnings=tuple(message.warnings),
            failure=message.failure,
            structure_digest=message.structure_digest.hex(),
            labels=dict(sorted(message.labels.items())),
            metrics=dict(sorted(message.metrics.items())),
            aliases=tuple(message.aliases),
            note=decode_note(message.note),
            writer=Writer.of(message.writer),
            timing=SaveTiming.of(message.timing) if message.HasField("timing") else None,
            delete_time=datetime_of(message.delete_time),
            purge_time=datetime_of(message.purge_time),
            data_missing=message.data_missing,
            file_deletion=_FILE_DELETIONS.get(message.file_deletion, FileDeletion.NONE),
            holds=tuple(map(Hold.of, message.holds)),
            other_locations=tuple(message.other_locations),
            etag=message.etag,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "state": self.state.value,
            "create_time": rfc3339(self.create_time),
            "commit_time": rfc3339(self.commit_time),
            "warnings": list(self.warnings),
            "labels": dict(self.labels),
            "metrics": dict(self.metrics),
            "aliases": list(self.aliases),
            "writer": self.writer.to_json(),
            "timing": None if self.timing is None else self.timing.to_json(),
            "delete_time": rfc3339(self.delete_time),
            "purge_time": rfc3339(self.purge_time),
            "file_deletion": self.file_deletion.value,
            "holds": [hold.to_json() for hold in self.holds],
            "other_locations": list(self.other_locations),
            "etag": self.etag or None,
        }


@dataclass(frozen=True)
class RunPart:
    """Where one part of a run stands.

    Attributes:
        part: Name; ``default`` unless the save named one.
        session: Number of its current session; 0 when only offline saves were recorded.
        host: Host that started the session.
        user: User that started it.
        job_id: Scheduler's id of the job that holds it; may be empty.
        writing: True while the session's lease is alive.
        last_seen_time: When the session was last heard of.
        latest: Resource name of the checkpoint that ``@latest`` means; empty when none.
        latest_step: Its step; None when there is none.
        checkpoint_count: Live committed checkpoints.
    """

    part: str
    session: int
    host: str
    user: str
    job_id: str
    writing: bool
    last_seen_time: datetime | None
    latest: str
    latest_step: int | None
    checkpoint_count: int

    @classmethod
    def of(cls, message: types_pb2.RunPart) -> RunPart:
        """Returns what ``message`` says."""
        return cls(
            part=message.part,
            session=message.session,
            host=message.host,
            user=message.user,
            job_id=message.job_id,
            writing=message.writing,
            last_seen_time=datetime_of(message.last_seen_time),
            latest=message.latest,
            latest_step=message.latest_step if message.latest else None,
            checkpoint_count=message.checkpoint_count,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {**vars(self), "last_seen_time": rfc3339(self.last_seen_time)}


@dataclass(frozen=True)
class Run:
    """A training run and where it stands.

    Attributes:
        name: Resource name.
        ref: Short form, ``project/run``.
        create_time: When its first session started.
        parts: Its parts, in alphabetical order.
    """

    name: str
    ref: str
    create_time: datetime | None
    parts: tuple[RunPart, ...]

    @classmethod
    def of(cls, message: types_pb2.Run) -> Run:
        """Returns what ``message`` says."""
        return cls(
            name=message.name,
            ref=RunName.parse(message.name).ref,
            create_time=datetime_of(message.create_time),
            parts=tuple(RunPart.of(part) for part in message.parts),
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            "name": self.name,
            "ref": self.ref,
            "create_time": rfc3339(self.create_time),
            "parts": [part.to_json() for part in self.parts],
        }


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a checkpoint.

    Attributes:
        fqn: Fully qualified name; any ``str``, also with NUL and lone surrogates.
        is_tensor: False for bytes entries.
        dtype: Name such as ``bfloat16``; empty when it is no tensor.
        shape: Sizes, elements; empty for a scalar and when it is no tensor.
        chunk_count: Chunks the tensor is cut into; 1 when it is no tensor.
        size_bytes: Bytes its extents cover.
    """

    fqn: str
    is_tensor: bool
    dtype: str
    shape: tuple[int, ...]
    chunk_count: int
    size_bytes: int

    @classmethod
    def of(cls, message: metadata_pb2.TensorInfo) -> TensorInfo:
        """Returns what ``message`` says."""
        return cls(
            fqn=decode_name(message.fqn),
            is_tensor=message.tensor,
            dtype=message.dtype,
            shape=tuple(message.shape),
            chunk_count=message.chunk_count,
            size_bytes=message.size_bytes,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {**vars(self), "shape": list(self.shape)}
