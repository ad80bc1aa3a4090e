"""Ranks in client processes of their own: each process holds real connections and makes the calls it is told to make.

A process is ``python -m benchmarks.crowd``, which imports neither torch nor DCP; commands and answers are pickles on
its pipes. Requests are encoded before the time begins and answers are read after it has ended, as ranks on other
machines would do that in parallel: what is timed is a unary call from its bytes to the bytes of its answer. Times are
those of the system's monotonic clock, so they compare across processes.
"""

from __future__ import annotations

import asyncio
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2

#: Begin and end of each call, (N, 2) seconds.
Times = npt.NDArray[np.float64]

_SERVICE: Final = "/shardbook.v1.RegistrationService/"
_WAIT: Final = Duration(seconds=20)
_DEADLINE_S: Final = 120.0
#: Connections that one process opens at the same time.
_OPENING: Final = 64
_OPTIONS: Final = (
    # A connection of its own for each channel; gRPC would share one among equal addresses.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 40_000),
)


@dataclass(frozen=True)
class Member:
    """A rank, as its process knows it.

    Attributes:
        rank: Its number.
        registration: What it registers, encoded.
        plan_digest: Digest of its plan.
        blobs: What both name, encoded: sent once.
    """

    rank: int
    registration: bytes
    plan_digest: bytes
    blobs: tuple[bytes, ...]


class _Process:
    """The ranks of one process. Its methods are what ``Crowd`` may ask for."""

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._groups: dict[str, list[grpc.aio.Channel]] = {}
        self._registrations: list[bytes] = []
        self._plans: list[bytes] = []
        self._follow = b""

    async def join(self, members: list[Member]) -> None:
        """Sets the ranks."""
        self._members = members

    async def open(self, group: str, targets: list[str]) -> None:
        """Opens a connection to each target; rank i of this process uses the i-th of the group, in turn."""
        gate = asyncio.Semaphore(_OPENING)

        async def connected(target: str) -> grpc.aio.Channel:
            async with gate:
                channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
                await channel.channel_ready()
                return channel

        async with asyncio.timeout(_DEADLINE_S):
            self._groups[group] = list(await asyncio.gather(*map(connected, targets)))

    async def close(self, group: str) -> None:
        """Closes the connections of a group."""
        await asyncio.gather(*(channel.close() for channel in self._groups.pop(group)))

    async def begin(self, key: bytes, location: bytes, known: bool) -> None:
        """Encodes the requests of an attempt; with the blobs where the server does not know them."""
        attempt, place = types_pb2.AttemptKey.FromString(key), types_pb2.AttemptLocation.FromString(location)
        self._registrations, self._plans = [], []
        for member in self._members:
            blobs = [] if known else [types_pb2.Blob.FromString(blob) for blob in member.blobs]
            common: dict[str, Any] = {"key": attempt, "location": place, "host": f"node-{member.rank // 8}"}
            registration = pb.RegisterShardsRequest(
                **common, registration=pb.ShardRegistration.FromString(member.registration), blobs=blobs
            )
            plan = pb.PlanSaveRequest(
                **common, rank=member.rank, plan_digest=member.plan_digest, blobs=blobs, wait=_WAIT
            )
            self._registrations.append(registration.SerializeToString())
            self._plans.append(plan.SerializeToString())
        until = pb.GetCheckpointProgressRequest.UNTIL_CLOSED
        self._follow = pb.GetCheckpointProgressRequest(key=attempt, wait=_WAIT, until=until).SerializeToString()

    async def empty(self, group: str, in_flight: int) -> Times:
        """Makes an empty call for each rank."""
        return await self._all(group, "/grpc.health.v1.Health/Check", [b""] * len(self._members), in_flight)

    async def register(self, group: str, in_flight: int) -> Times:
        """Registers each rank."""

        def stored(answer: bytes) -> bool:
            return not pb.RegisterShardsResponse.FromString(answer).unknown

        return await self._all(group, f"{_SERVICE}RegisterShards", self._registrations, in_flight, stored)

    async def plan(self, group: str, absent: int) -> Times:
        """Plans each rank but ``absent`` and waits for the decision; all of them at once."""

        def decided(answer: bytes) -> bool:
            return pb.PlanSaveResponse.FromString(answer).state == pb.PlanSaveResponse.STATE_DECIDED

        requests = [p for member, p in zip(self._members, self._plans, strict=True) if member.rank != absent]
        return await self._all(group, f"{_SERVICE}PlanSave", requests, len(requests), decided)

    async def follow(self, group: str) -> Times:
        """Waits, in each rank, until the attempt is closed; all of them at once."""

        def closed(answer: bytes) -> bool:
            return pb.GetCheckpointProgressResponse.FromString(answer).HasField("checkpoint")

        requests = [self._follow] * len(self._members)
        return await self._all(group, f"{_SERVICE}GetCheckpointProgress", requests, len(requests), closed)

    async def _all(
        self,
        group: str,
        method: str,
        requests: Sequence[bytes],
        in_flight: int,
        done: Callable[[bytes], bool] = lambda _: True,
    ) -> Times:
        """Makes a call for each request, again until ``done`` with its answer; time goes from the first to the last."""
        calls: list[Any] = [channel.unary_unary(method) for channel in self._groups[group]]
        times = np.zeros((len(requests), 2))
        waiting = iter(range(len(requests)))
        # What ends a wait early can only be its own 20 s.
        waits = method.endswith(("PlanSave", "GetCheckpointProgress"))
        answers: list[bytes] = []

        async def worker() -> None:
            for at in waiting:
                call = calls[at % len(calls)]
                began_s = time.monotonic()
                answer = await call(requests[at], timeout=_DEADLINE_S)
                while waits and not done(answer):
                    answer = await call(requests[at], timeout=_DEADLINE_S)
                times[at] = began_s, time.monotonic()
                answers.append(answer)

        await asyncio.gather(*(worker() for _ in range(min(in_flight, len(requests)))))
        if not all(map(done, answers)):
            raise RuntimeError(f"{method}: the server lacks what it was said to know")
        return times


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    process = _Process()
    while True:
        command = await loop.run_in_executor(None, pickle.load, sys.stdin.buffer)
        if command is None:
            return
        name, arguments = command
        try:
            answer = await getattr(process, name)(*arguments)
        except BaseException as error:  # noqa: BLE001 - told to whoever asked
            answer = RuntimeError(f"{name}: {type(error).__name__}: {error}")
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


