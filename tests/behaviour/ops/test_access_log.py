"""Which calls get a log line, and what stands in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from shardbook.v1 import catalog_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.observer import SILENT
from shardbook_server.rpc.call import Call
from shardbook_server.rpc.watch import BURST_LINES, BURST_S, AccessLog, Watch
from tests.behaviour.ops.conftest import Ops, running_ops
from tests.behaviour.rpc.api import DEADLINE_S, Job, refusal, wait_until

RUN = "projects/test/runs/r"
EVENTS = {"answered", "bug", "cancelled", "failed", "refused", "slow"}


@contextmanager
def _lines() -> Iterator[list[Any]]:
    """Log lines of calls that are written within the block."""
    found: list[Any] = []
    with capture_logs() as logs:
        yield found
    found.extend(line for line in logs if line["event"] in EVENTS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ops]:
    """A server that logs problems, as it does by default."""
    with running_ops(tmp_path_factory.mktemp("log")) as ops:
        yield ops


def test_a_refused_call_gets_one_line_without_what_was_sent(quick: Ops) -> None:
    """Rule: who, what, which status, why, how long; nothing of the request, which may hold a secret."""
    request = catalog_pb2.GetRunRequest(name="password=hunter2")
    with _lines() as lines:
        refusal(lambda: quick.api.catalog.GetRun(request, metadata=(("x-request-id", "id-1"),)))
    (line,) = lines
    assert line.pop("duration_ms") >= 0
    assert {
        "event": "refused",
        "log_level": "info",
        "method": "/shardbook.v1.CatalogService/GetRun",
        "request_id": "id-1",
        "principal": "",
        "code": "INVALID_ARGUMENT",
        "reason": "INVALID_NAME",
        "waited_ms": 0.0,
    } == line


def test_calls_that_went_well_are_not_worth_a_line(quick: Ops) -> None:
    """Rule: `problems` is quiet while all is well, however long ranks wait for each other."""
    with _lines() as lines:
        job = Job.start(quick.api, RUN)
        what = job.rows()[0]
        job.plan(0, what)
        job.plan(0, what, wait_s=1.3)
        quick.api.registration.KeepAlive(
            pb.KeepAliveRequest(run=RUN, session=job.session, incarnation=job.incarnation), timeout=DEADLINE_S
        )
    assert [] == lines


def test_a_cancelled_call_gets_a_line(quick: Ops) -> None:
    """Rule: whoever went away is told of."""
    job = Job.start(quick.api, RUN)
    what = job.rows()[0]
    job.plan(0, what)
    with capture_logs() as lines:
        waiting = quick.api.registration.PlanSave.future(job.plan_request(0, what, wait_s=20), timeout=DEADLINE_S)
        wait_until(lambda: quick.sample("shardbook_waiting_ranks") == 1)
        waiting.cancel()
        wait_until(lambda: any(line["event"] == "cancelled" for line in lines))
    assert [("cancelled", "CANCELLED", "")] == [(line["event"], line["code"], line["reason"]) for line in lines]


def test_a_slow_call_gets_a_line(tmp_path: Path) -> None:
    """Rule: more than a second of the server's own time is a warning, though the call went well."""
    with running_ops(tmp_path, failpoints="abort.after_db=sleep(1.2)") as ops, _lines() as lines:
        job = Job.start(ops.api, RUN)
        job.register(0, job.rows()[0])
        ops.api.registration.AbortCheckpoint(pb.AbortCheckpointRequest(key=job.key()), timeout=DEADLINE_S)
    (line,) = lines
    assert ("slow", "warning", "OK", "") == (line["event"], line["log_level"], line["code"], line["reason"])
    assert line["duration_ms"] > 1_200


def test_a_storm_of_the_same_trouble_is_counted_not_written(tmp_path: Path) -> None:
    """Rule: thousands of ranks that meet the same refusal do not fill the disk; other refusals still get a line."""
    with running_ops(tmp_path) as ops, _lines() as lines:
        for _ in range(3 * BURST_LINES):
            refusal(ops.api.catalog.GetRun, catalog_pb2.GetRunRequest(name="?"))
        refusal(ops.api.catalog.GetRun, catalog_pb2.GetRunRequest(name="projects/test/runs/none"))
    reasons = [line["reason"] for line in lines if line["event"] == "refused"]
    assert BURST_LINES == reasons.count(reasons[0])
    assert 1 == len(reasons) - reasons.count(reasons[0])


def test_what_was_not_written_is_told_with_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: the count of calls without a line is in the log once lines are written again."""
    watch = Watch("/m", SILENT, AccessLog.PROBLEMS, kind="unary")
    now_s = [1000.0]
    monkeypatch.setattr("shardbook_server.rpc.watch.time.monotonic", lambda: now_s[0])
    with capture_logs() as lines:
        for _ in range(BURST_LINES + 7):
            watch.cancelled(Call("/m", "r", math.inf), 0.0)
        now_s[0] += BURST_S
        watch.cancelled(Call("/m", "r", math.inf), 0.0)
    assert BURST_LINES + 1 == len(lines)
    assert 7 == lines[-1]["unsaid_before"]
    assert "unsaid_before" not in lines[-2]


def test_the_server_s_own_trouble_is_a_warning(tmp_path: Path) -> None:
    """Rule: what is no mistake of the caller's is told of with its message, which is the server's own."""
    with running_ops(tmp_path, waiter_limit=1) as ops, _lines() as lines:
        job = Job.start(ops.api, RUN, world_size=3)
        what = job.rows()[0]
        job.plan(0, what)
        first = ops.api.registration.PlanSave.future(job.plan_request(0, what, wait_s=5), timeout=DEADLINE_S)
        wait_until(lambda: ops.sample("shardbook_waiting_ranks") == 1)
        assert "WAITERS_FULL" == refusal(ops.api.registration.PlanSave, job.plan_request(0, what, wait_s=5)).reason
        first.cancel()
    failed = [line for line in lines if line["event"] == "failed"]
    assert [("warning", "RESOURCE_EXHAUSTED", "WAITERS_FULL")] == [
        (line["log_level"], line["code"], line["reason"]) for line in failed
    ]
    assert "calls wait" in failed[0]["message"]


@pytest.mark.parametrize(("access_log", "events"), [("all", ["answered", "refused"]), ("none", [])])
def test_the_setting_says_which_calls(tmp_path: Path, access_log: str, events: list[str]) -> None:
    """Rule: `all` has a line for each call, `none` for no call."""
    with running_ops(tmp_path, access_log=access_log) as ops, _lines() as lines:
        ops.api.catalog.ListRuns(catalog_pb2.ListRunsRequest(parent="projects/test"), timeout=DEADLINE_S)
        refusal(ops.api.catalog.GetRun, catalog_pb2.GetRunRequest(name="?"))
    assert events == [line["event"] for line in lines]
