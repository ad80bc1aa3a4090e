"""A fleet of simulated ranks in a few client processes: planning, registering and waiting as ``shardbook.dcp`` does.

Every rank makes the calls of a real one (PlanSave until decided, RegisterShards, and waits until the commit), each a
unary gRPC call of its own with the payload that the client library makes; the coordinator commits. What ranks do on
their own side between the calls, encoding what they keep, is done outside the time: real ranks do that in parallel.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.layouts import Layout, written
from benchmarks.routes import Routes
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.limits import SMALL_BLOB_BYTES
from shardbook.core.names import prefix_of
from shardbook.core.structure import BlobKind, encode_plan, encode_structure
from shardbook.core.table import Encoded, encode_table
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import registration_pb2_grpc, types_pb2

#: Client processes.
PROCESSES: Final = 2
#: Calls other than waits that a process has under way at once.
IN_FLIGHT: Final = 256
_WAIT: Final = Duration(seconds=20)
_DEADLINE_S: Final = 600.0
_EXTENTS: Final = encode_extents(Extents())


@dataclass
class Step:
    """One phase of all ranks of a process.

    Attributes:
        sent_bytes: Bytes of the requests.
        calls: Calls made.
    """

    sent_bytes: int = 0
    calls: int = 0

    def __iadd__(self, other: Step) -> Step:
        self.sent_bytes += other.sent_bytes
        self.calls += other.calls
        return self


@dataclass
class _Rank:
    """What a rank knows between calls."""

    number: int
    table: Encoded
    plan: Encoded
    known: set[bytes] = field(default_factory=set)
    structure: Encoded | None = None
    drop: bytes = b""

    def blobs(self) -> Iterator[tuple[BlobKind, Encoded]]:
        """What it has to send, tables first."""
        yield BlobKind.TABLE, self.table
        yield BlobKind.PLAN, self.plan
        if self.structure is not None:
            yield BlobKind.STRUCTURE, self.structure


class _Part:
    """The ranks of one process. Its methods are what ``Fleet`` may ask for."""

    def __init__(self, layout: Layout, ranks: range, routes: Routes) -> None:
        self._layout = layout
        self._groups = list(routes.groups(ranks))
        tables = {id(stage.table): encode_table(stage.table) for stage in layout.stage}
        plans: dict[int, tuple[Encoded, Encoded]] = {}
        self._ranks: list[_Rank] = []
        for number in ranks:
            at = number % layout.distinct_plans
            if at not in plans:
                plan = layout.plan(number)
                table = tables[id(plan.table)]
                plans[at] = table, encode_plan(plan, table.digest)
            self._ranks.append(_Rank(number, *plans[at]))
        self._stubs: list[Any] = []
        self._health: list[Any] = []
        self._channels: list[grpc.aio.Channel] = []
        self._key = types_pb2.AttemptKey()
        self._location = types_pb2.AttemptLocation()
        self._waits = asyncio.Semaphore(len(self._ranks))
        self._calls = asyncio.Semaphore(IN_FLIGHT)

    async def connect(self) -> None:
        """Opens new connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for address, _ in self._groups]
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        counts = [count for _, count in self._groups]
        own = [channel for channel, count in zip(self._channels, counts, strict=True) for _ in range(count)]
        self._stubs = [registration_pb2_grpc.RegistrationServiceStub(channel) for channel in own]
        self._health = [health_pb2_grpc.HealthStub(channel) for channel in own]

    async def begin(self, key: bytes, location: bytes) -> None:
        """Sets the attempt that the next calls are about."""
        self._key.ParseFromString(key)
        self._location.ParseFromString(location)

    async def forget(self) -> None:
        """Makes the ranks those of a restarted job: they do not know what the server has."""
        for rank in self._ranks:
            rank.known.clear()

    async def empty(self, count: int) -> Step:
        """Makes ``count`` empty calls for each rank."""
        request = health_pb2.HealthCheckRequest()

        async def call(at: int) -> None:
            for _ in range(count):
                async with self._calls:
                    await self._health[at].Check(request)

        await asyncio.gather(*(call(at) for at in range(len(self._ranks))))
        return Step(calls=count * len(self._ranks))

    async def plan(self) -> Step:
        """Plans every rank; returns when all of them know what they write."""
        return await self._each(self._plan, self._waits)

    async def _plan(self, stub: Any, rank: _Rank) -> Step:
        step = Step()
        request = pb.PlanSaveRequest(
            key=self._key,
            location=self._location,
            rank=rank.number,
            plan_digest=rank.plan.digest,
            host=f"node-{rank.number // 8}",
            wait=_WAIT,
        )
        asked = ()
        while True:
            reply = await self._send(stub.PlanSave, request, rank, asked, step)
            asked = reply.unknown
            if reply.state == pb.PlanSaveResponse.STATE_DECIDED:
                rank.drop = reply.drop
                return step

    async def _send(self, call: Any, request: Any, rank: _Rank, asked: Sequence[Any], step: Step) -> Any:
        del request.blobs[:]
        wanted = {bytes(ref.digest) for ref in asked}
        for kind, blob in rank.blobs():
            small = blob.digest not in rank.known and len(blob.payload) <= SMALL_BLOB_BYTES
            if blob.digest in wanted or (small and not asked):
                request.blobs.append(types_pb2.Blob(kind=int(kind), payload=blob.payload))  # type: ignore[arg-type]
        step.sent_bytes += request.ByteSize()
        step.calls += 1
        return await call(request, timeout=_DEADLINE_S)

    async def write(self) -> Step:
        """Encodes what each rank keeps, as if it had written it; not part of any time. Counts the items kept."""
        kept_count = 0
        whole: dict[bytes, Encoded] = {}
        for rank in self._ranks:
            rank.known.update((rank.table.digest, rank.plan.digest))
            if not rank.drop and rank.plan.digest in whole:
                rank.structure = whole[rank.plan.digest]
                continue
            plan = self._layout.plan(rank.number)
            kept = np.arange(plan.item_count)
            if rank.drop:
                drop = np.unpackbits(np.frombuffer(rank.drop, np.uint8), count=plan.item_count)
                kept = np.flatnonzero(drop == 0)
            rank.structure = encode_structure(written(plan, kept.astype(np.int64)), rank.plan.digest)
            kept_count += len(kept)
            if not rank.drop:
                whole[rank.plan.digest] = rank.structure
        return Step(calls=kept_count)

    async def register(self) -> Step:
        """Registers every rank, and waits in each until the attempt is closed."""
        step = await self._each(self._register, self._waits)
        for rank in self._ranks:
            rank.known.update(blob.digest for _, blob in rank.blobs())
        return step

    async def _register(self, stub: Any, rank: _Rank) -> Step:
        step = Step()
        if rank.structure is None:
            raise RuntimeError("ranks write before they register")
        request = pb.RegisterShardsRequest(
            key=self._key,
            location=self._location,
            registration=pb.ShardRegistration(
                rank=rank.number, structure_digest=rank.structure.digest, extents=_EXTENTS
            ),
            host=f"node-{rank.number // 8}",
            wait=_WAIT,
        )
        asked: Sequence[Any] = ()
        while True:
            reply = await self._send(stub.RegisterShards, request, rank, asked, step)
            asked = reply.unknown
            if not asked:
                return step if reply.HasField("checkpoint") else await self._follow(stub, step)

    async def _follow(self, stub: Any, step: Step) -> Step:
        request = pb.GetCheckpointProgressRequest(
            key=self._key, wait=_WAIT, until=pb.GetCheckpointProgressRequest.UNTIL_CLOSED
        )
        while True:
            step.sent_bytes += request.ByteSize()
            step.calls += 1
            reply = await stub.GetCheckpointProgress(request, timeout=_DEADLINE_S)
            if reply.HasField("checkpoint"):
                return step

    async def _each(self, call: Callable[[Any, _Rank], Awaitable[Step]], gate: asyncio.Semaphore) -> Step:
        async def one(at: int, rank: _Rank) -> Step:
            async with gate:
                return await call(self._stubs[at], rank)

        total = Step()
        for step in await asyncio.gather(*(one(at, rank) for at, rank in enumerate(self._ranks))):
            total += step
        return total


