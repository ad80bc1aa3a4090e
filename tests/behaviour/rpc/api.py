"""What the tests of this folder share: a server in process, stubs, refusals as typed errors, ranks with payloads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_status import rpc_status

from shardbook.core.dtype import dtype_code
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.names import prefix_of
from shardbook.core.structure import BlobKind, FileName, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import EntryKind, TensorTable, encode_table
from shardbook.errors import DOMAIN, FieldViolation, ShardbookError, error_class
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook.v1.catalog_pb2_grpc import CatalogServiceStub
from shardbook.v1.metadata_pb2_grpc import MetadataServiceStub
from shardbook.v1.registration_pb2_grpc import RegistrationServiceStub
from shardbook_server.settings import Settings

#: Deadline of every call here: a test that hangs fails.
DEADLINE_S = 30.0


def settings_in(folder: Path, **changes: object) -> Settings:
    """Returns settings of a server on a free port and a database of its own, without HTTP."""
    values = {
        "listen": "127.0.0.1:0",
        "http_listen": "",
        "database_url": f"sqlite:///{folder / 'shardbook.db'}",
        "drain_s": 5,
    }
    return Settings.model_validate(values | changes)


@dataclass(frozen=True)
class Api:
    """Stubs over one channel."""

    address: str
    channel: grpc.Channel
    registration: RegistrationServiceStub
    metadata: MetadataServiceStub
    catalog: CatalogServiceStub
    health: Any


@contextmanager
def api_of(address: str) -> Iterator[Api]:
    """Connects to a server; retries are off, so that a test sees what the server said."""
    options = [
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(address, options=options) as channel:
        yield Api(
            address,
            channel,
            RegistrationServiceStub(channel),
            MetadataServiceStub(channel),
            CatalogServiceStub(channel),
            health_pb2_grpc.HealthStub(channel),
        )


def refusal(call: Callable[..., object], *args: object) -> ShardbookError:
    """Returns the typed error that a call ends with, which is never INTERNAL or UNKNOWN and always has ErrorInfo."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    return error_of(caught.value)


def error_of(error: grpc.RpcError) -> ShardbookError:
    """Returns the typed error of a failed call, read as any client of google.rpc.Status would."""
    # An RpcError of the sync stack is a Call too, which its types do not say.
    call: Any = error
    status = rpc_status.from_call(call)
    code: grpc.StatusCode = call.code()
    assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), call.details()
    assert status is not None, f"{code} without details: {call.details()}"
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    delay_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        if detail.Unpack(retry):
            delay_s = retry.retry_delay.ToMilliseconds() / 1000
    assert DOMAIN == info.domain
    cls = error_class(code.name, info.reason)
    assert code.name == cls.status
    violations = [FieldViolation(v.field, v.description) for v in request.field_violations]
    return cls(status.message, reason=info.reason, violations=violations, metadata=info.metadata, retry_delay_s=delay_s)


def fields(error: ShardbookError) -> list[str]:
    """Returns the field paths that an error names."""
    return [violation.field for violation in error.violations]


