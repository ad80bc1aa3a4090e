"""Jobs that write and watchers that follow them, in client processes of their own, through the client library.

A writer is a thread with real calls: it starts sessions, registers, commits, lets attempts fail, moves an alias, and
saves a step again after a restart. A watcher is a thread with a stream; some end theirs on purpose and go on from
where they were, at another replica where there is one.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.common import SEED
from benchmarks.simulated import RankPayload, rank_payloads
from benchmarks.workload import Workload
from shardbook.client import Client
from shardbook.core.names import prefix_of
from shardbook.events import Event, EventKind
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptKey, AttemptLocation, Blob, BlobRef, RankFailure

PROJECT: Final = "bench"
#: Parts of the first writer's run whose commits say that a round begins and ends; every watcher hears of them.
HELLO, BYE = "hello", "bye"
#: A writer's sessions end, and a step is saved again, after so many saves; an attempt fails, and an alias moves.
RESTART_EVERY, FAIL_EVERY, ALIAS_EVERY = 8, 5, 3
ALIAS: Final = "picked"

#: What a writer was told to have happened: run, kind, alias.
Acknowledged = Counter[tuple[str, str, str]]

_GATES: dict[str, Any] = {}


def run_of(writer: int) -> str:
    """Returns the run of a writer, ``project/run``."""
    return f"{PROJECT}/writer-{writer:02}"


# ---------------------------------------------------------------- writers


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
    payload = rank_payloads(Workload(1, 4, 1))[0]
    writers = [
        Writer(Client(work.addresses[one % len(work.addresses)]), one, payload, random.Random(SEED + one))
        for one in work.writers
    ]
    return _together(writers, lambda writer: writer.round(work))


def call_nothing(work: Writing, calls: int) -> Wrote:
    """The floor: each writer of a process makes ``calls`` empty calls."""

    def empty(writer: int) -> Wrote:
        with grpc.insecure_channel(work.addresses[writer % len(work.addresses)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for _ in range(calls):
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        return Wrote(call_count=calls)

    return _together(work.writers, empty)


def _together(of: Sequence[Any], each: Callable[[Any], Wrote]) -> Wrote:
    with ThreadPoolExecutor(len(of)) as pool:
        _GATES["begin"].wait()
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
    """A job of one rank. For one thread."""

    def __init__(self, client: Client, number: int, payload: RankPayload, chance: random.Random) -> None:
        self._client = client
        self._run = run_of(number)
        self._payload = payload
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
            run=run, part=part, session=answer.session, incarnation=incarnation, attempt=1, world_size=1
        )
        self._wrote.call_count += 1

    def save(self, step: int, *, fails: bool = False, picks: bool = False) -> None:
        """Saves a step, or fails to; then moves the alias to it when it is ``picks``."""
        self._key.step = step
        place = AttemptLocation(location=f"/ckpt/step-{step}", prefix=prefix_of(self._key.incarnation, 1))
        registration = self._payload.registration
        self._client.register_shards(
            pb.RegisterShardsRequest(key=self._key, location=place, registration=registration), self._blobs
        )
        self._wrote.call_count += 2
        if fails:
            failure = RankFailure(rank=0, host="node-0", reason="no space left on device", phase="write")
            self._client.report_failure(pb.ReportFailureRequest(key=self._key, location=place, failure=failure))
            self._note(EventKind.FAILED)
            return
        began_s = time.monotonic()
        self._client.commit(pb.CommitCheckpointRequest(key=self._key))
        self._wrote.commit_s.append(time.monotonic() - began_s)
        self._note(EventKind.COMMITTED)
        if picks:
            self._client.set_alias(f"{self._run}@{ALIAS}", f"{self._run}@{step}")
            self._wrote.call_count += 1
            self._note(EventKind.ALIAS_MOVED, ALIAS)

    def _note(self, kind: EventKind, alias: str = "") -> None:
        self._wrote.acknowledged[self._run, kind.value, alias] += 1

    def _blobs(self, unknown: Sequence[BlobRef]) -> list[Blob]:
        wanted = {ref.kind for ref in unknown}
        return [blob for blob in self._payload.blobs if blob.kind in wanted]


def signal(address: str, part: str, step: int) -> None:
    """Commits what tells every watcher that a round begins, or ends."""
    writer = Writer(Client(address), 0, rank_payloads(Workload(1, 4, 1))[0], random.Random(SEED))
    writer.start(part)
    writer.save(step)


# ---------------------------------------------------------------- watchers


@dataclass(frozen=True)
class Follower:
    """A watcher.

    Attributes:
        kind: For the tables.
        run: Which runs.
        kinds: Which events; none for all.
        reconnects: It ends its stream again and again, and goes on from where it was.
    """

    kind: str
    run: str = f"{PROJECT}/*"
    kinds: tuple[str, ...] = ()
    reconnects: bool = False

    def wants(self, run: str, kind: str) -> bool:
        """Tells whether it is to hear of an event."""
        ours = run == self.run or (self.run.endswith("*") and run.startswith(self.run[:-1]))
        return ours and (not self.kinds or kind in self.kinds)


EVERYTHING: Final = Follower("everything")
RECONNECTING: Final = Follower("everything, reconnecting", reconnects=True)
COMMITS: Final = Follower("commits of a pattern of runs", run=f"{PROJECT}/writer-0*", kinds=("committed",))


@dataclass(frozen=True)
class Following:
    """What one process's watchers do in a round.

    Attributes:
        addresses: Servers; a watcher's first is taken in turn, and so is each that it reconnects to.
        followers: Who watches.
        since: Cursor that they begin behind.
        limit_s: They give up then, and say what they have heard.
    """

    addresses: Sequence[str]
    followers: Sequence[Follower]
    since: str
    limit_s: float


@dataclass(frozen=True)
class Heard:
    """What one watcher was told, event by event.

    Attributes:
        follower: Who it is.
        cursors: (n,) numbers of the events.
        facts: (n,) digests of what was said of each, see ``fact_of``.
        delays_s: (n,) seconds from the event's time, which is just before its commit, to its arrival.
        streams: Streams that it has had.
    """

    follower: Follower
    cursors: npt.NDArray[np.int64]
    facts: npt.NDArray[np.int64]
    delays_s: npt.NDArray[np.float64]
    streams: int


def follow(work: Following) -> list[Heard]:
    """Lets the watchers of a process follow until they hear the end of the round."""
    with ThreadPoolExecutor(len(work.followers)) as pool:
        return list(pool.map(lambda at: _Listener(work, at).listen(), range(len(work.followers))))


class _Listener:
    """One watcher. For one thread."""

    def __init__(self, work: Following, at: int) -> None:
        self._work = work
        self._at = at
        self._follower = work.followers[at]
        self._chance = random.Random(SEED + at)
        self._stream: Any = None
        self._is_over = False
        self._rows: list[tuple[int, int, float]] = []

    def listen(self) -> Heard:
        """Returns what it has heard."""
        timer = threading.Timer(self._work.limit_s, self._give_up)
        timer.daemon = True
        timer.start()
        cursor, streams = self._work.since, 0
        while not self._is_over:
            cursor = self._listen_once(cursor, streams)
            streams += 1
        timer.cancel()
        cursors, facts, delays_s = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        return Heard(self._follower, np.array(cursors, "i8"), np.array(facts, "i8"), np.array(delays_s), streams)

    def _listen_once(self, cursor: str, streams: int) -> str:
        address = self._work.addresses[(self._at + streams) % len(self._work.addresses)]
        left = self._chance.randrange(5, 60) if self._follower.reconnects else -1
        client = Client(address)
        with client.watch(self._follower.run, kinds=self._follower.kinds, since=cursor) as self._stream:
            for event in self._stream:
                self._hear(event)
                left -= 1
                if self._is_over or left == 0:
                    break
            return str(self._stream.cursor)

    def _hear(self, event: Event) -> None:
        now_s = time.time()
        number = int(event.cursor.rpartition("-")[2])
        assert event.time is not None
        self._rows.append((number, _fact(event), now_s - event.time.timestamp()))
        if event.kind is EventKind.COMMITTED and event.part.endswith(f":{HELLO}"):
            _GATES["ready"].release()
        self._is_over |= event.kind is EventKind.COMMITTED and event.part.endswith(f":{BYE}")

    def _give_up(self) -> None:
        self._is_over = True
        if self._stream is not None:
            self._stream.close()


def _fact(event: Event) -> int:
    one = event.checkpoint
    attempt = (0, 0, "") if one is None else (one.step, one.session, one.incarnation)
    return fact_of(event.kind.value, event.part, *attempt, event.alias)


def fact_of(kind: str, part: str, step: int, session: int, incarnation: str, alias: str) -> int:
    """Returns a digest of what is said of an event."""
    text = f"{kind} {part} {step} {session} {incarnation} {alias}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Peers:
    """Client processes that writers and watchers live in. Not thread-safe.

    Attributes:
        writers: Runs ``write`` and ``call_nothing``, one in each process at a time.
        watchers: Runs ``follow``, likewise.
        processes: How many of each.
        ready: Released by each watcher that hears a round begin.
    """

    writers: ProcessPoolExecutor
    watchers: ProcessPoolExecutor
    processes: int
    ready: Any


def _set_gates(gates: dict[str, Any]) -> None:
    _GATES.update(gates)


@contextmanager
def peers(processes: int = 2) -> Iterator[Peers]:
    """Yields client processes that are ended with the block."""
    context = multiprocessing.get_context("spawn")
    begin, ready = context.Barrier(processes), context.Semaphore(0)
    gates = {"begin": begin, "ready": ready}
    make = {"mp_context": context, "initializer": _set_gates, "initargs": (gates,)}
    with (
        ProcessPoolExecutor(processes, **make) as writers,  # type: ignore[arg-type]
        ProcessPoolExecutor(processes, **make) as watchers,  # type: ignore[arg-type]
    ):
        yield Peers(writers, watchers, processes, ready)
