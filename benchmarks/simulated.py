"""Simulated ranks: real registrations of a workload, sent by real gRPC calls to a real server process.

The payloads are what ``shardbook.dcp`` makes of the same plans; the calls follow the client's protocol: the digest
first, the blobs when the server says that it lacks them. Every call is a unary call of its own; nothing is batched
on the client's side. Client and server share the machine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.common import cpu_s, peak_rss_bytes
from benchmarks.crowd import Member
from benchmarks.workload import Workload
from shardbook.core.dtype import dtype_code
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.limits import SMALL_BLOB_BYTES
from shardbook.core.names import prefix_of
from shardbook.core.structure import BlobKind, FileName, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import EntryKind, TensorTable, encode_table
from shardbook.v1 import registration_pb2, registration_pb2_grpc, types_pb2

#: Calls that the simulated ranks have under way at once.
IN_FLIGHT = 64
_MESSAGE_BYTES = 16 << 20
_PAGE_COUNTS = ("page_count", "freelist_count", "page_size")


@dataclass(frozen=True)
class RankPayload:
    """What one rank sends: a registration, and the blobs it names for a server that lacks them."""

    registration: registration_pb2.ShardRegistration
    blobs: tuple[types_pb2.Blob, ...]
    plan_digest: bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of the registration when nothing else has to be sent: digest, extents, properties, times of phases."""
        own = self.registration
        times = registration_pb2.ShardRegistration(phase_ms=own.phase_ms)
        return len(own.structure_digest) + len(own.extents) + len(own.volatile_properties) + times.ByteSize()


def members_of(workload: Workload) -> list[Member]:
    """Returns the ranks of ``workload`` as client processes take them."""
    return [
        Member(
            payload.registration.rank,
            payload.registration.SerializeToString(),
            payload.plan_digest,
            tuple(blob.SerializeToString() for blob in payload.blobs),
        )
        for payload in rank_payloads(workload)
    ]


def rank_plan(workload: Workload, rank: int) -> RankPlan:
    """Returns the boxes of a rank of ``workload``: one of each tensor."""
    return RankPlan(
        _table(workload), np.arange(workload.tensors, dtype=np.int64), workload.offsets(rank), workload.sizes
    )


def rank_structures(workload: Workload) -> Iterator[RankStructure]:
    """Yields what every rank of ``workload`` writes: all of its tensors' chunks, one after the other, in one file."""
    first = rank_plan(workload, 0)
    rows = first.entry
    files = (FileName(True, "0.distcp"),)
    for rank in range(workload.ranks):
        plan = RankPlan(first.table, rows, workload.offsets(rank), workload.sizes)
        yield RankStructure(plan, rows, files, np.array([len(rows)]), rows, workload.lengths)


def rank_payloads(workload: Workload) -> list[RankPayload]:
    """Returns the registrations of every rank of ``workload``."""
    extents = encode_extents(Extents())
    payloads = []
    table_blob = encode_table(_table(workload))
    for rank, structure in enumerate(rank_structures(workload)):
        plan_blob = encode_plan(structure.plan, table_blob.digest)
        structure_blob = encode_structure(structure, plan_blob.digest)
        blobs = tuple(
            types_pb2.Blob(kind=int(kind), payload=blob.payload)  # type: ignore[arg-type]
            for kind, blob in (
                (BlobKind.TABLE, table_blob),
                (BlobKind.PLAN, plan_blob),
                (BlobKind.STRUCTURE, structure_blob),
            )
        )
        registration = registration_pb2.ShardRegistration(
            rank=rank, structure_digest=structure_blob.digest, extents=extents
        )
        payloads.append(RankPayload(registration, blobs, plan_blob.digest))
    return payloads


def _table(workload: Workload) -> TensorTable:
    count = workload.tensors
    return TensorTable(
        fqns=workload.fqns,
        kinds=np.full(count, EntryKind.SHARD, dtype=np.uint8),
        dtypes=np.full(count, dtype_code("bfloat16"), dtype=np.uint8),
        layouts=np.zeros(count, dtype=np.uint8),
        memory_formats=np.zeros(count, dtype=np.uint8),
        ndims=np.full(count, 2, dtype=np.int64),
        shapes=workload.shapes,
        key_paths=tuple((fqn, tuple(fqn.split(".", 1))) for fqn in workload.fqns),
    )