def wait_until(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Waits for something that another thread is about to do."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


# ------------------------------------------------------------------ payloads


@dataclass(frozen=True)
class Shard:
    """A box of a tensor: the whole of it, or a part."""

    fqn: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: str = "float32"


def row(fqn: str, rank: int, world_size: int, rows: int = 4, columns: int = 3, dtype: str = "float32") -> Shard:
    """Returns a rank's rows of a tensor that all ranks share evenly."""
    return Shard(fqn, (rows * world_size, columns), (rows * rank, 0), (rows, columns), dtype)


@dataclass(frozen=True)
class Payload:
    """What a rank sends: digests, and blobs by (kind, digest)."""

    plan_digest: bytes
    structure_digest: bytes
    extents: bytes
    blobs: Mapping[tuple[int, bytes], types_pb2.Blob]


def payload(shards: Sequence[Shard], *, drop: Sequence[int] = ()) -> Payload:
    """Returns the payload of a rank that plans these 2-D shards and writes all but the dropped ones."""
    count = len(shards)
    matrix = {name: np.array([getattr(s, name) for s in shards], np.int64).reshape(count, -1) for name in _GEOMETRY}
    whole = [shard.shape == shard.size for shard in shards]
    table = TensorTable(
        fqns=tuple(shard.fqn for shard in shards),
        kinds=np.array([EntryKind.TENSOR if w else EntryKind.SHARD for w in whole], np.uint8),
        dtypes=np.array([dtype_code(shard.dtype) for shard in shards], np.uint8),
        layouts=np.zeros(count, np.uint8),
        memory_formats=np.zeros(count, np.uint8),
        ndims=np.full(count, matrix["shape"].shape[1], np.int64),
        shapes=matrix["shape"],
        key_paths=None,
    )
    plan = RankPlan(table, np.arange(count), matrix["offset"], matrix["size"])
    kept = np.array([at for at in range(count) if at not in drop], np.int64)
    files = (FileName(True, "0.distcp"),) if len(kept) else ()
    structure = RankStructure(
        plan,
        kept,
        files,
        np.array([len(kept)] if files else [], np.int64),
        np.arange(len(kept)),
        np.full(len(kept), 64),
    )
    table_blob = encode_table(table)
    plan_blob = encode_plan(plan, table_blob.digest)
    structure_blob = encode_structure(structure, plan_blob.digest)
    encoded = {BlobKind.TABLE: table_blob, BlobKind.PLAN: plan_blob, BlobKind.STRUCTURE: structure_blob}
    blobs = {
        (int(kind), blob.digest): types_pb2.Blob(kind=types_pb2.BlobKind.Name(kind), payload=blob.payload)
        for kind, blob in encoded.items()
    }
    return Payload(plan_blob.digest, structure_blob.digest, encode_extents(Extents()), blobs)


_GEOMETRY = ("shape", "offset", "size")


@dataclass(frozen=True)
class Job:
    """A job with a session: makes requests and sends what the server asks for."""

    api: Api
    run: str
    world_size: int = 2
    session: int = 0
    incarnation: bytes = field(default_factory=lambda: os.urandom(16))

    @classmethod
    def start(cls, api: Api, run: str, world_size: int = 2, **request: object) -> Job:
        """Starts a session."""
        job = cls(api, run, world_size)
        return replace(job, session=job.start_session(**request).session)

    def start_session(self, **request: object) -> pb.StartSessionResponse:
        """Starts this job's session, or asks for it again."""
        values = {"run": self.run, "incarnation": self.incarnation, "on_live": pb.ON_LIVE_TAKEOVER} | request
        return self.api.registration.StartSession(pb.StartSessionRequest(**values), timeout=DEADLINE_S)  # type: ignore[arg-type]

    def key(self, step: int = 1, attempt: int = 1) -> types_pb2.AttemptKey:
        """Returns the key of an attempt."""
        return types_pb2.AttemptKey(
            run=self.run,
            step=step,
            session=self.session,
            incarnation=self.incarnation,
            attempt=attempt,
            world_size=self.world_size,
        )

    def location(self, step: int = 1, attempt: int = 1) -> types_pb2.AttemptLocation:
        """Returns where the attempt's files are."""
        return types_pb2.AttemptLocation(location=f"/ckpt/step-{step}", prefix=prefix_of(self.incarnation, attempt))

    def plan_request(self, rank: int, what: Payload, step: int = 1, wait_s: float = 0) -> pb.PlanSaveRequest:
        """Returns a plan by digest."""
        request = pb.PlanSaveRequest(
            key=self.key(step), location=self.location(step), rank=rank, plan_digest=what.plan_digest, host=f"n{rank}"
        )
        request.wait.FromMilliseconds(round(wait_s * 1000))
        return request

    def plan(self, rank: int, what: Payload, step: int = 1, wait_s: float = 0) -> pb.PlanSaveResponse:
        """Plans, sending what the server lacks."""
        request = self.plan_request(rank, what, step, wait_s)
        response = self.api.registration.PlanSave(request, timeout=DEADLINE_S)
        if response.state == pb.PlanSaveResponse.STATE_STRUCTURE_UNKNOWN:
            request.blobs.extend(what.blobs[ref.kind, ref.digest] for ref in response.unknown)
            request.blobs.extend(self._below(what, request.blobs))
            response = self.api.registration.PlanSave(request, timeout=DEADLINE_S)
        return response

    def register_request(self, rank: int, what: Payload, step: int = 1) -> pb.RegisterShardsRequest:
        """Returns a registration by digest."""
        registration = pb.ShardRegistration(rank=rank, structure_digest=what.structure_digest, extents=what.extents)
        return pb.RegisterShardsRequest(
            key=self.key(step), location=self.location(step), registration=registration, host=f"n{rank}"
        )

    def register(self, rank: int, what: Payload, step: int = 1) -> pb.RegisterShardsResponse:
        """Registers, sending what the server lacks."""
        request = self.register_request(rank, what, step)
        response = self.api.registration.RegisterShards(request, timeout=DEADLINE_S)
        if response.unknown:
            request.blobs.extend(what.blobs.values())
            response = self.api.registration.RegisterShards(request, timeout=DEADLINE_S)
        return response

    @staticmethod
    def _below(what: Payload, sent: Sequence[types_pb2.Blob]) -> list[types_pb2.Blob]:
        """Returns the blobs of a plan that were not asked for by name: its table."""
        table = types_pb2.BLOB_KIND_TABLE
        kinds = {blob.kind for blob in sent}
        return [] if table in kinds else [blob for (kind, _), blob in what.blobs.items() if kind == table]

    def save(self, step: int = 1, world: Sequence[Payload] | None = None) -> types_pb2.Checkpoint:
        """Registers every rank and commits."""
        for rank, what in enumerate(world or self.rows()):
            assert not self.register(rank, what, step).unknown
        return self.commit(step)

    def commit(self, step: int = 1, wait_s: float = 0) -> types_pb2.Checkpoint:
        """Commits."""
        request = pb.CommitCheckpointRequest(key=self.key(step))
        request.wait.FromMilliseconds(round(wait_s * 1000))
        return self.api.registration.CommitCheckpoint(request, timeout=DEADLINE_S).checkpoint

    def progress(self, step: int = 1, until: int = 0, wait_s: float = 0) -> pb.GetCheckpointProgressResponse:
        """Asks how far an attempt has come."""
        request = pb.GetCheckpointProgressRequest(key=self.key(step), until=until)  # type: ignore[arg-type]
        request.wait.FromMilliseconds(round(wait_s * 1000))
        return self.api.registration.GetCheckpointProgress(request, timeout=DEADLINE_S)

    def rows(self, fqn: str = "w") -> list[Payload]:
        """Returns payloads of a tensor that the ranks share evenly by rows."""
        return [payload([row(fqn, rank, self.world_size)]) for rank in range(self.world_size)]
