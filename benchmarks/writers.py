"""Jobs that write: threads with real calls through the client library, in client processes of their own.

A writer starts sessions, registers, commits, lets attempts fail, moves an alias, and saves a step again after it was
started anew.
"""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.common import SEED
from benchmarks.peers import GATES
from benchmarks.simulated import RankPayload, rank_payloads
from benchmarks.workload import Workload
from shardbook.client import Client
from shardbook.core.names import prefix_of
from shardbook.events import EventKind
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptKey, AttemptLocation, Blob, BlobRef, RankFailure

PROJECT: Final = "bench"
#: A writer's sessions end, and a step is saved again, after so many saves; an attempt fails, and an alias moves.
RESTART_EVERY, FAIL_EVERY, ALIAS_EVERY = 8, 5, 3
ALIAS: Final = "picked"
ONE_RANK: Final = Workload(1, 4, 1)

#: What a writer was told to have happened: run, kind, alias.
Acknowledged = Counter[tuple[str, str, str]]


def run_of(writer: int) -> str:
    """Returns the run of a writer, ``project/run``."""
    return f"{PROJECT}/writer-{writer:02}"


@dataclass(frozen=True)
class Writing:
    """What one process's writers do in a round.

    Attributes:
        addresses: Servers; a writer's are taken in turn.
        writers: Their numbers.
        first_step: Of the round: no two rounds save the same steps.
        saves: Of each writer.
        period_s: From one save of a writer to its next; 0 for no pause.
    """

    addresses: Sequence[str]
    writers: Sequence[int]
    first_step: int
    saves: int
    period_s: float = 0.0


@dataclass
class Wrote:
    """What writers did.

    Attributes:
        acknowledged: What they were told to have happened.
        call_count: Calls they made.
        began_s: When the first began, seconds of the machine's clock.
        ended_s: When the last had its last answer.
        commit_s: How long each commit took.
    """

    acknowledged: Acknowledged = field(default_factory=Counter)
    call_count: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0
    commit_s: list[float] = field(default_factory=list)


def write(work: Writing) -> Wrote:
    """Lets the writers of a process do their round; begins when all processes do."""
    payloads = rank_payloads(ONE_RANK)
    writers = [
        Writer(Client(work.addresses[one % len(work.addresses)]), run_of(one), payloads, random.Random(SEED + one))
        for one in work.writers
    ]
    return _together(writers, lambda writer: writer.round(work))


def call_nothing(work: Writing, calls: int) -> Wrote:
    """The floor: each writer of a process makes ``calls`` empty calls."""

    def empty(writer: int) -> Wrote:
        with grpc.insecure_channel(work.addresses[writer % len(work.addresses)]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for _ in range(calls):
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        return Wrote(call_count=calls)

    return _together(work.writers, empty)


def _together(of: Sequence[Any], each: Callable[[Any], Wrote]) -> Wrote:
    with ThreadPoolExecutor(len(of)) as pool:
        GATES["begin"].wait()
        began_s = time.monotonic()
        told = list(pool.map(each, of))
    return Wrote(
        acknowledged=sum((one.acknowledged for one in told), Counter()),
        call_count=sum(one.call_count for one in told),
        began_s=began_s,
        ended_s=time.monotonic(),
        commit_s=[took_s for one in told for took_s in one.commit_s],
    )


class Writer:
    """A job, all of whose ranks are here. For one thread."""

    def __init__(self, client: Client, run: str, payloads: Sequence[RankPayload], chance: random.Random) -> None:
        self._client = client
        self._run = run
        self._payloads = payloads
        self._chance = chance
        self._key = AttemptKey()
        self._wrote = Wrote()

    def round(self, work: Writing) -> Wrote:
        """Saves as often as it is told to."""
        due_s = time.monotonic() + self._chance.random() * work.period_s
        for at in range(work.saves):
            time.sleep(max(0.0, due_s - time.monotonic()))
            due_s += work.period_s
            step = work.first_step + at
            if at % RESTART_EVERY == 0:
                self.start()
                # What a restarted job had saved before it was killed, it saves again.
                step -= 1 if at else 0
            self.save(step, fails=at % FAIL_EVERY == FAIL_EVERY - 1, picks=at % ALIAS_EVERY == 0)
        return self._wrote

    def start(self, part: str = "default") -> None:
        """Starts a session, as the same job whose last process is gone."""
        incarnation = uuid.uuid4().bytes
        run = f"projects/{self._run.replace('/', '/runs/')}"
        answer = self._client.start_session(
            pb.StartSessionRequest(run=run, part=part, incarnation=incarnation, on_live=pb.ON_LIVE_TAKEOVER)
        )
        self._key = AttemptKey(
            run=run,
            part=part,
            session=answer.session,
            incarnation=incarnation,
            attempt=1,
            world_size=len(self._payloads),
        )
        self._wrote.call_count += 1

    def register(self, step: int, ranks: range | None = None) -> None:
        """Registers what ranks wrote, all of them unless said; the first of them opens the checkpoint."""
        self._key.step = step
        for rank in range(len(self._payloads)) if ranks is None else ranks:
            payload = self._payloads[rank]
            request = pb.RegisterShardsRequest(
                key=self._key, location=self._place, registration=payload.registration, host=f"node-{rank // 4}"
            )
            self._client.register_shards(request, lambda unknown, own=payload: _blobs(own, unknown))  # type: ignore[misc]
            self._wrote.call_count += 1

    def commit(self) -> None:
        """Commits what was registered."""
        began_s = time.monotonic()
        self._client.commit(pb.CommitCheckpointRequest(key=self._key))
        self._wrote.commit_s.append(time.monotonic() - began_s)
        self._wrote.call_count += 1
        self._note(EventKind.COMMITTED)

    def save(self, step: int, *, fails: bool = False, picks: bool = False) -> None:
        """Saves a step, or fails to; then moves the alias to it when it is ``picks``."""
        self.register(step)
        if fails:
            failure = RankFailure(rank=0, host="node-0", reason="no space left on device", phase="write")
            self._client.report_failure(pb.ReportFailureRequest(key=self._key, location=self._place, failure=failure))
            self._wrote.call_count += 1
            self._note(EventKind.FAILED)
            return
        self.commit()
        if picks:
            self._client.set_alias(f"{self._run}@{ALIAS}", f"{self._run}@{step}")
            self._wrote.call_count += 1
            self._note(EventKind.ALIAS_MOVED, ALIAS)

    @property
    def _place(self) -> AttemptLocation:
        return AttemptLocation(location=f"/ckpt/step-{self._key.step}", prefix=prefix_of(self._key.incarnation, 1))

    def _note(self, kind: EventKind, alias: str = "") -> None:
        self._wrote.acknowledged[self._run, kind.value, alias] += 1


def _blobs(payload: RankPayload, unknown: Sequence[BlobRef]) -> list[Blob]:
    wanted = {ref.kind for ref in unknown}
    return [blob for blob in payload.blobs if blob.kind in wanted]


def commit_steps(address: str, run: str, steps: Iterable[int], part: str = "default") -> None:
    """Commits checkpoints of a run of its own, or of a part."""
    writer = Writer(Client(address), run, rank_payloads(ONE_RANK), random.Random(SEED))
    writer.start(part)
    for step in steps:
        writer.save(step)
