"""What every call passes: parsing, sizes, request ids, bugs; and the services beside ours."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from structlog.testing import capture_logs

from shardbook.errors import FieldViolation, InvalidArgumentError, ShardbookError
from shardbook.v1 import catalog_pb2, registration_pb2
from shardbook_server.app import SERVICES, Server, running_server
from shardbook_server.service.catalog import CatalogService
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, Payload, api_of, error_of, fields, refusal, settings_in

GET_RUN = "/shardbook.v1.CatalogService/GetRun"


def test_health_knows_every_service(api: Api) -> None:
    """Rule: grpc.health.v1 answers for the server and for each service, and not for others."""
    for name in ("", "process", *SERVICES):
        status = api.health.Check(health_pb2.HealthCheckRequest(service=name)).status
        assert health_pb2.HealthCheckResponse.SERVING == status
    with pytest.raises(grpc.RpcError) as unknown:
        api.health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert grpc.StatusCode.NOT_FOUND == unknown.value.code()


def test_bytes_that_are_no_message_are_an_invalid_argument(api: Api) -> None:
    """Rule: garbage, and text that is not UTF-8, is the caller's mistake; gRPC by itself says UNKNOWN."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = api.channel.unary_unary(GET_RUN)
    for garbage in (b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"):
        error = refusal(partial(call, garbage))
        assert ("INVALID_ARGUMENT", "MALFORMED_REQUEST") == (error.status, error.reason)


def test_a_message_beyond_the_limit_is_resource_exhausted(server: Server, api: Api) -> None:
    """Rule: 16 MiB; the transport refuses before it reads the rest, and the connection lives on."""
    big = registration_pb2.AbortCheckpointRequest(reason="x" * (16 << 20))
    with pytest.raises(grpc.RpcError) as refused:
        api.registration.AbortCheckpoint(big)
    assert grpc.StatusCode.RESOURCE_EXHAUSTED == refused.value.code()
    api.health.Check(health_pb2.HealthCheckRequest())


def test_compressed_messages_are_refused(api: Api) -> None:
    """Rule: gRPC inflates before it checks the size, so a small bomb would be a large message."""
    bomb = registration_pb2.AbortCheckpointRequest(reason="x" * (15 << 20))
    with pytest.raises(grpc.RpcError) as refused:
        api.registration.AbortCheckpoint(bomb, compression=grpc.Compression.Gzip)
    assert grpc.StatusCode.UNIMPLEMENTED == refused.value.code()


@pytest.mark.parametrize(("sent", "kept"), [("job-17.rank_3", True), ("two words", False), ("x" * 65, False)])
def test_a_request_has_an_id(api: Api, sent: str, kept: bool) -> None:
    """Rule: the client's id comes back when it is fit for a log line, else a new one, in metadata and ErrorInfo."""
    with pytest.raises(grpc.RpcError) as refused:
        api.catalog.GetRun(catalog_pb2.GetRunRequest(name="?"), metadata=(("x-request-id", sent),))
    failed: Any = refused.value
    trailing = dict(failed.trailing_metadata())
    status = rpc_status.from_call(failed)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    assert trailing["x-request-id"] == info.metadata["request_id"]
    assert kept == (info.metadata["request_id"] == sent)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", info.metadata["request_id"])


@pytest.mark.parametrize("error", [KeyError("password hunter2"), RuntimeError("boom"), AssertionError()])
def test_a_bug_is_internal_with_an_id_and_its_traceback_in_the_log(
    api: Api, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Rule: what we did not raise on purpose tells the client nothing but where to look."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(CatalogService, "get_run", fail)
    with capture_logs() as logs, pytest.raises(grpc.RpcError) as caught:
        api.catalog.GetRun(catalog_pb2.GetRunRequest(name="a/b"), metadata=(("x-request-id", "id-1"),))
    assert grpc.StatusCode.INTERNAL == caught.value.code()
    assert "hunter2" not in str(caught.value.details())
    assert "id-1" in str(caught.value.details())
    assert [("bug", "error", "id-1", error)] == [
        (line["event"], line["log_level"], line["request_id"], line["exc_info"]) for line in logs
    ]


def test_reflection_is_off_unless_asked_for(api: Api, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rule: `--reflection` serves the descriptors of every service; without it there is nothing."""
    new_stub: Any = reflection_pb2_grpc.ServerReflectionStub
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError) as absent:
        next(new_stub(api.channel).ServerReflectionInfo(iter([request])))
    assert grpc.StatusCode.UNIMPLEMENTED == absent.value.code()
    settings = settings_in(tmp_path_factory.mktemp("reflection"), reflection=True)
    with running_server(settings) as server, api_of(server.address) as reflecting:
        answer = next(new_stub(reflecting.channel).ServerReflectionInfo(iter([request])))
    listed = {service.name for service in answer.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= listed


def test_a_world_that_calls_at_the_same_moment_is_answered(api: Api) -> None:
    """Rule: thousands of calls at once queue; gRPC's default cancels some of more than 1,000 at random."""
    request = catalog_pb2.GetRunRequest(name="projects/test/runs/none")
    calls = [api.catalog.GetRun.future(request, timeout=DEADLINE_S) for _ in range(1_500)]
    assert {"NOT_FOUND"} == {refusal(call.result).status for call in calls}


def test_a_connection_that_is_asked_to_reconnect_loses_no_call(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rule: max_connection_age moves clients on between calls; what is in progress has its grace."""
    settings = settings_in(tmp_path_factory.mktemp("age"), max_connection_age_s=0.2, max_connection_age_grace_s=5)
    with running_server(settings) as server, api_of(server.address) as api:
        job = Job.start(api, "projects/test/runs/r")
        what = job.rows()[0]
        began = time.monotonic()
        waiting = api.registration.PlanSave.future(job.plan_request(0, what, wait_s=1.2), timeout=DEADLINE_S)
        while time.monotonic() < began + 1.2:
            job.plan(0, what)
            job.register(0, what)
        answer = waiting.result()
        assert answer.state != registration_pb2.PlanSaveResponse.STATE_DECIDED


def test_a_wait_that_is_negative_names_its_field(api: Api) -> None:
    """Rule: also the edge's own checks say which field."""
    request = registration_pb2.CommitCheckpointRequest()
    request.wait.seconds = -1
    assert ["wait"] == fields(refusal(lambda: api.registration.CommitCheckpoint(request)))


@pytest.mark.parametrize("text", ["x", "\u00e9" * 400, "\ud800" * 400], ids=["short", "long", "surrogates"])
def test_five_thousand_violations_arrive_as_invalid_argument(
    api: Api, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Rule: an error is cut to what gRPC's headers carry; beyond it the client sees INTERNAL of the transport."""

    def fail(*_: object) -> None:
        violations = [FieldViolation(f"registrations[{at}].rank", text) for at in range(5_000)]
        raise InvalidArgumentError(text * 10, violations=violations, metadata={"hosts": text * 10})

    monkeypatch.setattr(CatalogService, "get_run", fail)
    error = refusal(api.catalog.GetRun, catalog_pb2.GetRunRequest(name="a/b"))
    assert "INVALID_ARGUMENT" == error.status
    assert 1 <= len(error.violations) <= 50
    assert ("true", "5000") == (error.metadata["truncated"], error.metadata["violation_count"])


def test_a_server_that_is_full_says_when_to_come_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rule: every limit answers RESOURCE_EXHAUSTED with RetryInfo, and waiters do not keep out what they wait for."""
    settings = settings_in(tmp_path_factory.mktemp("full"), waiter_limit=1, worker_threads=1, heavy_threads=1)
    with running_server(settings) as server, api_of(server.address) as api:
        job = Job.start(api, "projects/test/runs/full", world_size=3)
        world = job.rows()
        job.plan(0, world[0])
        first = api.registration.PlanSave.future(job.plan_request(0, world[0], wait_s=15), timeout=DEADLINE_S)
        end_s = time.monotonic() + 10
        while (error := _full(job, world[0])) is None:
            assert time.monotonic() < end_s
        assert "WAITERS_FULL" == error.reason
        assert error.retry_delay_s is not None
        job.plan(1, world[1])
        job.plan(2, world[2])
        assert registration_pb2.PlanSaveResponse.STATE_DECIDED == first.result().state


def _full(job: Job, what: Payload) -> ShardbookError | None:
    """Returns the refusal of a further waiter; None while there is room for it."""
    try:
        job.plan(0, what, wait_s=0.05)
    except grpc.RpcError as error:
        return error_of(error)
    return None
