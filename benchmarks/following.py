"""24 concurrent writers with 50 watchers, through real server processes; on Postgres through two of them.

Every watcher's events are compared with the database's: the same, in the same order, none lost, none doubled; and what
the writers were told to have happened with what the database has. Beside each round with watchers: the same round
without, and as many empty calls by the same writers. Clients, servers and databases share this machine.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import select

from benchmarks.claimants import measure_claimants
from benchmarks.common import Cell, Goal, Report, rss_bytes
from benchmarks.followers import (
    BYE,
    COMMITS,
    EVERYTHING,
    HELLO,
    RECONNECTING,
    Follower,
    Following,
    Heard,
    fact_of,
    follow,
    signal,
)
from benchmarks.peers import Peers, peers
from benchmarks.places import Place
from benchmarks.postgres import free_port
from benchmarks.simulated import Server, running_server
from benchmarks.writers import Acknowledged, Writing, Wrote, call_nothing, write
from shardbook.events import EventKind
from shardbook_server.service.events import Place as EventPlace
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import tables as t
from shardbook_server.storage.database import Database
from shardbook_server.storage.event_tables import events

#: Watchers give up so long after the writers began.
_LIMIT_S: Final = 120.0
_READY_S: Final = 60.0
_NONE: Final = Goal("<=", 0)


@dataclass(frozen=True)
class FollowSizes:
    """How much is written and followed.

    Attributes:
        writers: Jobs that save at the same time.
        watchers: Streams.
        saves: Of each writer in a round.
        rounds: Without watchers, and with them.
        paced_saves: Of each writer in the round that is not in a hurry.
        period_s: Between two of those.
        claimants: Watchers that share the work on checkpoints.
        claimed: Checkpoints that they share.
    """

    writers: int = 24
    watchers: int = 50
    saves: int = 24
    rounds: int = 2
    paced_saves: int = 8
    period_s: float = 2.0
    claimants: int = 4
    claimed: int = 40

    @property
    def followers(self) -> list[Follower]:
        """The watchers: three of five hear everything, one reconnects, one hears some of it."""
        kinds = (EVERYTHING, RECONNECTING, EVERYTHING, COMMITS, EVERYTHING)
        return [kinds[at % len(kinds)] for at in range(self.watchers)]


QUICK: Final = FollowSizes(saves=10, rounds=1, paced_saves=3, period_s=1.0, claimants=3, claimed=10)


# ---------------------------------------------------------------- what is true


@dataclass(frozen=True)
class Events:
    """Rows of the table of events.

    Attributes:
        cursors: (n,) their numbers, ascending.
        facts: (n,) see ``fact_of``.
        runs: Where each happened, ``project/run``.
        kinds: What happened.
        aliases: Names of aliases, empty for other kinds.
    """

    cursors: npt.NDArray[np.int64]
    facts: npt.NDArray[np.int64]
    runs: Sequence[str]
    kinds: Sequence[str]
    aliases: Sequence[str]

    def wanted_by(self, follower: Follower) -> npt.NDArray[np.bool_]:
        """Returns which of them a watcher is to hear, (n,)."""
        return np.array([follower.wants(*one) for one in zip(self.runs, self.kinds, strict=True)], dtype=bool)

    def acknowledged(self) -> Acknowledged:
        """Returns what writers must have been told of them."""
        return Counter(zip(self.runs, self.kinds, self.aliases, strict=True))


def read_events(database: Database, after: int, until: str) -> Events:
    """Returns the events behind a number, up to the last commit of a part named ``until``."""
    columns = (
        events.c.cursor,
        events.c.kind,
        t.projects.c.name + "/" + t.runs.c.name,
        t.parts.c.name,
        t.checkpoints.c.step,
        t.checkpoints.c.session,
        t.checkpoints.c.incarnation,
        events.c.alias,
    )
    tables = events.join(t.parts, t.parts.c.id == events.c.part_id).join(t.runs).join(t.projects)
    tables = tables.join(t.checkpoints, t.checkpoints.c.id == events.c.checkpoint_id)
    statement = select(*columns).select_from(tables).where(events.c.cursor > after).order_by(events.c.cursor)
    with database.read() as connection:
        rows = [tuple(row) for row in connection.execute(statement)]
    while rows and not (rows[-1][3] == until and rows[-1][1] == event_rows.EventKind.COMMITTED):
        rows.pop()
    facts, kinds, aliases = [], [], []
    for _, number, run, part, step, session, incarnation, alias in rows:
        kind, name = _told(event_rows.EventKind(number), alias)
        kinds.append(kind)
        aliases.append(name)
        place = run if part == "default" else f"{run}:{part}"
        facts.append(fact_of(kind, place, step, session, incarnation.hex(), name))
    cursors = np.array([row[0] for row in rows], "i8")
    return Events(cursors, np.array(facts, "i8"), [row[2] for row in rows], kinds, aliases)


def _told(kind: event_rows.EventKind, alias: str | None) -> tuple[str, str]:
    """Returns kind and alias of a row as watchers are told them."""
    if kind is event_rows.EventKind.LATEST_MOVED:
        return EventKind.ALIAS_MOVED.value, "latest"
    return kind.name.lower().replace("_", "-"), alias or ""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with what one watcher heard, or several together; events.

    Attributes:
        lost: It was not told.
        doubled: It was told again.
        misplaced: It was told before one that comes first.
        altered: Nothing of the kind happened, or it was not to hear of it.
    """

    lost: int = 0
    doubled: int = 0
    misplaced: int = 0
    altered: int = 0

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def judge(true: Events, heard: Heard) -> Verdict:
    """Compares what a watcher heard with what happened."""
    wanted = true.wanted_by(heard.follower)
    cursors, facts = true.cursors[wanted], true.facts[wanted]
    distinct, first_at = np.unique(heard.cursors, return_index=True)
    known, ours, theirs = np.intersect1d(cursors, distinct, assume_unique=True, return_indices=True)
    altered = len(distinct) - len(known) + int((facts[ours] != heard.facts[first_at[theirs]]).sum())
    return Verdict(
        lost=len(cursors) - len(known),
        doubled=len(heard.cursors) - len(distinct),
        misplaced=int((np.diff(heard.cursors) < 0).sum()),
        altered=altered,
    )