@dataclass(frozen=True)
class Server:
    """A server process.

    Attributes:
        address: Where it answers.
        process: The process.
        batches: File with a line for each of its batches, when it was asked to write one down: see ``batch_sizes``.
    """

    address: str
    process: subprocess.Popen[bytes]
    batches: Path | None = None

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident memory so far."""
        return peak_rss_bytes(self.process.pid)

    @property
    def cpu_s(self) -> float:
        """Processor time so far."""
        return cpu_s(self.process.pid)

    def batch_sizes(self, kind: str, skip: int = 0) -> list[int]:
        """Returns how large its batches of ``kind`` were, in the order it ran them, without the first ``skip``."""
        assert self.batches is not None
        lines = [line.split() for line in self.batches.read_text().splitlines()]
        return [int(count) for found, count in lines if found == kind][skip:]


def make_database(database: Path | str) -> None:
    """Makes an empty database: a file of SQLite, or a URL."""
    command = [sys.executable, "-c", "from shardbook_server.cli import main; main()", "db", "upgrade"]
    subprocess.run(command, env=_environment(database, 0), check=True, stdout=subprocess.DEVNULL)


def _environment(database: Path | str, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "SHARDBOOK_LISTEN": f"127.0.0.1:{port}",
        "SHARDBOOK_HTTP_LISTEN": "off",
        "SHARDBOOK_DATABASE_URL": database if isinstance(database, str) else f"sqlite:///{database}",
        "SHARDBOOK_LOG_LEVEL": os.environ.get("BENCH_LOG", "error"),
    }


def stored_bytes(database: Path) -> int:
    """Returns the bytes of a database's pages that hold something; no server may be running on it."""
    with closing(sqlite3.connect(database)) as connection:
        return _page_bytes(connection)[0]


