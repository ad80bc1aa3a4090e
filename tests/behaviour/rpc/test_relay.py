"""A relay: what ranks are told through it is what they would be told without, and all of them are one connection."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from shardbook.v1 import catalog_pb2, metadata_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.app import Server
from shardbook_server.connections import count_connections
from shardbook_server.rpc.call import current_call
from tests.behaviour.rpc.api import (
    DEADLINE_S,
    Api,
    Job,
    Payload,
    api_of,
    error_of,
    payload,
    refusal,
    row,
    wait_until,
)
from tests.relays import RelayProcess

#: What a relay carries has nothing to do with the kind of database.
pytestmark = pytest.mark.soak_with("postgres")

_DECIDED = pb.PlanSaveResponse.STATE_DECIDED
_PLAN_SAVE = "/shardbook.v1.RegistrationService/PlanSave"


@pytest.fixture(scope="module")
def relay(server: Server) -> Iterator[RelayProcess]:
    """A relay to the module's server."""
    with RelayProcess(server.address) as relay:
        yield relay


@pytest.fixture(scope="module")
def relayed(relay: RelayProcess) -> Iterator[Api]:
    """Stubs to the relay."""
    with api_of(relay.address) as api:
        yield api


def _told(call: Callable[..., Any], request: Message) -> Any:
    """Returns what a call is told: its answer, or its refusal without what names the call."""
    try:
        return call(request, timeout=DEADLINE_S)
    except grpc.RpcError as error:
        typed = error_of(error)
        facts = {key: value for key, value in typed.metadata.items() if key != "request_id"}
        return type(typed), typed.message, typed.reason, typed.violations, facts, typed.retry_delay_s


def test_it_says_what_to_export_and_is_its_users_alone(relay: RelayProcess, server: Server) -> None:
    """Rule: three lines, the last one for the shell; nobody else on the host can open the socket."""
    expected = [f"upstream  {server.address}", f"address   {relay.address}", f"export SHARDBOOK_SERVER={relay.address}"]
    assert expected == relay.lines
    assert 0o600 == stat.S_IMODE(relay.socket.stat().st_mode)


def test_every_call_is_told_the_same(api: Api, relayed: Api, run: str) -> None:
    """Rule: each relayed call, and those that are passed on, answer as the server does; good and bad requests."""
    job = Job.start(relayed, run)
    world = job.rows()
    for rank, what in enumerate(world):
        job.plan(rank, what)
        job.register(rank, what)
    until = pb.GetCheckpointProgressRequest.UNTIL_REGISTERED
    requests: list[tuple[str, Message]] = [
        ("PlanSave", job.plan_request(0, world[0])),
        ("PlanSave", job.plan_request(7, world[0])),
        ("PlanSave", job.plan_request(0, world[1])),
        ("PlanSave", job.plan_request(0, world[0], wait_s=-1)),
        ("PlanSave", pb.PlanSaveRequest()),
        ("RegisterShards", job.register_request(1, world[1])),
        ("RegisterShards", job.register_request(1, world[0])),
        ("RegisterShards", job.register_request(0, payload([row("new", 0, 2)]), step=2)),
        ("GetCheckpointProgress", pb.GetCheckpointProgressRequest(key=job.key(), until=until)),
        ("GetCheckpointProgress", pb.GetCheckpointProgressRequest(key=job.key(step=99))),
        ("GetCheckpointProgress", pb.GetCheckpointProgressRequest(key=job.key(), until=9)),  # type: ignore[arg-type]
        ("ReportFailure", pb.ReportFailureRequest(key=job.key(3), location=job.location(3), failure=_failure())),
        ("ReportFailure", pb.ReportFailureRequest(key=job.key(3), location=job.location(3))),
        ("CommitCheckpoint", pb.CommitCheckpointRequest(key=job.key())),
        ("CommitCheckpoint", pb.CommitCheckpointRequest(key=job.key(3))),
        ("PlanSave", job.plan_request(0, world[0])),
        ("RegisterShards", job.register_request(1, world[1])),
        ("AbortCheckpoint", pb.AbortCheckpointRequest(key=job.key())),
        ("KeepAlive", pb.KeepAliveRequest(run=run, session=job.session)),
    ]
    for name, request in requests:
        # The relayed one first: where it changes something, the other one is a repetition and says the same.
        first = _told(getattr(relayed.registration, name), request)
        assert first == _told(getattr(api.registration, name), request), (name, request)
    name = f"{run}/parts/default/checkpoints/1"
    wanted = metadata_pb2.GetMetadataRequest(name=name)
    assert list(api.metadata.GetMetadata(wanted)) == list(relayed.metadata.GetMetadata(wanted)) != []
    assert api.catalog.GetRun(catalog_pb2.GetRunRequest(name=run)) == relayed.catalog.GetRun(
        catalog_pb2.GetRunRequest(name=run)
    )
    missing = catalog_pb2.GetRunRequest(name="projects/a/runs/none")
    assert _told(api.catalog.GetRun, missing) == _told(relayed.catalog.GetRun, missing)


