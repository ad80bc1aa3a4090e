"""Ranks that ask for what they load: many at once, in a few client processes, each in a call of its own.

A rank's question is made before the time begins. What is in it: the request, ``QueryChunks``, and decoding the answer
to columns, which is what ``Client.query_chunks`` does; many ranks share a process, so the calls are asyncio's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.loadable import Job, plan_of_rank, question_of
from shardbook.core.found import decode_part, merge
from shardbook.core.wanted import Wanted, encode_wanted
from shardbook.v1 import metadata_pb2, metadata_pb2_grpc

#: Client processes.
PROCESSES: Final = 2
_DEADLINE_S: Final = 600.0

#: (ranks, 2): when each rank's call began and when its answer was decoded, seconds of the machine's clock.
Times = npt.NDArray[np.float64]


class _Part:
    """The ranks of one process. Its methods are what ``Readers`` may ask for."""

    def __init__(self, address: str, ref_name: str, job: Job, ranks: list[int], channels: int) -> None:
        self._questions = [question_of(plan_of_rank(job, rank)) for rank in ranks]
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(channels)]
        self._name = ref_name

    async def connect(self) -> None:
        """Opens the connections."""
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def ask(self, in_flight: int) -> Times:
        """Every rank asks; ``in_flight`` of them at a time."""
        stubs: list[Any] = [metadata_pb2_grpc.MetadataServiceStub(channel) for channel in self._channels]

        async def call(at: int) -> None:
            wanted = self._questions[at]
            request = metadata_pb2.QueryChunksRequest(name=self._name, wanted=encode_wanted(wanted))
            answer = await stubs[at % len(stubs)].QueryChunks(request, timeout=_DEADLINE_S)
            _check(wanted, answer)

        return await self._each(call, in_flight)

    async def empty(self, in_flight: int) -> Times:
        """Every rank makes an empty call: the floor."""
        stubs: list[Any] = [health_pb2_grpc.HealthStub(channel) for channel in self._channels]
        request = health_pb2.HealthCheckRequest()

        async def call(at: int) -> None:
            await stubs[at % len(stubs)].Check(request, timeout=_DEADLINE_S)

        return await self._each(call, in_flight)

    async def _each(self, call: Any, in_flight: int) -> Times:
        times = np.zeros((len(self._questions), 2))
        waiting = iter(range(len(self._questions)))

        async def worker() -> None:
            for at in waiting:
                times[at, 0] = time.monotonic()
                await call(at)
                times[at, 1] = time.monotonic()

        await asyncio.gather(*(worker() for _ in range(min(in_flight, len(self._questions)))))
        return times


def _check(wanted: Wanted, answer: Any) -> None:
    found = merge(wanted, [decode_part(answer.found)])
    held = (wanted.sizes > 0).all(axis=1)
    if answer.next_page_token or not found.found.all() or len(np.unique(found.tensor)) != int(held.sum()):
        raise RuntimeError("a rank was not told all of its chunks")


def _serve(connection: Connection, address: str, name: str, job: Job, ranks: list[int], channels: int) -> None:
    async def serve() -> None:
        part = _Part(address, name, job, ranks, channels)
        await part.connect()
        connection.send(None)
        loop = asyncio.get_running_loop()
        while (command := await loop.run_in_executor(None, connection.recv)) is not None:
            method, arguments = command
            try:
                connection.send(await getattr(part, method)(*arguments))
            except Exception as error:  # noqa: BLE001 - told to the process that asked, which raises it
                connection.send(RuntimeError(f"{method}: {type(error).__name__}: {error}"))

    asyncio.run(serve())


class Readers:
    """Ranks of a job that load one checkpoint. Not thread-safe.

    Args:
        address: The server.
        name: Resource name of the checkpoint.
        job: Whose boxes they want.
        channels: Connections of each process.
        processes: Client processes; neighbouring ranks are in different ones.
        ranks: How many of the job's ranks there are; the first ones.
    """

    def __init__(self, address: str, name: str, job: Job, *, channels: int, processes: int, ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._parts = []
        for number in range(processes):
            ours, theirs = context.Pipe()
            own = list(range(number, ranks, processes))
            process = context.Process(target=_serve, args=(theirs, address, name, job, own, channels), daemon=True)
            process.start()
            self._parts.append((process, ours))
        for _, pipe in self._parts:
            pipe.recv()

    @property
    def pids(self) -> list[int]:
        """The processes' ids."""
        return [process.pid for process, _ in self._parts if process.pid is not None]

    def ask(self, in_flight: int) -> Times:
        """Every rank asks for its boxes; ``in_flight`` of all at a time."""
        return self._tell("ask", in_flight)

    def empty(self, in_flight: int) -> Times:
        """Every rank makes an empty call."""
        return self._tell("empty", in_flight)

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._parts:
            pipe.send(None)
            process.join()

    def _tell(self, method: str, in_flight: int) -> Times:
        for _, pipe in self._parts:
            pipe.send((method, (in_flight // len(self._parts),)))
        answers = [pipe.recv() for _, pipe in self._parts]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return np.concatenate(answers)


@contextmanager
def readers(
    address: str, name: str, job: Job, *, channels: int = 1, processes: int = PROCESSES, ranks: int | None = None
) -> Iterator[Readers]:
    """Yields ranks that are connected."""
    found = Readers(
        address, name, job, channels=channels, processes=processes, ranks=job.ranks if ranks is None else ranks
    )
    try:
        yield found
    finally:
        found.close()