def held_bytes(database: Path) -> tuple[int, int]:
    """Returns the bytes of a database's pages that hold something, and of free ones, beside a server that runs."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return _page_bytes(connection)


def _page_bytes(connection: sqlite3.Connection) -> tuple[int, int]:
    pages, free, page_bytes = (int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in _PAGE_COUNTS)
    return (pages - free) * page_bytes, free * page_bytes


@contextmanager
def running_server(database: Path | str, port: int, *, batches: Path | None = None) -> Iterator[Server]:
    """Starts ``shardbook-server serve`` on a migrated database; stops it with SIGTERM.

    Args:
        database: A file of SQLite, or a URL.
        port: Where it listens.
        batches: Where it writes down how large its batches are; then it begins with the 1,024 open files of a shell.
    """
    environment = _environment(database, port)
    command = [sys.executable, "-c", "from shardbook_server.cli import main; main()"]
    if batches is not None:
        command = [sys.executable, "-m", "benchmarks.observed", str(batches)]
    process = subprocess.Popen([*command, "serve"], env=environment, stdout=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
        yield Server(f"127.0.0.1:{port}", process, batches)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


class Ranks:
    """All ranks of one run, saving through one server from one client process. Not thread-safe.

    Args:
        channel: The way to the server.
        payloads: What the ranks register, by rank.
        run: Resource name of the run.
        known: True when these processes have registered the same structures before; a restart forgets that.
        planning: Whether they ask what to write before they register it.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        payloads: Sequence[RankPayload],
        run: str,
        *,
        known: bool = False,
        planning: bool = False,
    ) -> None:
        # The stubs' types are those of the synchronous stack; over an aio channel every call is awaitable.
        self._stub: Any = registration_pb2_grpc.RegistrationServiceStub(channel)
        self._health: Any = health_pb2_grpc.HealthStub(channel)
        self._payloads = payloads
        self._run = run
        self._incarnation = os.urandom(16)
        self._session = 0
        self._known = known
        self._planning = planning
        #: Bytes of the requests of the last save, and how long its commit took, seconds.
        self.sent_bytes = 0
        self.commit_s = 0.0

    async def start(self) -> None:
        """Starts the session."""
        reply = await self._stub.StartSession(
            registration_pb2.StartSessionRequest(
                run=self._run, incarnation=self._incarnation, on_live=registration_pb2.ON_LIVE_TAKEOVER
            )
        )
        self._session = reply.session

    async def save(self, step: int) -> float:
        """Plans where asked to, registers every rank and commits; returns the seconds until the committed answer."""
        key = types_pb2.AttemptKey(
            run=self._run,
            step=step,
            session=self._session,
            incarnation=self._incarnation,
            attempt=1,
            world_size=len(self._payloads),
        )
        location = types_pb2.AttemptLocation(location=f"/ckpt/step-{step}", prefix=prefix_of(self._incarnation, 1))
        self.sent_bytes = 0
        begin = time.perf_counter()
        if self._planning:
            # All at once: each waits until the last has come.
            await asyncio.gather(*(self._plan(key, location, payload) for payload in self._payloads))
        await self._each(lambda payload: self._register(key, location, payload))
        registered = time.perf_counter()
        await self._stub.CommitCheckpoint(registration_pb2.CommitCheckpointRequest(key=key), timeout=300)
        end = time.perf_counter()
        self._known = True
        self.commit_s = end - registered
        return end - begin

    async def empty_calls(self) -> float:
        """Returns the seconds of as many empty calls as a warm save makes: the floor."""
        begin = time.perf_counter()
        for _ in range(2 if self._planning else 1):
            await self._each(lambda _: self._health.Check(health_pb2.HealthCheckRequest()))
        await self._health.Check(health_pb2.HealthCheckRequest())
        return time.perf_counter() - begin

    async def _register(
        self, key: types_pb2.AttemptKey, location: types_pb2.AttemptLocation, payload: RankPayload
    ) -> None:
        request = registration_pb2.RegisterShardsRequest(
            key=key,
            location=location,
            registration=payload.registration,
        )
        # With planning, tables and plans are there already.
        new = [blob for blob in payload.blobs if not self._planning or blob.kind == int(BlobKind.STRUCTURE)]
        await self._send(self._stub.RegisterShards, request, new, payload)

    async def _plan(self, key: types_pb2.AttemptKey, location: types_pb2.AttemptLocation, payload: RankPayload) -> None:
        request = registration_pb2.PlanSaveRequest(
            key=key,
            location=location,
            rank=payload.registration.rank,
            plan_digest=payload.plan_digest,
            wait=Duration(seconds=20),
        )
        new = [blob for blob in payload.blobs if blob.kind != int(BlobKind.STRUCTURE)]
        while True:
            reply = await self._send(self._stub.PlanSave, request, new, payload)
            if reply.state == registration_pb2.PlanSaveResponse.STATE_DECIDED:
                return

    async def _send(self, call: Any, request: Any, new: Sequence[types_pb2.Blob], payload: RankPayload) -> Any:
        """Makes a call until the server lacks no blob for it; ``new`` are those that it may not have met before."""
        del request.blobs[:]
        if not self._known:
            # As the client does: what is new to this process and costs less than a round trip is sent unasked.
            request.blobs.extend(blob for blob in new if len(blob.payload) <= SMALL_BLOB_BYTES)
        self.sent_bytes += request.ByteSize()
        reply = await call(request)
        while reply.unknown:
            wanted = {ref.kind for ref in reply.unknown}
            del request.blobs[:]
            request.blobs.extend(blob for blob in payload.blobs if blob.kind in wanted)
            self.sent_bytes += request.ByteSize()
            reply = await call(request)
        return reply

    async def _each(self, call: Callable[[RankPayload], Awaitable[object]]) -> None:
        waiting = iter(self._payloads)

        async def worker() -> None:
            for payload in waiting:
                await call(payload)

        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """Yields a channel to ``address`` that is ready."""
    options = [
        ("grpc.max_send_message_length", _MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        await channel.channel_ready()
        yield channel
