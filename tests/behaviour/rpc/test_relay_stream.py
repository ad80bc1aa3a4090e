"""A relay's stream when things go wrong: servers that restart, drain, are away or full, and messages that are none."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import status_pb2

from shardbook.core.limits import MAX_RELAYED_CALLS
from shardbook.errors import ShardbookError
from shardbook.v1 import catalog_pb2, relay_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.app import running_server
from shardbook_server.failpoints import Failpoints
from tests.behaviour.rpc.api import (
    DEADLINE_S,
    Api,
    Job,
    api_of,
    refusal,
    settings_in,
    wait_until,
)
from tests.databases import Databases
from tests.relays import RelayProcess

_DECIDED = pb.PlanSaveResponse.STATE_DECIDED
_PLAN_SAVE = "/shardbook.v1.RegistrationService/PlanSave"


def test_a_server_that_restarts_in_mid_wait_is_waited_for(tmp_path: Path, databases: Databases) -> None:
    """Rule: the wait ends with a refusal that may be repeated, or goes on over the next stream; the save goes on."""
    url = databases.new()
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        with running_server(settings_in(tmp_path, database_url=url)) as first:
            address = first.address
            relay = stack.enter_context(RelayProcess(address))
            api = stack.enter_context(api_of(relay.address))
            job = Job.start(api, "projects/test/runs/r")
            world = job.rows()
            job.plan(0, world[0])
            waiting = pool.submit(_patiently, lambda: job.plan(0, world[0], wait_s=15))
            wait_until(lambda: 1 == first._waits.waiting_count)
        with running_server(settings_in(tmp_path, database_url=url, listen=address)):
            _patiently(lambda: job.plan(1, world[1]))
            assert _DECIDED == waiting.result(DEADLINE_S).state
            assert job.save(1, world).live


def _patiently(call: Callable[[], Any]) -> Any:
    """Repeats a call while the service is away, as clients do."""
    end_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            failed: Any = error
            assert grpc.StatusCode.UNAVAILABLE == failed.code(), failed.details()
            assert time.monotonic() < end_s
            time.sleep(0.1)


def test_a_server_that_is_away_is_told_at_once() -> None:
    """Rule: UNAVAILABLE within about a second, then at once, without RetryInfo: to a rank it is an outage as ever."""
    with RelayProcess("127.0.0.1:1") as lonely, api_of(lonely.address) as api:
        took_s = []
        for _ in range(3):
            began_s = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                api.registration.PlanSave(pb.PlanSaveRequest(), timeout=DEADLINE_S)
            failed: Any = caught.value
            took_s.append(time.monotonic() - began_s)
            assert grpc.StatusCode.UNAVAILABLE == failed.code()
            assert "grpc-status-details-bin" not in dict(failed.trailing_metadata() or ())
        assert max(took_s) < 5
        with pytest.raises(grpc.RpcError) as passed:
            api.catalog.GetRun(catalog_pb2.GetRunRequest(), timeout=DEADLINE_S)
        assert grpc.StatusCode.UNAVAILABLE == passed.value.code()


def test_a_draining_server_ends_relayed_waits_and_finishes_writes(tmp_path: Path) -> None:
    """Rule: as for calls of their own: DRAINING with RetryInfo, and what has begun is answered."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        slow = Failpoints.parse("register.before_db=sleep(1)")
        with running_server(settings_in(tmp_path, drain_s=20, reap_interval_s=600), failpoints=slow) as server:
            relay = stack.enter_context(RelayProcess(server.address))
            api = stack.enter_context(api_of(relay.address))
            job = Job.start(api, "projects/test/runs/r")
            what = job.rows()[0]
            job.plan(0, what)
            waiting = pool.submit(refusal, job.plan, 0, what, 1, 20)
            wait_until(lambda: 1 == server._waits.waiting_count)
            request = job.register_request(0, what)
            request.blobs.extend(what.blobs.values())
            writing = pool.submit(api.registration.RegisterShards, request, timeout=DEADLINE_S)
            wait_until(lambda: server._bridge.pending_count > 0 or bool(server._bridge._running))
            began_s = time.monotonic()
        # The stream does not hold up the drain.
        assert time.monotonic() - began_s < 10
        assert not writing.result(DEADLINE_S).unknown
        error: ShardbookError = waiting.result(DEADLINE_S)
        assert ("UNAVAILABLE", "DRAINING") == (error.status, error.reason)
        assert error.retry_delay_s is not None


def test_connections_that_are_asked_to_reconnect_lose_no_wait(tmp_path: Path) -> None:
    """Rule: a stream that is cut at its connection's age is opened again, and what waited on it waits on."""
    settings = settings_in(tmp_path, max_connection_age_s=1.5, max_connection_age_grace_s=0.3)
    with (
        running_server(settings) as server,
        RelayProcess(server.address) as relay,
        api_of(relay.address) as api,
    ):
        job = Job.start(api, "projects/test/runs/r")
        world = job.rows()
        job.plan(0, world[0])
        waiting = api.registration.PlanSave.future(job.plan_request(0, world[0], wait_s=20), timeout=DEADLINE_S)
        time.sleep(5)
        assert not waiting.done()
        _patiently(lambda: job.plan(1, world[1]))
        assert _DECIDED == waiting.result().state