def _failure() -> types_pb2.RankFailure:
    return types_pb2.RankFailure(rank=1, host="n1", phase="write", reason="disk full")


def test_request_ids_and_credentials_are_the_callers(relayed: Api, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: each call has its own id and its own authorization, on the stream and beside it, and none has another's."""
    seen: list[tuple[str, str, str]] = []

    def note(*_: object) -> None:
        call = current_call()
        seen.append((call.method.rpartition("/")[2], call.request_id, call.authorization))
        raise KeyError

    monkeypatch.setattr("shardbook_server.rpc.convert.attempt_key", note)
    for at, credentials in enumerate(["Bearer one", "", "Bearer two"]):
        metadata = [("x-request-id", f"id-{at}"), ("x-other", "kept")]
        if credentials:
            metadata.append(("authorization", credentials))
        calls: list[tuple[Any, Message]] = [
            (relayed.registration.GetCheckpointProgress, pb.GetCheckpointProgressRequest()),
            (relayed.registration.CommitCheckpoint, pb.CommitCheckpointRequest()),
        ]
        for call, request in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=tuple(metadata))
            failed: Any = caught.value
            assert grpc.StatusCode.INTERNAL == failed.code()
            assert f"id-{at}" == dict(failed.trailing_metadata())["x-request-id"]
    names = ["GetCheckpointProgress", "CommitCheckpoint"] * 3
    ids = [f"id-{at // 2}" for at in range(6)]
    assert list(zip(names, ids, ["Bearer one"] * 2 + [""] * 2 + ["Bearer two"] * 2, strict=True)) == seen


