"""A job's saves from the side of whoever drives them, and what bursts of calls took."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import grpc
import numpy as np

from benchmarks.common import Cell, cpu_s
from benchmarks.crowd import Crowd, Times
from benchmarks.workload import Workload
from shardbook.core.names import prefix_of
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import registration_pb2_grpc, types_pb2


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        workload: The job whose ranks register through a few connections.
        crowd: The job with a connection for each rank.
        rounds: Bursts that each contender takes.
        processes: Client processes.
        channels: Connections of each process to each contender.
        in_flight: Calls that each process has under way.
        crowd_saves: Its warm saves.
        arrive_s: Time for its waiting calls to reach the server before what they wait for happens.
    """

    workload: Workload
    crowd: Workload
    rounds: int = 15
    processes: int = 2
    channels: int = 12
    in_flight: int = 32
    crowd_saves: int = 3
    arrive_s: float = 3.0


class Job:
    """A run that saves: its session, and the key of the attempt it is at. Not thread-safe."""

    def __init__(self, address: str, run: str, world_size: int) -> None:
        self._channel = grpc.insecure_channel(address)
        self.stub = registration_pb2_grpc.RegistrationServiceStub(self._channel)
        self._incarnation = random.Random(run).randbytes(16)
        self._key = types_pb2.AttemptKey(
            run=f"projects/bench/runs/{run}", incarnation=self._incarnation, attempt=1, world_size=world_size
        )
        request = pb.StartSessionRequest(run=self._key.run, incarnation=self._incarnation, on_live=pb.ON_LIVE_TAKEOVER)
        self._key.session = self.stub.StartSession(request, timeout=60).session

    @property
    def key(self) -> types_pb2.AttemptKey:
        """The attempt it is at."""
        return self._key

    @property
    def location(self) -> types_pb2.AttemptLocation:
        """Where that attempt's files would be."""
        return types_pb2.AttemptLocation(
            location=f"/ckpt/step-{self._key.step}", prefix=prefix_of(self._incarnation, 1)
        )

    def next_save(self, ranks: Crowd) -> None:
        """Goes on to the next step; the ranks encode what they will send. The first time they send their blobs."""
        known = self._key.step > 0
        self._key.step += 1
        ranks.ask("begin", self._key.SerializeToString(), self.location.SerializeToString(), known)

    def commit(self) -> None:
        """Commits the save."""
        self.stub.CommitCheckpoint(pb.CommitCheckpointRequest(key=self._key), timeout=300)

    def close(self) -> None:
        """Closes its connection."""
        self._channel.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Processors:
    """Who uses the machine's processors: groups of processes.

    Attributes:
        groups: By name, what lists their ids.
    """

    groups: dict[str, Callable[[], list[int]]]

    def now(self) -> dict[str, float]:
        """Returns the processor time of each group so far, seconds."""
        return {name: sum(map(cpu_s, pids())) for name, pids in self.groups.items()}


@dataclass
class Bursts:
    """What one contender did.

    Attributes:
        rates: Calls a second, by burst.
        latencies_s: Of every call.
        used_s: Processor time of each group of processes, by burst.
        took_s: Seconds from the first call to the last answer, by burst.
    """

    rates: list[float] = field(default_factory=list)
    latencies_s: list[Times] = field(default_factory=list)
    used_s: dict[str, list[float]] = field(default_factory=dict)
    took_s: list[float] = field(default_factory=list)

    def burst(self, work: Callable[[], Times], processors: Processors) -> None:
        """Runs one burst and remembers it."""
        before = processors.now()
        times = work()
        after = processors.now()
        took_s = span_s(times)
        self.rates.append(len(times) / took_s)
        self.took_s.append(took_s)
        self.latencies_s.append(times[:, 1] - times[:, 0])
        for name, value in after.items():
            self.used_s.setdefault(name, []).append(value - before[name])

    @property
    def rate(self) -> float:
        """Median calls a second."""
        return statistics.median(self.rates)

    def columns(self) -> dict[str, Cell]:
        """Returns rate and latencies as columns of a row."""
        p50, p99 = np.percentile(np.concatenate(self.latencies_s), (50, 99)) * 1000
        return {
            "calls_per_s": round(self.rate, 1),
            "min": round(min(self.rates), 1),
            "max": round(max(self.rates), 1),
            "p50_ms": round(float(p50), 3),
            "p99_ms": round(float(p99), 3),
            **{f"cores_{name}": round(sum(used) / sum(self.took_s), 2) for name, used in self.used_s.items()},
            "server_cpu_us_a_call": round(self.server_cpu_s * 1e6),
        }

    @property
    def server_cpu_s(self) -> float:
        """Processor time of the servers for a call, seconds: the least disturbed by a busy machine."""
        return sum(self.used_s["servers"]) / sum(map(len, self.latencies_s))


def span_s(times: Times) -> float:
    """Returns the seconds from the first call to the last answer."""
    return float(times[:, 1].max() - times[:, 0].min())
