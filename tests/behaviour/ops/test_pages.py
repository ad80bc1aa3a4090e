"""``/healthz``, ``/readyz`` and the way HTTP lives beside gRPC."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from grpc_health.v1 import health_pb2

from shardbook.errors import UnavailableError
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook_server.app import SERVICES, running_server, serving
from shardbook_server.rpc.health import PROCESS
from shardbook_server.storage import migrate
from tests.behaviour.ops.conftest import Ops, running_ops
from tests.behaviour.rpc.api import Job, api_of, settings_in, wait_until
from tests.postgres import Cluster

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_running_server_is_alive_and_ready(ops: Ops) -> None:
    """Rule: both probes are 200, for GET and HEAD; other methods and pages are not there."""
    for page in ("/healthz", "/readyz"):
        assert (200, "ok\n") == (ops.http.get(page).status_code, ops.http.get(page).text)
        assert 200 == ops.http.head(page).status_code
        assert 405 == ops.http.post(page).status_code
    assert 404 == ops.http.get("/").status_code


# ---------------------------------------------------------------- the database stands still


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Postgres of the module's own, that may be frozen."""
    cluster = Cluster()
    yield cluster
    cluster.remove()


def test_a_database_that_stands_still_takes_readiness_away_until_it_is_back(cluster: Cluster, tmp_path: Path) -> None:
    """Rule: /readyz is 503 and gRPC health NOT_SERVING while no ping is answered; the process stays alive and told."""
    migrate.upgrade(cluster.url)
    with running_ops(tmp_path, database_url=cluster.url) as ops:
        watch = ops.api.health.Watch(health_pb2.HealthCheckRequest())
        assert SERVING == next(watch).status
        cluster.freeze()
        try:
            wait_until(lambda: ops.http.get("/readyz").status_code == 503, within_s=15)
            began_s = time.monotonic()
            assert "the database has not answered" in ops.http.get("/readyz").text
            assert 200 == ops.http.get("/healthz").status_code
            assert 0 == ops.sample("shardbook_ready")
            assert NOT_SERVING == next(watch).status
            for name, expected in (("", NOT_SERVING), (SERVICES[0], NOT_SERVING), (PROCESS, SERVING)):
                assert expected == ops.api.health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert time.monotonic() - began_s < 2, "a page waited for the database"
        finally:
            cluster.thaw()
        wait_until(lambda: ops.http.get("/readyz").status_code == 200, within_s=15)
        assert SERVING == next(watch).status
        assert 1 == ops.sample("shardbook_ready")
        assert Job.start(ops.api, "projects/test/runs/r").save(1).live


def test_a_server_ends_though_its_database_never_answers(cluster: Cluster, tmp_path: Path) -> None:
    """Rule: the threads that look at the database hold up no drain."""
    migrate.upgrade(cluster.url)
    with running_server(settings_in(tmp_path, database_url=cluster.url, http_listen="127.0.0.1:0")) as server:
        cluster.freeze()
        try:
            url = f"http://{server.http_address}/readyz"
            wait_until(lambda: httpx.get(url, timeout=10).status_code == 503, within_s=15)
            began_s = time.monotonic()
            asyncio.run_coroutine_threadsafe(server._operations.close(), server._reaper.get_loop()).result(10)  # type: ignore[union-attr]
            assert time.monotonic() - began_s < 5
        finally:
            cluster.thaw()


# ---------------------------------------------------------------- drain


def test_a_draining_server_is_not_ready_and_still_answers_pages(tmp_path: Path) -> None:
    """Rule: 503 from the first moment of the drain, while calls in progress finish; then HTTP is gone."""
    with ThreadPoolExecutor(2) as pool:
        with running_ops(tmp_path, failpoints="abort.after_db=sleep(1.5)") as ops:
            address = ops.server.http_address
            job = Job.start(ops.api, "projects/test/runs/r")
            job.register(0, job.rows()[0])
            # Its own connection: that of the block ends with the block.
            ending = pool.submit(_abort, ops.server.address, job)
            told = pool.submit(_readiness_until_gone, f"http://{address}/readyz")
            time.sleep(0.5)
            # Leaving the block begins the drain.
        assert types_pb2.CHECKPOINT_STATE_FAILED == ending.result(10)
        answers = told.result(10)
    assert (200, 503) == (answers[0], answers[-1])
    assert sorted(answers) == answers, "it became ready again"


