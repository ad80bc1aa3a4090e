"""``/metrics`` after real calls, on both databases."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from shardbook.errors import InternalError
from shardbook.v1 import catalog_pb2, metadata_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.metrics import state
from shardbook_server.metrics.recorder import Recorder
from shardbook_server.service import vitals
from shardbook_server.service.catalog import CatalogService
from shardbook_server.service.services import build_services
from shardbook_server.storage import migrate
from shardbook_server.storage.database import Database
from tests.behaviour.ops.conftest import Ops, running_ops
from tests.behaviour.rpc.api import DEADLINE_S, Job, Payload, payload, refusal, row, wait_until
from tests.behaviour.service import saves
from tests.databases import Databases


def _grown(ops: Ops, name: str, **labels: str) -> Callable[[], float]:
    """Returns a function that says by how much a metric has grown since now."""
    before = ops.sample(name, **labels)
    return lambda: ops.sample(name, **labels) - before


def test_a_save_is_counted(ops: Ops, run: str) -> None:
    """Rule: calls, plans, registrations, commits, their phases, batches, connections and fsyncs of one save."""
    method = partial(_grown, ops, "grpc_server_handled_total", grpc_code="OK", grpc_type="unary")
    grown = {
        "register calls": method(grpc_method="RegisterShards", grpc_service="shardbook.v1.RegistrationService"),
        "commit calls": method(grpc_method="CommitCheckpoint"),
        "begun": _grown(ops, "grpc_server_started_total", grpc_method="CommitCheckpoint"),
        "timed": _grown(ops, "grpc_server_handling_seconds_count", grpc_method="CommitCheckpoint"),
        "registrations": _grown(ops, "shardbook_registrations_total"),
        "plans": _grown(ops, "shardbook_plans_total"),
        "committed": _grown(ops, "shardbook_commits_total", outcome="committed"),
        "repeated": _grown(ops, "shardbook_commits_total", outcome="repeated"),
        "read": _grown(ops, "shardbook_commit_seconds_count", phase="read"),
        "fold": _grown(ops, "shardbook_commit_seconds_count", phase="fold"),
        "transaction": _grown(ops, "shardbook_commit_seconds_count", phase="transaction"),
    }
    entries = _grown(ops, "shardbook_batch_size_sum", kind="registrations")
    waits, fsyncs = _grown(ops, "shardbook_db_pool_wait_seconds_count"), _grown(ops, "shardbook_db_fsync_seconds_count")
    seconds = _grown(ops, "shardbook_db_fsync_seconds_sum")
    job = Job.start(ops.api, run)
    world = job.rows()
    for rank in range(2):
        job.plan(rank, world[rank])
    job.save(1, world)
    job.commit(1)
    expected = dict.fromkeys(grown, 2.0) | {"committed": 1, "repeated": 1, "fold": 1, "transaction": 1}
    # A registration may need two calls: the first is told which blobs are lacking.
    found = {name: value() for name, value in grown.items()}
    assert 2 <= found.pop("register calls") <= 4
    del expected["register calls"]
    assert expected == found
    assert 2 <= entries() <= 4
    assert waits() > fsyncs() >= 5
    assert 0 < seconds() < 30


def test_refusals_are_counted_by_status_and_reason(ops: Ops) -> None:
    """Rule: statuses are spelled as grpc-prometheus does, reasons as in ErrorInfo."""
    status = _grown(ops, "grpc_server_handled_total", grpc_code="NotFound", grpc_method="GetRun")
    missing = _grown(ops, "shardbook_refusals_total", reason="NOT_FOUND")
    error = refusal(ops.api.catalog.GetRun, catalog_pb2.GetRunRequest(name="projects/test/runs/none"))
    assert "NOT_FOUND" == error.reason
    assert (1, 1) == (status(), missing())


def test_a_damaged_database_is_told_to_operators_alone(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: the client is told INTERNAL and a request id; the reason is counted, because an alert looks for it."""

    def fail(*_: object) -> None:
        raise InternalError("the database file is damaged", reason="DATABASE_DAMAGED")

    monkeypatch.setattr(CatalogService, "get_run", fail)
    damaged = _grown(ops, "shardbook_refusals_total", reason="DATABASE_DAMAGED")
    status = _grown(ops, "grpc_server_handled_total", grpc_code="Internal")
    with pytest.raises(grpc.RpcError) as caught:
        ops.api.catalog.GetRun(catalog_pb2.GetRunRequest(name="a/b"))
    assert "damaged" not in str(caught.value.details())
    assert (1, 1) == (damaged(), status())


