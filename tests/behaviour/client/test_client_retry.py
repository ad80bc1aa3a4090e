"""Asking again: what is retried, for how long, and that nothing else is."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from shardbook import errors
from shardbook._channel import connections
from shardbook._retry import Backoff, is_retryable
from shardbook.client import Client
from shardbook.v1 import catalog_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.client.scripted import failing_first, refuse, scripted_server, unavailable

OK = pb.KeepAliveResponse()


def test_unavailable_is_retried_until_it_answers() -> None:
    """A server that restarts costs a call some time, not its answer."""
    with scripted_server(KeepAlive=failing_first(7, unavailable, OK)) as server:
        Client(server.target).keep_alive(pb.KeepAliveRequest(), deadline_s=10)
        assert 8 == server.count("KeepAlive")


def test_large_request_is_retried_by_the_channel() -> None:
    """GRPC's own retry holds 2 MiB: by default it silently gives up above 256 KiB."""
    request = pb.RegisterShardsRequest(blobs=[types_pb2.Blob(payload=b"x" * (2 << 20))])
    answer = pb.RegisterShardsResponse()
    with scripted_server(RegisterShards=failing_first(1, unavailable, answer)) as server:
        client = Client(server.target)
        connection = connections.get(client._transport.address)
        assert answer == connection.registration.RegisterShards(request, timeout=5)
        assert 2 == server.count("RegisterShards")
        assert {2 << 20} == {len(seen.blobs[0].payload) for seen in server.of("RegisterShards")}


def test_retry_honours_retry_info() -> None:
    """A delay that the server asks for is never undercut."""
    arrivals: list[float] = []

    def handle(_: Any, context: grpc.ServicerContext) -> pb.KeepAliveResponse:
        arrivals.append(time.monotonic())
        if len(arrivals) == 1:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WAITERS", retry_delay_s=0.5)
        return OK

    with scripted_server(KeepAlive=handle) as server:
        Client(server.target).keep_alive(pb.KeepAliveRequest(), deadline_s=10)
    assert 2 == len(arrivals)
    assert 0.5 <= arrivals[1] - arrivals[0]


def test_retry_info_beyond_the_deadline_ends_the_call_at_once() -> None:
    """The caller learns what is wrong while it still has time, instead of sleeping into its deadline."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA", retry_delay_s=60)

    with scripted_server(KeepAlive=handle) as server:
        started = time.monotonic()
        with pytest.raises(errors.ResourceExhaustedError) as caught:
            Client(server.target).keep_alive(pb.KeepAliveRequest(), deadline_s=20)
        assert time.monotonic() - started < 15
        assert 1 == server.count("KeepAlive")
    assert 60 == caught.value.retry_delay_s


@pytest.mark.parametrize(
    "status",
    [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED],
)
def test_answers_are_not_retried(status: grpc.StatusCode) -> None:
    """What will not change by asking again is asked once."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, status, "NO")

    with scripted_server(KeepAlive=handle) as server:
        with pytest.raises(errors.ShardbookError):
            Client(server.target).keep_alive(pb.KeepAliveRequest())
        assert 1 == server.count("KeepAlive")


def test_server_that_comes_back_on_its_address_is_found_within_the_deadline(free_port: int) -> None:
    """The channel does not back off for minutes: a call made while the server is down ends on the next server."""
    client = Client(f"127.0.0.1:{free_port}")
    with pytest.raises(errors.UnavailableError):
        client.keep_alive(pb.KeepAliveRequest(), deadline_s=0.5)
    done: list[pb.KeepAliveResponse] = []
    caller = threading.Thread(target=lambda: done.append(client.keep_alive(pb.KeepAliveRequest(), deadline_s=20)))
    caller.start()
    time.sleep(0.5)
    with scripted_server(free_port, KeepAlive=lambda *_: OK):
        caller.join(15)
    assert [OK] == done