def _abort(address: str, job: Job) -> int:
    with api_of(address) as api:
        request = pb.AbortCheckpointRequest(key=job.key())
        return int(api.registration.AbortCheckpoint(request, timeout=20).checkpoint.state)


def _readiness_until_gone(url: str) -> list[int]:
    answers: list[int] = []
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        try:
            answers.append(httpx.get(url, timeout=5).status_code)
        except httpx.TransportError:
            return answers
        time.sleep(0.02)
    raise AssertionError("HTTP was not closed")


def test_an_idle_connection_holds_up_no_drain(tmp_path: Path) -> None:
    """Rule: a scraper keeps its connection open between scrapes; the server ends all the same."""
    with httpx.Client() as scraper:
        with running_server(settings_in(tmp_path, http_listen="127.0.0.1:0")) as server:
            assert 200 == scraper.get(f"http://{server.http_address}/metrics").status_code
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 4


# ---------------------------------------------------------------- addresses and signals


@pytest.mark.parametrize("spelled", ["", "off"])
def test_http_can_be_switched_off(tmp_path: Path, spelled: str) -> None:
    """Rule: empty, or `off` where an empty variable means unset, is no HTTP; gRPC is served as ever."""
    with running_server(settings_in(tmp_path, http_listen=spelled)) as server:
        assert "" == server.http_address
        assert server.address


def test_an_address_that_is_taken_is_refused_by_name(ops: Ops, tmp_path: Path) -> None:
    """Rule: ADDRESS_UNAVAILABLE names the flag that helps; nothing is left bound."""
    for listen in (ops.server.http_address, "no-such-host.invalid:1"):
        settings = settings_in(tmp_path, http_listen=listen)
        with pytest.raises(UnavailableError) as refused, running_server(settings):
            pass
        assert "ADDRESS_UNAVAILABLE" == refused.value.reason
        assert "--http-listen" in refused.value.message
        assert listen in refused.value.message
    # The refused server let go of everything: the next one starts over the same database.
    with running_ops(tmp_path) as next_one:
        assert 200 == next_one.http.get("/readyz").status_code


def test_http_is_closed_when_grpc_cannot_be_served(ops: Ops, tmp_path: Path) -> None:
    """Rule: HTTP is bound first; a server that is refused its other address leaves nothing behind."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = settings_in(tmp_path, listen=ops.server.address, http_listen=listen)
    with pytest.raises(UnavailableError) as refused, running_server(settings):
        pass
    assert "--listen" in refused.value.message
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{listen}/healthz")


def test_http_speaks_over_ipv6_too(tmp_path: Path) -> None:
    """Rule: `[ipv6]:port` is an address like any other."""
    with running_server(settings_in(tmp_path, http_listen="[::1]:0")) as server:
        assert server.http_address.startswith("[::1]:")
        assert 200 == httpx.get(f"http://{server.http_address}/healthz").status_code


def test_http_takes_no_signal(tmp_path: Path) -> None:
    """Rule: signals belong to whoever runs the loop; a server inside another program changes none of its handlers."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    async def look() -> list[object]:
        async with serving(settings_in(tmp_path, http_listen="127.0.0.1:0")) as server:
            async with httpx.AsyncClient() as client:
                assert 200 == (await client.get(f"http://{server.http_address}/readyz")).status_code
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    # asyncio's own runner handles SIGINT in the main thread, so the loop is run without it.
    loop = asyncio.new_event_loop()
    try:
        assert before == loop.run_until_complete(look())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