def test_streams_and_cancelled_calls_are_counted(ops: Ops, run: str) -> None:
    """Rule: a stream is one call of its own type; a client that goes away is Canceled."""
    job = Job.start(ops.api, run)
    job.save(1)
    streamed = _grown(ops, "grpc_server_handled_total", grpc_type="server_stream", grpc_code="OK")
    name = f"{run}/parts/default/checkpoints/1"
    assert list(ops.api.metadata.GetMetadata(metadata_pb2.GetMetadataRequest(name=name), timeout=DEADLINE_S))
    assert 1 == streamed()
    cancelled = _grown(ops, "grpc_server_handled_total", grpc_code="Canceled", grpc_method="PlanSave")
    waiting = ops.api.registration.PlanSave.future(job.plan_request(0, _stored(job), 2, wait_s=20))
    wait_until(lambda: ops.sample("shardbook_waiting_ranks") == 1)
    waiting.cancel()
    wait_until(lambda: cancelled() == 1)
    assert 0 == ops.sample("shardbook_waiting_ranks")


def _stored(job: Job) -> Payload:
    """Returns a payload whose plan the server has."""
    what = job.rows()[0]
    job.plan(0, what, step=2)
    return what


def test_what_ends_attempts_and_sessions_is_counted(ops: Ops, run: str) -> None:
    """Rule: fenced, expired and failed, by a report, by an abort and by wrong geometry; and what nobody registered."""
    fenced, expired, failed, late = (
        _grown(ops, name)
        for name in (
            "shardbook_sessions_fenced_total",
            "shardbook_attempts_expired_total",
            "shardbook_attempts_failed_total",
            "shardbook_unregistered_saves_reported_total",
        )
    )
    bad_geometry = _grown(ops, "shardbook_commits_total", outcome="geometry_hole")
    job = Job.start(ops.api, run)
    assert 0 == fenced()
    world = job.rows()
    failure = types_pb2.RankFailure(rank=0, host="n0", phase="write", reason="no space left")
    request = pb.ReportFailureRequest(key=job.key(1), location=job.location(1), failure=failure)
    ops.api.registration.ReportFailure(request, timeout=DEADLINE_S)
    job.register(0, world[0], step=2)
    ops.api.registration.AbortCheckpoint(pb.AbortCheckpointRequest(key=job.key(2)), timeout=DEADLINE_S)
    holes = [payload([row("w", rank, 3)]) for rank in range(2)]
    for rank in range(2):
        job.register(rank, holes[rank], step=3)
    assert "geometry" in refusal(job.commit, 3).reason.lower()
    assert 3 == failed()
    job.register(0, world[0], step=4)
    successor = Job.start(ops.api, run)
    assert (1, 1) == (fenced(), expired())
    assert 0 == late()
    _record(ops, replace(successor, session=0, incarnation=job.incarnation), step=9)
    assert 1 == late()
    assert bad_geometry() <= 1


def _record(ops: Ops, offline: Job, step: int) -> None:
    request = pb.RecordCheckpointRequest(
        key=offline.key(step), location=offline.location(step), registration_count=2, complete=True, recovered=True
    )
    for rank, what in enumerate(offline.rows()):
        request.registrations.add(rank=rank, structure_digest=what.structure_digest, extents=what.extents)
        request.blobs.extend(what.blobs.values())
    assert ops.api.registration.RecordCheckpoint(request, timeout=DEADLINE_S).checkpoint.recovered


def test_a_commit_that_gives_up_waiting_is_an_outcome(ops: Ops, run: str) -> None:
    """Rule: missing ranks count once, when the caller is told, however often the server looked for them."""
    job = Job.start(ops.api, run)
    job.register(0, job.rows()[0])
    missing = _grown(ops, "shardbook_commits_total", outcome="ranks_missing")
    assert "RANKS_MISSING" == refusal(job.commit, 1, 0.5).reason
    assert 1 == missing()


