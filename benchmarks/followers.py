"""Watchers: threads with a stream each, through the client library, in client processes of their own.

Some end theirs on purpose and go on from where they were, at another replica where there is one.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.common import SEED
from benchmarks.peers import GATES
from benchmarks.writers import PROJECT, commit_steps, run_of
from shardbook.client import Client
from shardbook.events import Event, EventKind

#: Parts of the first writer's run whose commits say that a round begins and ends; every watcher hears of them.
HELLO, BYE = "hello", "bye"


def signal(address: str, part: str, step: int) -> None:
    """Commits what tells every watcher that a round begins, or ends."""
    commit_steps(address, run_of(0), [step], part)


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
            GATES["ready"].release()
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