# ---------------------------------------------------------------- rounds


@dataclass(frozen=True)
class Round:
    """What one round took.

    Attributes:
        wrote: What the writers did.
        took_s: From their first call to their last answer.
        server_cpu_s: Of all servers meanwhile.
        event_count: Events that happened.
        heard: What the watchers heard.
        verdict: What is wrong with it.
    """

    wrote: Wrote
    took_s: float
    server_cpu_s: float
    event_count: int = 0
    heard: Sequence[Heard] = ()
    verdict: Verdict = Verdict()


class _Rounds:
    """Rounds over one database. Not thread-safe."""

    def __init__(self, database: Database, servers: Sequence[Server], group: Peers, sizes: FollowSizes) -> None:
        self._database = database
        self._servers = servers
        self._addresses = [server.address for server in servers]
        self._group = group
        self._sizes = sizes
        self._step = 1

    def alone(self) -> Round:
        """Writes without anybody watching."""
        works = self._works(self._sizes.saves)
        return self._written([self._group.writers.submit(write, work) for work in works])

    def empty(self, like: Round) -> Round:
        """Makes as many empty calls as a round made."""
        calls = like.wrote.call_count // self._sizes.writers
        works = self._works(0)
        return self._written([self._group.writers.submit(call_nothing, work, calls) for work in works])

    def watched(self, saves: int, period_s: float = 0.0) -> Round:
        """Writes while all watch; compares what they heard with what happened."""
        with self._database.read() as connection:
            epoch, after = event_rows.read_position(connection)
        since = str(EventPlace(epoch, after))
        hearing = [
            self._group.watchers.submit(follow, Following(self._addresses, own, since, _LIMIT_S))
            for own in _dealt(self._sizes.followers, self._group.processes)
        ]
        signal(self._addresses[0], HELLO, self._step)
        self._await_watchers(hearing)
        before_s = self._cpu_s()
        written = self._written([self._group.writers.submit(write, work) for work in self._works(saves, period_s)])
        signal(self._addresses[-1], BYE, self._step)
        heard = [one for future in hearing for one in future.result()]
        # What is still on its way when the writers have ended is part of it.
        cpu_s = self._cpu_s() - before_s
        true = read_events(self._database, after, BYE)
        self._check_writes(written.wrote.acknowledged, true)
        verdict = sum((judge(true, one) for one in heard), Verdict())
        return Round(written.wrote, written.took_s, cpu_s, len(true.cursors), heard, verdict)

    def _await_watchers(self, hearing: Sequence[Future[list[Heard]]]) -> None:
        """Waits until every watcher has heard that the round begins."""
        left, end_s = self._sizes.watchers, time.monotonic() + _READY_S
        while left:
            if self._group.ready.acquire(timeout=1):
                left -= 1
            elif time.monotonic() > end_s or any(one.done() for one in hearing):
                told = [one.exception() for one in hearing if one.done()]
                raise RuntimeError(f"{left} watchers did not hear that the round begins: {told}")

    def _works(self, saves: int, period_s: float = 0.0) -> list[Writing]:
        first, self._step = self._step, self._step + saves
        return [
            Writing(self._addresses, own, first, saves, period_s)
            for own in _dealt(range(self._sizes.writers), self._group.processes)
        ]

    def _written(self, futures: Sequence[Future[Wrote]]) -> Round:
        before_s = self._cpu_s()
        told = [future.result() for future in futures]
        wrote = Wrote(
            sum((one.acknowledged for one in told), Counter()),
            sum(one.call_count for one in told),
            commit_s=[took_s for one in told for took_s in one.commit_s],
        )
        took_s = max(one.ended_s for one in told) - min(one.began_s for one in told)
        return Round(wrote, took_s, self._cpu_s() - before_s)

    def _cpu_s(self) -> float:
        return sum(server.cpu_s for server in self._servers)

    @staticmethod
    def _check_writes(acknowledged: Acknowledged, true: Events) -> None:
        """An event that the table itself lacks is lost too, or one that nobody was told of doubled."""
        kept = true.acknowledged()
        wrong = {what: (count, kept[what]) for what, count in acknowledged.items() if kept[what] < count}
        if wrong:
            raise RuntimeError(f"the table of events lacks what writers were told, (told, kept): {wrong}")


