"""Messages to the services' dataclasses and back; no rules.

The dataclasses refuse what is not valid; here the field's path in the request is put before theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from shardbook.core import limits
from shardbook.core.structure import BlobKind
from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook.v1 import metadata_pb2, registration_pb2, types_pb2
from shardbook_server.rpc import describing
from shardbook_server.rpc.times import microseconds, timestamp
from shardbook_server.service import types, views
from shardbook_server.service.describing import Description

E = TypeVar("E", bound=IntEnum)

_WithBlobs = (
    registration_pb2.PlanSaveRequest | registration_pb2.RegisterShardsRequest | registration_pb2.RecordCheckpointRequest
)


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """Puts ``prefix`` before the field paths of errors raised inside."""
    try:
        yield
    except ShardbookError as error:
        raise error.within(prefix) from error


# ------------------------------------------------------------------ requests


def session_start(request: registration_pb2.StartSessionRequest) -> types.SessionStart:
    """Returns what StartSession asks; an unspecified ``on_live`` means FAIL."""
    return types.SessionStart(
        run=request.run,
        part=request.part,
        incarnation=request.incarnation,
        job_id=request.job_id,
        on_live=_enum(types.OnLive, request.on_live or types.OnLive.FAIL, "on_live"),
        resumed_from=request.resumed_from,
        host=request.host,
        user=request.user,
        known_session=request.known_session if request.HasField("known_session") else None,
        age_us=microseconds(request.age, "age"),
    )


def session_key(request: registration_pb2.KeepAliveRequest) -> types.SessionKey:
    """Returns the session that KeepAlive names."""
    return types.SessionKey(request.run, request.part, request.session, request.incarnation)


def attempt_key(key: types_pb2.AttemptKey) -> types.AttemptKey:
    """Returns the attempt that a request's ``key`` names."""
    with within("key"):
        return _attempt_key(key.run, key.part, key.step, key.session, key.incarnation, key.attempt, key.world_size)


#: All ranks of a save name the same attempt, so it is judged once; what is refused is not kept.
_attempt_key = lru_cache(maxsize=1024)(types.AttemptKey)
_attempt_location = lru_cache(maxsize=1024)(types.AttemptLocation)


def attempt_location(location: types_pb2.AttemptLocation) -> types.AttemptLocation:
    """Returns a request's ``location``."""
    with within("location"):
        return _attempt_location(location.location, location.prefix)


def take_uploads(request: _WithBlobs, limit: int = limits.MAX_BLOBS) -> tuple[types.BlobUpload, ...]:
    """Returns a request's ``blobs``, at most ``limit``, not looked into, and leaves the request without them.

    A call may wait for 20 s after its blobs are stored, and its request lives as long as the call.
    """
    if len(request.blobs) > limit:
        raise InvalidArgumentError(
            f"{len(request.blobs)} blobs, the limit is {limit} a call", reason="LIMIT_EXCEEDED", field="blobs"
        )
    result = []
    for at, blob in enumerate(request.blobs):
        with within(f"blobs[{at}]"):
            result.append(types.BlobUpload(_enum(BlobKind, blob.kind, "kind"), blob.payload))
    request.ClearField("blobs")
    return tuple(result)


def plan_submission(request: registration_pb2.PlanSaveRequest) -> types.PlanSubmission:
    """Returns the plan that PlanSave submits, without its blobs."""
    return types.PlanSubmission(
        key=attempt_key(request.key),
        location=attempt_location(request.location),
        rank=request.rank,
        plan_digest=request.plan_digest,
        host=request.host,
        save_to_lowest_rank=request.save_to_lowest_rank,
    )


def registration(request: registration_pb2.RegisterShardsRequest) -> types.Registration:
    """Returns what RegisterShards registers, without its blobs."""
    key, location = attempt_key(request.key), attempt_location(request.location)
    with within("registration"):
        shards = _shards(request.registration)
    return types.Registration(key, location, shards, request.host)


def failure_report(request: registration_pb2.ReportFailureRequest) -> types.FailureReport:
    """Returns what ReportFailure reports."""
    key, location, failure = attempt_key(request.key), attempt_location(request.location), request.failure
    with within("failure"):
        rank = types.RankFailure(failure.rank, failure.host, failure.phase, failure.reason)
    return types.FailureReport(key, location, rank)


