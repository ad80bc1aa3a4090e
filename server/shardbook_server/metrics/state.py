"""Gauges: how things are when somebody asks, and as the last look at the database found them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shardbook_server.service.vitals import Vitals

#: A look at the database that is older says nothing about now, seconds.
STALE_S: Final = 60.0
#: What is known without a look.
_UNKNOWN: Final = Vitals(None, None, None, None, ())


@dataclass(frozen=True)
class Build:
    """What this server is: the labels of ``shardbook_build_info`` and of ``shardbook_synchronous_commit_info``."""

    version: str
    schema: str
    database: str
    synchronous_commit: str


@dataclass(frozen=True)
class Sources:
    """Where the numbers of this moment come from; each is asked at every scrape, from another thread.

    Attributes:
        waiting: How many calls wait.
        watching: How many streams of events are open, and calls wait for a claim.
        calls: How many calls are queued for a thread or run in one.
        queues: Depth and age of the oldest entry, seconds, by kind.
        is_ready: Whether the server answers ``/readyz``.
    """

    waiting: Callable[[], int]
    watching: Callable[[], int]
    calls: Callable[[], int]
    queues: Callable[[], Mapping[str, tuple[int, float]]]
    is_ready: Callable[[], bool]


class State(Collector):
    """Shows the state of one server.

    Attributes:
        connection_count: Clients connected, as last counted; None where that cannot be known.
    """

    def __init__(self, build: Build, sources: Sources) -> None:
        self._build = build
        self._sources = sources
        self._vitals: tuple[float, Vitals] | None = None
        self.connection_count: int | None = None

    def looked(self, vitals: Vitals) -> None:
        """Takes what a look at the database has just found."""
        self._vitals = (time.monotonic(), vitals)

    def collect(self) -> Iterator[Metric]:
        """Yields every gauge; those that are not known now have no sample."""
        yield from self._about()
        yield from self._queues()
        yield _gauge("shardbook_connections", "Clients that are connected.", self.connection_count)
        yield from self._database()

    def describe(self) -> Iterator[Metric]:
        """Yields nothing: registering asks no source."""
        return iter(())

    def _about(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("shardbook_build_info", "What runs.", labels=("version", "schema", "database"))
        build.add_metric([self._build.version, self._build.schema, self._build.database], 1)
        yield build
        commits = GaugeMetricFamily(
            "shardbook_synchronous_commit_info", "When the database acknowledges a commit.", labels=("mode",)
        )
        commits.add_metric([self._build.synchronous_commit], 1)
        yield commits
        ready = int(self._sources.is_ready())
        yield _gauge("shardbook_ready", "1 while the server serves and its database answers.", ready)

    def _queues(self) -> Iterator[Metric]:
        waiting = self._sources.waiting()
        yield _gauge("shardbook_waiting_ranks", "Calls that wait for other ranks, a commit or a lease.", waiting)
        watching = self._sources.watching()
        yield _gauge("shardbook_watchers", "Streams of events, and calls that wait for a claim.", watching)
        depth = GaugeMetricFamily("shardbook_queue_depth", "Entries that are queued.", labels=("kind",))
        age = GaugeMetricFamily(
            "shardbook_queue_oldest_age_seconds", "How long the oldest entry has been queued.", labels=("kind",)
        )
        for kind, (count, age_s) in self._sources.queues().items():
            depth.add_metric([kind], count)
            age.add_metric([kind], age_s)
        depth.add_metric(["calls"], self._sources.calls())
        yield depth
        yield age

    def _database(self) -> Iterator[Metric]:
        looked_s, found = self._vitals or (0.0, None)
        age_s = time.monotonic() - looked_s
        vitals = found if found is not None and age_s <= STALE_S else _UNKNOWN
        yield _gauge("shardbook_database_bytes", "Size of the database.", vitals.database_bytes)
        yield _gauge(
            "shardbook_wal_bytes",
            "Size of the write-ahead log on its disk; on Postgres the whole cluster's, for members of pg_monitor.",
            vitals.wal_bytes,
        )
        written = CounterMetricFamily(
            "shardbook_wal_written_bytes", "Bytes that the cluster has written to its log; Postgres only."
        )
        if vitals.wal_written_bytes is not None:
            written.add_metric([], vitals.wal_written_bytes)
        yield written
        staged = "Plans and registrations of attempts that are open."
        yield _gauge("shardbook_staging_rows", staged, vitals.staging_rows)
        silent = GaugeMetricFamily(
            "shardbook_run_seconds_since_last_commit",
            "Time since a running session committed, or started; the 500 that were heard of last.",
            labels=("project", "run", "part"),
        )
        for one in vitals.running:
            silent.add_metric([one.project, one.run, one.part], one.silent_s + age_s)
        yield silent


def _gauge(name: str, about: str, value: float | None) -> GaugeMetricFamily:
    """Returns a gauge without labels; None is no sample."""
    family = GaugeMetricFamily(name, about)
    if value is not None:
        family.add_metric([], value)
    return family