def _serve_part(connection: Connection, layout: Layout, ranks: range, routes: Routes) -> None:
    async def serve() -> None:
        part = _Part(layout, ranks, routes)
        await part.connect()
        connection.send(None)
        loop = asyncio.get_running_loop()
        while True:
            command = await loop.run_in_executor(None, connection.recv)
            if command is None:
                return
            name, arguments = command
            try:
                connection.send(await getattr(part, name)(*arguments))
            except Exception as error:  # noqa: BLE001 - told to the process that asked, which raises it
                connection.send(RuntimeError(f"{name}: {type(error).__name__}: {error}"))

    asyncio.run(serve())


@dataclass(frozen=True)
class Phase:
    """What one phase of a save took.

    Attributes:
        time_s: Seconds from the first call to the last answer.
        sent_bytes: Bytes of the requests.
        calls: Calls made.
    """

    time_s: float
    sent_bytes: int
    calls: int


class Fleet:
    """All ranks of one run. Not thread-safe.

    Args:
        layout: What they save.
        address: The server.
        processes: Client processes.
        routes: How the ranks reach it; the coordinator's own calls go to ``address``.
    """

    def __init__(self, layout: Layout, address: str, processes: int, routes: Routes | None = None) -> None:
        self.layout = layout
        self._channel = grpc.insecure_channel(address)
        self._stub = registration_pb2_grpc.RegistrationServiceStub(self._channel)
        self._run = "projects/bench/runs/scale"
        self._incarnation = os.urandom(16)
        self._session = 0
        self._key = types_pb2.AttemptKey()
        context = multiprocessing.get_context("spawn")
        bounds = np.linspace(0, layout.ranks, processes + 1).round().astype(int).tolist()
        ways = routes or Routes((address,))
        self._parts = []
        for low, high in pairwise(bounds):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_part, args=(theirs, layout, range(low, high), ways), daemon=True)
            process.start()
            self._parts.append((process, ours))
        for _, pipe in self._parts:
            pipe.recv()

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._parts:
            pipe.send(None)
            process.join()
        self._channel.close()

    def ask(self, name: str, *arguments: Any, meanwhile: Callable[[], object] | None = None) -> Phase:
        """Makes every process do one phase at the same time; ``meanwhile`` is done beside it."""
        began_s = time.perf_counter()
        for _, pipe in self._parts:
            pipe.send((name, arguments))
        if meanwhile is not None:
            meanwhile()
        total = Step()
        failure: Exception | None = None
        for _, pipe in self._parts:
            answer = pipe.recv()
            if isinstance(answer, Exception):
                failure = answer
            elif answer is not None:
                total += answer
        if failure is not None:
            raise failure
        return Phase(time.perf_counter() - began_s, total.sent_bytes, total.calls)

    def start(self) -> None:
        """Starts a session."""
        self._session = self._stub.StartSession(
            pb.StartSessionRequest(run=self._run, incarnation=self._incarnation, on_live=pb.ON_LIVE_TAKEOVER),
            timeout=60,
            wait_for_ready=True,
        ).session

    def begin(self, step: int) -> None:
        """Makes ``step`` the attempt that phases are about."""
        self._key = types_pb2.AttemptKey(
            run=self._run,
            step=step,
            session=self._session,
            incarnation=self._incarnation,
            attempt=1,
            world_size=self.layout.ranks,
        )
        location = types_pb2.AttemptLocation(location=f"/ckpt/step-{step}", prefix=prefix_of(self._incarnation, 1))
        self.ask("begin", self._key.SerializeToString(), location.SerializeToString())

    def commit(self) -> float:
        """Commits as the coordinator does, who waits for the ranks; returns the seconds."""
        began_s = time.perf_counter()
        while True:
            try:
                self._stub.CommitCheckpoint(pb.CommitCheckpointRequest(key=self._key, wait=_WAIT), timeout=_DEADLINE_S)
            except grpc.RpcError as error:
                # Before any rank has come, or with ranks still missing after the wait.
                if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
                    raise
                time.sleep(0.005)
            else:
                return time.perf_counter() - began_s


@contextmanager
def fleet(layout: Layout, address: str, processes: int = PROCESSES, routes: Routes | None = None) -> Iterator[Fleet]:
    """Yields the ranks of ``layout``, connected and in a session of their own."""
    ranks = Fleet(layout, address, processes, routes)
    try:
        ranks.start()
        yield ranks
    finally:
        ranks.close()