def _dealt(all_of: Sequence[Any], hands: int) -> list[list[Any]]:
    return [list(all_of[at::hands]) for at in range(hands)]


# ---------------------------------------------------------------- the report


@contextmanager
def _serving(place: Place) -> Iterator[list[Server]]:
    count = 1 if place.name == "SQLite" else 2
    with ExitStack() as stack:
        yield [stack.enter_context(running_server(place.database, free_port())) for _ in range(count)]


def measure_following(report: Report, found: Sequence[Place], sizes: FollowSizes) -> None:
    """Adds rows and goals of writers and watchers on each database."""
    with peers() as group:
        for place in found:
            database = Database(place.url)
            try:
                with _serving(place) as servers:
                    _measure(report, place.name, servers, _Rounds(database, servers, group, sizes), sizes)
                    addresses = [server.address for server in servers]
                    measure_claimants(report, place.name, addresses, sizes.claimants, sizes.claimed)
            finally:
                database.close()


def _measure(report: Report, place: str, servers: Sequence[Server], rounds: _Rounds, sizes: FollowSizes) -> None:
    # What only happens once: structures that are new, statements that are compiled.
    rounds.watched(saves=2)
    taken: dict[str, list[Round]] = {"empty calls": [], "writers alone": [], "writers and watchers": []}
    for _ in range(sizes.rounds):
        alone = rounds.alone()
        taken["writers alone"].append(alone)
        taken["empty calls"].append(rounds.empty(alone))
        taken["writers and watchers"].append(rounds.watched(sizes.saves))
    taken["unhurried writers and watchers"] = [rounds.watched(sizes.paced_saves, sizes.period_s)]
    for what, some in taken.items():
        report.row(database=place, what=what, **_columns(some))
    memory = max(rss_bytes(server.process.pid) for server in servers)
    report.row(database=place, what="memory of a server", rss_mb=round(memory / 1e6, 1))
    watched = [*taken["writers and watchers"], *taken["unhurried writers and watchers"]]
    verdict = sum((one.verdict for one in watched), Verdict())
    report.ratio(f"{place}: events lost", verdict.lost, _NONE)
    report.ratio(
        f"{place}: events doubled, misplaced or altered",
        verdict.doubled + verdict.misplaced + verdict.altered,
        _NONE,
    )
    speed = {what: statistics.median(one.took_s for one in some) for what, some in taken.items()}
    report.ratio(f"{place}: time of writers alone / of empty calls", speed["writers alone"] / speed["empty calls"])
    report.ratio(f"{place}: time with watchers / without", speed["writers and watchers"] / speed["writers alone"])


def _columns(some: Sequence[Round]) -> Mapping[str, Cell]:
    calls = sum(one.wrote.call_count for one in some)
    took_s = sum(one.took_s for one in some)
    columns: dict[str, Cell] = {
        "calls_per_s": round(calls / took_s, 1),
        "cores_servers": round(sum(one.server_cpu_s for one in some) / took_s, 2),
        "server_cpu_us_a_call": round(sum(one.server_cpu_s for one in some) / calls * 1e6),
    }
    commit_s = [took_s for one in some for took_s in one.wrote.commit_s]
    if commit_s:
        columns["commit_p50_ms"] = round(float(np.percentile(commit_s, 50)) * 1e3, 1)
    heard = [one for round_ in some for one in round_.heard]
    if heard:
        delays_s = np.concatenate([one.delays_s for one in heard])
        verdict = sum((one.verdict for one in some), Verdict())
        columns |= {
            "events_per_s": round(sum(one.event_count for one in some) / took_s, 1),
            "told_per_s": round(len(delays_s) / took_s),
            "delay_p50_ms": round(float(np.percentile(delays_s, 50)) * 1e3, 1),
            "delay_p99_ms": round(float(np.percentile(delays_s, 99)) * 1e3, 1),
            "streams": sum(one.streams for one in heard),
            **vars(verdict),
        }
    return columns
