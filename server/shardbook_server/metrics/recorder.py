"""Counters and histograms: what the parts of the server say to their observer."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from shardbook_server.observer import MethodObserver, Observer

#: Calls: an empty one takes a quarter of a millisecond, a waiting one up to 20 s.
_CALL_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: Commits: known structures take milliseconds, assembly of a large one seconds.
_COMMIT_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
#: What is mostly an fsync, or the wait for a connection.
_DISK_BUCKETS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
_BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_METHOD_LABELS: Final = ("grpc_type", "grpc_service", "grpc_method")
#: Reasons that alerts look for: they exist from the start, or the first of each would be no increase.
WATCHED_REASONS: Final = (
    "DATABASE_DAMAGED",
    "INTERNAL",
    "QUEUE_FULL",
    "SERVER_BUSY",
    "SESSION_FENCED",
    "STORAGE_FULL",
    "WAITERS_FULL",
)
_PHASES: Final = ("read", "fold", "transaction")


# When a series was made is of no use to anybody, and would be a second series of each.
disable_created_metrics()  # type: ignore[no-untyped-call]  # published with types, not for this one


class _Calls(MethodObserver):
    """Numbers of one method, looked up once."""

    def __init__(self, started: Counter, handled: Counter, handling: Histogram, labels: tuple[str, str, str]) -> None:
        self._started = started.labels(*labels)
        self._handled = handled
        self._labels = labels
        self._seconds = handling.labels(*labels)
        # The common one exists from the start, so that its first rate is right.
        self._by_code = {"OK": handled.labels(*labels, "OK")}

    def began(self) -> None:
        """Counts a call."""
        self._started.inc()

    def ended(self, code: str, duration_s: float) -> None:
        """Counts an answer and its time."""
        counter = self._by_code.get(code)
        if counter is None:
            counter = self._by_code[code] = self._handled.labels(*self._labels, _as_go_spells(code))
        counter.inc()
        self._seconds.observe(duration_s)


class Recorder(Observer):
    """Counts what happens, in a registry. Thread-safe.

    Args:
        registry: The server's own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("grpc_server_started", "Calls that were begun.", _METHOD_LABELS, registry=registry)
        self._handled = Counter(
            "grpc_server_handled",
            "Calls that ended, by status.",
            (*_METHOD_LABELS, "grpc_code"),
            registry=registry,
        )
        self._handling = Histogram(
            "grpc_server_handling_seconds",
            "Time from a call to its answer, its waiting for others included.",
            _METHOD_LABELS,
            buckets=_CALL_BUCKETS_S,
            registry=registry,
        )
        self._refusals = Counter(
            "shardbook_refusals", "Calls that ended with an error, by its reason.", ("reason",), registry=registry
        )
        for reason in WATCHED_REASONS:
            self._refusals.labels(reason)
        self._registrations = Counter(
            "shardbook_registrations", "Registrations that became durable, repeated ones included.", registry=registry
        )
        self._plans = Counter(
            "shardbook_plans", "Plans that became durable, repeated ones included.", registry=registry
        )
        self._batch_size = Histogram(
            "shardbook_batch_size",
            "Entries of a batch: calls that shared one transaction, or one look.",
            ("kind",),
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self._add_commits(registry)
        self._add_attempts(registry)
        self._add_database(registry)

    def _add_commits(self, registry: CollectorRegistry) -> None:
        self._commits = Counter(
            "shardbook_commits",
            "Commits by outcome: committed, repeated, or the reason of the refusal.",
            ("outcome",),
            registry=registry,
        )
        seconds = Histogram(
            "shardbook_commit_seconds",
            "Time of a commit by phase: read the registrations, fold (assemble what is new, pack), transaction.",
            ("phase",),
            buckets=_COMMIT_BUCKETS_S,
            registry=registry,
        )
        self._phases = {phase: seconds.labels(phase) for phase in _PHASES}
        self._commits.labels("committed")

    def _add_attempts(self, registry: CollectorRegistry) -> None:
        self._fenced = Counter(
            "shardbook_sessions_fenced",
            "Sessions that a later one replaced; writes of the old one are refused from then on.",
            registry=registry,
        )
        self._expired = Counter(
            "shardbook_attempts_expired",
            "Open attempts that expired: their writers' lease ended, or a later session came.",
            registry=registry,
        )
        self._failed = Counter(
            "shardbook_attempts_failed",
            "Attempts that failed: a rank said so, the geometry is wrong, or they were aborted.",
            registry=registry,
        )
        self._late = Counter(
            "shardbook_unregistered_saves_reported",
            "Saves that could not be registered while they were made, and were recorded later.",
            registry=registry,
        )

    def _add_database(self, registry: CollectorRegistry) -> None:
        self._pool_wait = Histogram(
            "shardbook_db_pool_wait_seconds",
            "Time until a thread had a connection to the database.",
            buckets=_DISK_BUCKETS_S,
            registry=registry,
        )
        self._fsync = Histogram(
            "shardbook_db_fsync_seconds",
            "Time of the COMMIT of write transactions, which is mostly the fsync.",
            buckets=_DISK_BUCKETS_S,
            registry=registry,
        )

    def method(self, name: str, *, kind: str) -> MethodObserver:
        """Returns who counts the calls of a method."""
        service, _, method = name.removeprefix("/").rpartition("/")
        labels = (kind, service, method)
        return _Calls(self._started, self._handled, self._handling, labels)

    def refused(self, reason: str) -> None:
        """Counts an error by its reason; reasons are a fixed set of the code's."""
        self._refusals.labels(reason).inc()

    def batch(self, kind: str, count: int) -> None:
        """Counts a batch."""
        self._batch_size.labels(kind).observe(count)

    def registered(self, count: int) -> None:
        """Counts registrations."""
        self._registrations.inc(count)

    def planned(self, count: int) -> None:
        """Counts plans."""
        self._plans.inc(count)

    def commit_phase(self, phase: str, duration_s: float) -> None:
        """Times a phase of a commit."""
        self._phases[phase].observe(duration_s)

    def commit_ended(self, outcome: str) -> None:
        """Counts a commit."""
        self._commits.labels(outcome).inc()

    def recorded_late(self) -> None:
        """Counts a save that was recorded later."""
        self._late.inc()

    def session_fenced(self) -> None:
        """Counts a session that was replaced."""
        self._fenced.inc()

    def attempts_expired(self, count: int) -> None:
        """Counts expired attempts."""
        self._expired.inc(count)

    def attempt_failed(self) -> None:
        """Counts a failed attempt."""
        self._failed.inc()

    def connection_taken(self, wait_s: float) -> None:
        """Times the wait for a connection."""
        self._pool_wait.observe(wait_s)

    def transaction_committed(self, duration_s: float) -> None:
        """Times a COMMIT."""
        self._fsync.observe(duration_s)


def _as_go_spells(code: str) -> str:
    """Returns a status as grpc-prometheus labels it, which ready-made dashboards and alerts look for."""
    if code in ("OK", "CANCELLED"):
        return {"OK": "OK", "CANCELLED": "Canceled"}[code]
    return "".join(word.capitalize() for word in code.split("_"))