def record_request(request: registration_pb2.RecordCheckpointRequest) -> types.RecordRequest:
    """Returns what RecordCheckpoint records, without its blobs."""
    if len(request.registrations) > limits.MAX_RECORD_REGISTRATIONS:
        raise InvalidArgumentError(
            f"{len(request.registrations)} registrations, the limit is {limits.MAX_RECORD_REGISTRATIONS} a call",
            reason="LIMIT_EXCEEDED",
            field="registrations",
        )
    key, location, shards = attempt_key(request.key), attempt_location(request.location), []
    for at, message in enumerate(request.registrations):
        with within(f"registrations[{at}]"):
            shards.append(_shards(message))
    return types.RecordRequest(
        key=key,
        location=location,
        registrations=tuple(shards),
        registration_count=request.registration_count,
        complete=request.complete,
        recovered=request.recovered,
        write_time_us=_microseconds(request.write_time) if request.HasField("write_time") else None,
        metadata_header=request.metadata_header,
        description=description(request.description),
    )


def description(message: types_pb2.Description) -> Description:
    """Returns a request's ``description``."""
    with within("description"):
        return describing.description(message)


def _shards(message: registration_pb2.ShardRegistration) -> types.ShardRegistration:
    return types.ShardRegistration(
        message.rank,
        message.structure_digest,
        message.extents,
        message.volatile_properties,
        tuple(message.phase_ms),
    )


def _enum(kind: type[E], number: int, field: str) -> E:
    try:
        return kind(number)
    except ValueError:
        known = ", ".join(f"{member.value} ({member.name})" for member in kind)
        raise InvalidArgumentError(f"{number} is none of {known}", field=field) from None


def _microseconds(time: Timestamp) -> int:
    return int(time.seconds) * 1_000_000 + int(time.nanos) // 1_000


# ------------------------------------------------------------------ responses


def session_response(session: views.SessionInfo) -> registration_pb2.StartSessionResponse:
    """Returns the answer to StartSession."""
    return registration_pb2.StartSessionResponse(
        session=session.session,
        lease_ttl=duration(session.lease_ttl_s),
        current=session.current,
        latest=session.latest,
    )


def plan_response(answer: views.PlanAnswer) -> registration_pb2.PlanSaveResponse:
    """Returns the answer to PlanSave."""
    return registration_pb2.PlanSaveResponse(
        state=registration_pb2.PlanSaveResponse.State.Name(answer.state),
        unknown=blob_refs(answer.unknown),
        drop=answer.drop,
        planned_count=answer.planned_count if answer.state == views.PlanState.WAITING else 0,
    )


def progress(view: views.Progress) -> types_pb2.AttemptProgress:
    """Returns how far an attempt has come."""
    return types_pb2.AttemptProgress(
        state=state(view.counts.state),
        planned_count=view.counts.planned_count,
        registered_count=view.counts.registered_count,
        world_size=view.counts.world_size,
        missing=[types_pb2.RankHost(rank=missing.rank, host=missing.host) for missing in view.missing],
        failure=_failure(view.failure) if view.failure is not None else None,
    )


def _failure(failure: types.RankFailure) -> types_pb2.RankFailure:
    return types_pb2.RankFailure(
        rank=failure.rank, host=failure.host, phase=failure.phase, reason=_text(failure.reason)
    )


def checkpoint(view: views.CheckpointInfo) -> types_pb2.Checkpoint:
    """Returns a checkpoint."""
    return types_pb2.Checkpoint(
        name=view.name,
        ref=view.ref,
        step=view.step,
        session=view.session,
        attempt=view.attempt,
        incarnation=view.incarnation,
        world_size=view.world_size,
        state=state(view.state),
        live=view.live,
        location=types_pb2.AttemptLocation(location=view.location.location, prefix=view.location.prefix),
        tensor_count=view.tensor_count,
        chunk_count=view.chunk_count,
        bytes_entry_count=view.bytes_entry_count,
        size_bytes=view.size_bytes,
        create_time=timestamp(view.create_time_us),
        commit_time=timestamp(view.commit_time_us),
        warnings=[_text(warning) for warning in view.warnings],
        failure=_text(view.failure),
        structure_digest=view.structure_digest,
        recovered=view.recovered,
        labels=view.labels,
        metrics=view.metrics,
        aliases=view.aliases,
        note=view.note,
        writer=describing.writer(view.writer),
        timing=describing.timing(view.timing),
        other_locations=view.other_locations,
        delete_time=timestamp(view.delete_time_us),
        purge_time=timestamp(view.purge_time_us),
        data_missing=view.data_missing,
        file_deletion=types_pb2.FileDeletion.Name(view.file_deletion),
        holds=[hold(one) for one in view.holds],
        etag=view.etag,
    )