def test_a_server_that_is_not_there_is_given_up_long_before_a_long_deadline(
    free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A call may be allowed minutes of work; nobody waits that long where nobody works. And the wait is said."""
    client = Client(f"127.0.0.1:{free_port}", outage_s=5.0)
    began_s = time.monotonic()
    with pytest.raises(errors.UnavailableError, match="cannot reach a Shardbook server"):
        client.get_metadata("a/b@1", deadline_s=300)
    # A wait of up to 2 s that would end beyond the 5 s is not begun: the last try comes after 3 s at least, and so
    # after the 2 s from which on the wait is said, however the waits are drawn.
    assert 3.0 < time.monotonic() - began_s < 15
    assert 1 == sum("no Shardbook server answers" in one.getMessage() for one in caplog.records)


def test_a_server_that_answers_may_refuse_for_longer(free_port: int) -> None:
    """RetryInfo is a sign of life."""

    def handle(_: Any, context: grpc.ServicerContext) -> pb.KeepAliveResponse:
        if time.monotonic() < began_s + 1.5:
            refuse(context, grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE", retry_delay_s=0.1)
        return OK

    with scripted_server(KeepAlive=handle) as server:
        began_s = time.monotonic()
        Client(server.target, outage_s=0.2).keep_alive(pb.KeepAliveRequest(), deadline_s=20)


def test_several_addresses_are_tried_until_one_answers(free_port: int) -> None:
    """With a list of replicas, a dead one costs nothing but the try."""
    with scripted_server(KeepAlive=lambda *_: OK) as server:
        target = f"127.0.0.1:{free_port},localhost:{server.port}"
        for _ in range(3):
            assert OK == Client(target).keep_alive(pb.KeepAliveRequest(), deadline_s=5)


def test_names_that_cannot_be_looked_up_are_unavailable() -> None:
    """A list of unknown names is an outage, not a crash."""
    with pytest.raises(errors.UnavailableError, match="looked up"):
        Client("nowhere.invalid:1,nowhere2.invalid:1").keep_alive(pb.KeepAliveRequest(), deadline_s=0.5)


def test_stream_that_breaks_off_starts_again() -> None:
    """Metadata is never put together from two halves of different streams."""
    header = {"header": {"head": b"h", "checkpoint": {"step": 5}}}

    def stream(first: bool) -> list[dict[str, Any]]:
        return [header, {"block": {"entries": [b"1" if first else b"a", b"2"]}}]

    calls: list[int] = []

    def handle(_: Any, context: grpc.ServicerContext) -> Any:
        from shardbook.v1 import metadata_pb2

        calls.append(1)
        for message in stream(len(calls) == 1):
            yield metadata_pb2.GetMetadataResponse(**message)
        if len(calls) == 1:
            unavailable(context)
        yield metadata_pb2.GetMetadataResponse(block={"entries": [b"3"]})

    with scripted_server(GetMetadata=handle) as server:
        stored = Client(server.target).get_metadata("llm/8b@5")
    assert [b"a", b"2", b"3"] == stored.blocks
    assert (b"h", 5) == (stored.head, stored.checkpoint.step)


def test_calls_of_all_clients_of_a_process_share_a_channel() -> None:
    """Clients are cheap: the process has one connection to an address, whoever asks."""
    with scripted_server(KeepAlive=lambda *_: OK) as server:
        clients = [Client(server.target) for _ in range(4)]
        for client in clients:
            client.keep_alive(pb.KeepAliveRequest())
        assert 1 == len({id(connections.get(client._transport.address)) for client in clients})


def test_client_is_used_from_many_threads() -> None:
    """One client serves many threads at once."""
    run = catalog_pb2.GetRunResponse(run={"name": "projects/llm/runs/8b"})
    with scripted_server(GetRun=lambda *_: run) as server:
        client = Client(server.target)
        names: list[str] = []
        threads = [threading.Thread(target=lambda: names.append(client.get_run("llm/8b").ref)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert ["llm/8b"] * 16 == names


def test_token_travels_with_every_call() -> None:
    """A token is sent as a bearer token and shown nowhere."""
    with scripted_server(KeepAlive=lambda *_: OK) as server:
        client = Client(server.target, token="s3cret")
        client.keep_alive(pb.KeepAliveRequest())
        assert "Bearer s3cret" == server.requests[0][2]["authorization"]
    assert "s3cret" not in repr(client) + repr(client._transport)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.UnavailableError("x"), True),
        (errors.ResourceExhaustedError("x", retry_delay_s=1), True),
        (errors.ResourceExhaustedError("x"), False),
        (errors.DeadlineExceededError("x"), False),
        (errors.RanksMissingError("x", retry_delay_s=1), False),
        (errors.InternalError("x"), False),
    ],
)
def test_what_is_retryable(error: errors.ShardbookError, expected: bool) -> None:
    """Unavailable always, exhausted when the server says when, nothing else."""
    assert expected is is_retryable(error)


def test_backoff_grows_to_its_cap_with_jitter() -> None:
    """Delays double up to the cap, never fall below half of it, and differ from rank to rank."""
    backoff = Backoff(first_s=0.1, cap_s=2.0, rng=random.Random(7))
    delay_s: Callable[[int], float] = lambda n: backoff.delay_s(n, errors.UnavailableError("x"))  # noqa: E731
    for count, top in ((1, 0.1), (2, 0.2), (3, 0.4), (6, 2.0), (10_000, 2.0)):
        drawn = [delay_s(count) for _ in range(50)]
        assert top / 2 <= min(drawn) < max(drawn) <= top


def test_an_etag_of_a_listing_is_refused() -> None:
    """It is empty, and would guard nothing; nothing is sent."""
    with scripted_server() as server:
        client = Client(server.target)
        for call in (
            lambda: client.update_checkpoint("llm/8b@1", note="x", etag=""),
            lambda: client.set_alias("llm/8b@a", "llm/8b@1", etag=""),
            lambda: client.follow_metric("llm/8b@a", "loss", "min", etag=""),
            lambda: client.delete_alias("llm/8b@a", etag=""),
            lambda: client.delete_checkpoint("llm/8b@1.s1.a1", etag=""),
            lambda: client.set_retention_policy("llm/8b", None, etag=""),
        ):
            with pytest.raises(errors.InvalidArgumentError, match="listings leave it out"):
                call()
        assert [] == server.requests


def test_tries_of_a_write_are_one_request() -> None:
    """Each under the id of the first; another write has another one."""
    answer = catalog_pb2.DeleteAliasResponse()
    with scripted_server(DeleteAlias=failing_first(2, unavailable, answer)) as server:
        client = Client(server.target)
        for _ in range(2):
            client.delete_alias("llm/8b@best", deadline_s=10)
        ids = [request.request_id for request in server.of("DeleteAlias")]
    assert [True, True, True] == [uuid.UUID(one).version == 4 for one in ids[1:]]
    assert (4, 1, 2) == (len(ids), len(set(ids[:3])), len(set(ids)))