def test_frames_that_no_relay_of_ours_sends_fail_alone(api: Api, run: str) -> None:
    """Rule: no call, an unknown one, bytes that are no message: each is refused, the rest of the stream answered."""
    stream: Any = api.channel.stream_stream("/shardbook.v1.RelayService/Relay")
    job = Job.start(api, run)
    good = relay_pb2.RelayedCall(id=3, request_id="third")
    good.get_checkpoint_progress.key.CopyFrom(job.key(step=99))
    late = relay_pb2.RelayedCall(id=5, plan_save=job.plan_request(0, job.rows()[0], wait_s=0))
    late.timeout.FromNanoseconds(0)
    frames = [
        b"\xff\xff",
        relay_pb2.RelayRequest(calls=[relay_pb2.RelayedCall(id=2), good]).SerializeToString(),
        relay_pb2.RelayRequest(
            calls=[relay_pb2.RelayedCall(id=9, cancel=relay_pb2.RelayedCancel())]
        ).SerializeToString(),
        relay_pb2.RelayRequest(calls=[late]).SerializeToString(),
    ]
    answers = [
        answer
        for payload in stream(iter(frames), timeout=DEADLINE_S)
        for answer in relay_pb2.RelayResponse.FromString(payload).answers
    ]
    codes = {answer.id: status_pb2.Status.FromString(answer.status).code for answer in answers}
    invalid, missing, too_late = (
        code.value[0]
        for code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
    )
    assert {0: invalid, 2: invalid, 3: missing, 5: too_late} == codes
    assert ["third"] == [answer.request_id for answer in answers if answer.id == 3]


def test_relayed_calls_are_counted_as_their_methods(tmp_path: Path) -> None:
    """Rule: numbers by method are those of all calls, whichever way they came; a full server says so."""
    settings = settings_in(tmp_path, http_listen="127.0.0.1:0", max_concurrent_rpcs=8)
    with running_server(settings) as server, RelayProcess(server.address) as relay, api_of(relay.address) as api:
        job = Job.start(api, "projects/test/runs/r", world_size=20)
        what = job.rows()
        job.plan(0, what[0])
        waits = [
            api.registration.PlanSave.future(job.plan_request(0, what[0], wait_s=5), timeout=DEADLINE_S)
            for _ in range(8)
        ]
        wait_until(lambda: 8 == server._waits.waiting_count)
        error = refusal(job.progress, 1)
        assert ("RESOURCE_EXHAUSTED", "SERVER_BUSY") == (error.status, error.reason)
        assert error.retry_delay_s is not None
        for wait in waits:
            wait.cancel()
        wait_until(lambda: 0 == server._waits.waiting_count)
        job.progress(1)
        page = httpx.get(f"http://{server.http_address}/metrics", timeout=10).text
    names = '{{grpc_code="{}",grpc_method="{}",grpc_service="shardbook.v1.RegistrationService",grpc_type="unary"}}'
    for code, method in (("OK", "GetCheckpointProgress"), ("Canceled", "PlanSave")):
        assert f"grpc_server_handled_total{names.format(code, method)}" in page


def test_a_stream_is_read_no_further_than_its_bound(tmp_path: Path) -> None:
    """Rule: 1,024 calls of a stream in progress; those beyond are read, and answered, once there is room for them."""
    count = MAX_RELAYED_CALLS + 50
    with running_server(settings_in(tmp_path)) as server, api_of(server.address) as api:
        job = Job.start(api, "projects/test/runs/r")
        job.register(0, job.rows()[0])
        stream: Any = api.channel.stream_stream("/shardbook.v1.RelayService/Relay")
        until = pb.GetCheckpointProgressRequest(
            key=job.key(), until=pb.GetCheckpointProgressRequest.UNTIL_CLOSED, wait={"seconds": 20}
        )
        frame = relay_pb2.RelayRequest(
            calls=[relay_pb2.RelayedCall(id=at + 1, get_checkpoint_progress=until) for at in range(count)]
        )
        answering = stream(iter([frame.SerializeToString()]), timeout=DEADLINE_S)
        most = 0
        wait_until(lambda: MAX_RELAYED_CALLS <= server._waits.waiting_count)
        # What they all wait for.
        api.registration.AbortCheckpoint(pb.AbortCheckpointRequest(key=job.key()), timeout=DEADLINE_S)
        numbers: set[int] = set()
        for payload in answering:
            most = max(most, server._waits.waiting_count)
            numbers |= {answer.id for answer in relay_pb2.RelayResponse.FromString(payload).answers}
        assert set(range(1, count + 1)) == numbers
        assert most <= MAX_RELAYED_CALLS