def hold(view: views.HoldView) -> types_pb2.Hold:
    """Returns a hold."""
    return types_pb2.Hold(
        holder=view.holder, create_time=timestamp(view.create_time_us), expire_time=timestamp(view.expire_time_us)
    )


def run(view: views.RunInfo) -> types_pb2.Run:
    """Returns a run."""
    return types_pb2.Run(
        name=view.name, create_time=timestamp(view.create_time_us), parts=[run_part(part) for part in view.parts]
    )


def run_part(part: views.RunPartInfo) -> types_pb2.RunPart:
    """Returns where a part of a run stands."""
    return types_pb2.RunPart(
        part=part.part,
        session=part.session,
        host=part.host,
        user=part.user,
        job_id=part.job_id,
        writing=part.writing,
        last_seen_time=timestamp(part.last_seen_time_us),
        latest=part.latest,
        latest_step=part.latest_step,
        checkpoint_count=part.checkpoint_count,
    )


def tensor(view: views.TensorView) -> metadata_pb2.TensorInfo:
    """Returns one entry of a checkpoint."""
    return metadata_pb2.TensorInfo(
        fqn=view.fqn,
        dtype=view.dtype,
        shape=view.shape,
        chunk_count=view.chunk_count,
        size_bytes=view.size_bytes,
        tensor=view.tensor,
    )


def metadata_response(view: views.MetadataView) -> metadata_pb2.GetMetadataResponse:
    """Returns one message of a metadata stream."""
    match view:
        case views.HeaderView():
            header = metadata_pb2.MetadataHeader(
                checkpoint=checkpoint(view.checkpoint), head=view.head, metadata_header=view.metadata_header
            )
            return metadata_pb2.GetMetadataResponse(header=header)
        case views.SegmentView():
            segment = metadata_pb2.ExtentSegment(first_rank=view.first_rank, payload=view.payload)
            return metadata_pb2.GetMetadataResponse(extents=segment)
        case views.BlockView():
            return metadata_pb2.GetMetadataResponse(block=metadata_pb2.MetadataBlock(entries=view.entries))


def query_payload(request: metadata_pb2.QueryChunksRequest) -> bytes:
    """Returns what QueryChunks asks, not looked into.

    Raises:
        InvalidArgumentError: It is beyond the limit.
    """
    if len(request.wanted) > limits.MAX_QUERY_BYTES:
        raise InvalidArgumentError(
            f"{len(request.wanted)} bytes, the limit is {limits.MAX_QUERY_BYTES} a query: ask in parts",
            reason="LIMIT_EXCEEDED",
            field="wanted",
        )
    return request.wanted


def query_response(view: views.QueryView) -> metadata_pb2.QueryChunksResponse:
    """Returns a page of the answer to QueryChunks."""
    return metadata_pb2.QueryChunksResponse(
        checkpoint=checkpoint(view.checkpoint),
        found=view.found,
        metadata_header=view.metadata_header,
        head=view.head,
        next_page_token=view.next_page_token,
        found_digest=view.found_digest,
        places=view.places,
    )


def blob_refs(refs: Sequence[types.BlobRef]) -> list[types_pb2.BlobRef]:
    """Returns the blobs that a sender has to send."""
    return [types_pb2.BlobRef(kind=types_pb2.BlobKind.Name(ref.kind), digest=ref.digest) for ref in refs]


def state(value: views.CheckpointState) -> str:
    """Returns the name of a checkpoint's state; the numbers are the same on both sides."""
    return types_pb2.CheckpointState.Name(value)


def duration(value_s: float) -> Duration:
    """Returns a duration, to the microsecond."""
    value_us = round(value_s * 1_000_000)
    return Duration(seconds=value_us // 1_000_000, nanos=value_us % 1_000_000 * 1_000)


def _text(text: str) -> str:
    """Returns a text that protobuf can carry: lone surrogates, which fqns may hold, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