def test_the_database_is_looked_at_in_the_background(ops: Ops, run: str) -> None:
    """Rule: sizes, staging and running sessions are those of a moment ago, and no scrape asks the database."""
    job = Job.start(ops.api, run)
    world = job.rows()
    time.sleep(0.5)
    staged = ops.sample("shardbook_staging_rows")
    job.plan(0, world[0])
    job.register(0, world[0])
    wait_until(lambda: ops.sample("shardbook_staging_rows") == staged + 2)
    _, project, _, name = run.split("/")
    labels = {"project": project, "run": name, "part": "default"}
    assert 0 < ops.sample("shardbook_run_seconds_since_last_commit", **labels) < 60
    time.sleep(0.6)
    before_s = ops.sample("shardbook_run_seconds_since_last_commit", **labels)
    assert before_s >= 0.5
    job.save(1, world)
    wait_until(lambda: ops.sample("shardbook_run_seconds_since_last_commit", **labels) < before_s)
    wait_until(lambda: ops.sample("shardbook_staging_rows") == staged)
    assert ops.sample("shardbook_database_bytes") > 100_000
    is_postgres = ops.sample("shardbook_build_info", database="postgres") == 1
    assert is_postgres == (ops.sample("shardbook_wal_written_bytes_total") > 0)
    # The test's user owns the Postgres, so it may list the log's files.
    assert ops.sample("shardbook_wal_bytes") > 0
    assert 1 == ops.sample("shardbook_synchronous_commit_info", mode="on" if is_postgres else "full")
    assert 1 == ops.sample("shardbook_build_info", schema=migrate.HEAD)


def test_connections_and_descriptors_are_counted(ops: Ops) -> None:
    """Rule: clients of gRPC, and what the process holds open of what it may."""
    wait_until(lambda: ops.sample("shardbook_connections") == 1)
    assert 0 < ops.sample("process_open_fds") < ops.sample("process_max_fds")


def test_only_so_many_running_sessions_are_watched(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: each is a time series, so there are at most 500: those that were heard of last."""
    monkeypatch.setattr(vitals, "MAX_RUNNING_COUNT", 2)
    now_us = 1_000_000_000
    database = Database(databases.new(), clock=lambda: now_us)
    try:
        services = build_services(database)
        for at in range(3):
            now_us += 10_000_000
            saves.Job(services, saves.Model(2), run=f"projects/p/runs/r{at}").start()
        running = vitals.VitalsService(database).measure().running
    finally:
        database.close()
    assert [("p", "r2", 0.0), ("p", "r1", 10.0)] == [(one.project, one.run, one.silent_s) for one in running]


def test_servers_of_one_process_do_not_mix(tmp_path: Path) -> None:
    """Rule: each server has a registry of its own."""
    with running_ops(tmp_path / "a") as one, running_ops(tmp_path / "b") as other:
        Job.start(one.api, "projects/test/runs/r").save(1)
        assert (1, 0) == tuple(ops.sample("shardbook_commits_total", outcome="committed") for ops in (one, other))


def test_what_was_seen_long_ago_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: a database that is away has no sizes, rather than those of yesterday."""
    sources = state.Sources(lambda: 0, lambda: 0, lambda: 0, dict, lambda: True)
    shown = state.State(state.Build("1", "0002", "sqlite", "full"), sources)
    shown.looked(vitals.Vitals(1, 2, None, 3, (vitals.RunningPart("p", "r", "default", 4.0),)))
    assert {1, 2, 3} <= {sample.value for family in shown.collect() for sample in family.samples}
    monkeypatch.setattr(state, "STALE_S", -1.0)
    names = {sample.name for family in shown.collect() for sample in family.samples}
    assert not {"shardbook_database_bytes", "shardbook_run_seconds_since_last_commit"} & names


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_has_a_label(code: grpc.StatusCode) -> None:
    """Rule: as grpc-prometheus spells it in Go."""
    registry = CollectorRegistry()
    calls = Recorder(registry).method("/shardbook.v1.CatalogService/GetRun", kind="unary")
    calls.began()
    calls.ended(code.name, 0.01)
    labels = {"grpc_type": "unary", "grpc_service": "shardbook.v1.CatalogService", "grpc_method": "GetRun"}
    spelled = {"OK": "OK", "CANCELLED": "Canceled"}.get(code.name, code.name.title().replace("_", ""))
    assert 1 == registry.get_sample_value("grpc_server_handled_total", labels | {"grpc_code": spelled})