class Crowd:
    """Client processes. Not thread-safe.

    Args:
        members: All ranks; each process gets a run of neighbours.
        processes: How many.
    """

    def __init__(self, members: Sequence[Member], processes: int) -> None:
        command = [sys.executable, "-m", "benchmarks.crowd"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(processes)
        ]
        bounds = np.linspace(0, len(members), processes + 1).round().astype(int).tolist()
        own = [list(members[low:high]) for low, high in pairwise(bounds)]
        self.counts = [len(some) for some in own]
        self._tell("join", [(some,) for some in own])
        self._read()
        self.members = members

    @property
    def pids(self) -> list[int]:
        """The processes' ids."""
        return [process.pid for process in self._processes]

    def open(self, group: str, targets: Sequence[Sequence[str]]) -> float:
        """Opens a connection for each target, given by process; returns the seconds that took."""
        began_s = time.monotonic()
        self._tell("open", [(group, list(own)) for own in targets])
        self._read()
        return time.monotonic() - began_s

    def ask(self, name: str, *arguments: Any) -> Times:
        """Makes every process do the same at the same time; returns all their calls' times."""
        self.start(name, *arguments)
        return self.result()

    def start(self, name: str, *arguments: Any) -> None:
        """Begins what ``ask`` does."""
        self._tell(name, [arguments] * len(self._processes))

    def result(self) -> Times:
        """Waits for what was started."""
        answers = [answer for answer in self._read() if answer is not None]
        return np.concatenate(answers) if answers else np.zeros((0, 2))

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            assert process.stdin is not None
            pickle.dump(None, process.stdin)
            process.stdin.close()
        self._forget()

    def kill(self) -> None:
        """Ends the processes whatever they are doing."""
        for process in self._processes:
            process.kill()
        self._forget()

    def _forget(self) -> None:
        for process in self._processes:
            process.wait(timeout=60)
            for pipe in (process.stdin, process.stdout):
                # What a killed one has not read cannot be flushed.
                with suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()

    def _tell(self, name: str, arguments: Iterable[tuple[Any, ...]]) -> None:
        for process, own in zip(self._processes, arguments, strict=True):
            assert process.stdin is not None
            pickle.dump((name, own), process.stdin)
            process.stdin.flush()

    def _read(self) -> list[Any]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(pickle.load(process.stdout))
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


@contextmanager
def crowd(members: Sequence[Member], processes: int) -> Iterator[Crowd]:
    """Yields client processes that are ended with the block."""
    ranks = Crowd(members, processes)
    try:
        yield ranks
    except BaseException:
        ranks.kill()
        raise
    ranks.close()


def _run() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve())


if __name__ == "__main__":
    _run()