def test_a_bad_message_fails_alone(relayed: Api, run: str) -> None:
    """Rule: bytes that are no message are refused, and whoever waits on the same stream waits on."""
    job = Job.start(relayed, run)
    world = job.rows()
    job.plan(0, world[0])
    waiting = relayed.registration.PlanSave.future(job.plan_request(0, world[0], wait_s=15), timeout=DEADLINE_S)
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = relayed.channel.unary_unary(_PLAN_SAVE)
    for garbage in (b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"):
        with pytest.raises(grpc.RpcError) as caught:
            call(garbage)
        assert "MALFORMED_REQUEST" == error_of(caught.value).reason
    assert not waiting.done()
    job.plan(1, world[1])
    assert _DECIDED == waiting.result().state


def test_sixty_four_ranks_are_one_connection(server: Server, relay: RelayProcess, api: Api, run: str) -> None:
    """Rule: each rank has a connection to the relay, all of them wait, and the server has one more than without."""
    ranks = 64
    with ExitStack() as opened:
        before = count_connections(server.address)
        apis = [opened.enter_context(api_of(relay.address)) for _ in range(ranks)]
        job = Job.start(apis[0], run, world_size=ranks)
        world = job.rows()
        for rank in range(ranks):
            job.register(rank, world[rank])
        for rank, own in enumerate(apis):
            Job(own, run, ranks, job.session, job.incarnation).plan(rank, world[rank], step=2)
        waits = [
            own.registration.RegisterShards.future(_until_closed(job, rank, world[rank]), timeout=DEADLINE_S)
            for rank, own in enumerate(apis)
        ]
        wait_until(lambda: ranks == job.progress().progress.registered_count)
        # The relay's was open before, or is the one more.
        assert before is not None
        assert count_connections(server.address) in (before, before + 1)
        assert not any(wait.done() for wait in waits)
        assert job.commit().live
        assert {"COMMITTED"} == {_state(wait.result().checkpoint) for wait in waits}


def _until_closed(job: Job, rank: int, what: Payload) -> pb.RegisterShardsRequest:
    request = job.register_request(rank, what)
    request.wait.FromSeconds(15)
    return request


def _state(checkpoint: types_pb2.Checkpoint) -> str:
    return types_pb2.CheckpointState.Name(checkpoint.state).removeprefix("CHECKPOINT_STATE_")


def test_a_rank_that_goes_away_waits_no_more(server: Server, relayed: Api, run: str) -> None:
    """Rule: a call that its rank gave up is given up at the server, too."""
    job = Job.start(relayed, run)
    world = job.rows()
    job.plan(0, world[0])
    waiting = server._waits
    assert 0 == waiting.waiting_count
    future = relayed.registration.PlanSave.future(job.plan_request(0, world[0], wait_s=20), timeout=DEADLINE_S)
    wait_until(lambda: 1 == waiting.waiting_count)
    future.cancel()
    wait_until(lambda: 0 == waiting.waiting_count)


def test_health_is_the_servers(api: Api, relayed: Api) -> None:
    """Rule: a relay serves what its server serves; a watch goes on."""
    request = health_pb2.HealthCheckRequest(service="shardbook.v1.RelayService")
    assert api.health.Check(request) == relayed.health.Check(request)
    watch = relayed.health.Watch(health_pb2.HealthCheckRequest())
    assert health_pb2.HealthCheckResponse.SERVING == next(watch).status
    watch.cancel()


def test_a_relay_drains(server: Server, run: str) -> None:
    """Rule: SIGTERM ends waits UNAVAILABLE after some seconds, lets work end, takes the socket away and exits 0."""
    with RelayProcess(server.address) as relay, api_of(relay.address) as api, ThreadPoolExecutor(1) as pool:
        job = Job.start(api, run)
        what = job.rows()[0]
        job.plan(0, what)
        waiting = pool.submit(_ended, lambda: job.plan(0, what, wait_s=20))
        wait_until(lambda: 1 == server._waits.waiting_count)
        relay.terminate()
        assert grpc.StatusCode.UNAVAILABLE == waiting.result(DEADLINE_S)
        assert 0 == relay.await_exit()
        assert not relay.socket.exists()
        wait_until(lambda: 0 == server._waits.waiting_count)


def _ended(call: Callable[[], object]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    failed: Any = caught.value
    return failed.code()


def test_a_second_relay_is_refused(relay: RelayProcess, server: Server) -> None:
    """Rule: gRPC would take the socket away from the first; a socket that nobody listens on is no obstacle."""
    with RelayProcess(server.address, relay.socket) as second:
        assert 4 == second.await_exit()
    with RelayProcess(server.address) as other:
        other.kill()
        assert other.socket.exists()
        other.start()
        assert other.lines[2]


def test_a_server_that_knows_no_relays_gets_the_calls_one_by_one(server: Server, relay: RelayProcess, run: str) -> None:
    """Rule: during an upgrade a relay may meet an older server; saves go on. A relay is none that relays to others."""
    with RelayProcess(relay.address) as second, api_of(second.address) as api:
        job = Job.start(api, run)
        world = job.rows()
        for rank, what in enumerate(world):
            job.plan(rank, what)
        assert job.save(1, world).live
        assert "INVALID_ARGUMENT" == refusal(api.registration.PlanSave, pb.PlanSaveRequest()).status
