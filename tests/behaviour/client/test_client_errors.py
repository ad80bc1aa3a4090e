"""Errors of the server become errors of ours: by reason, else by status, never by text."""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import pytest

from shardbook import errors
from shardbook.client import Client
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.client.scripted import refuse, scripted_server

S = grpc.StatusCode


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (S.INVALID_ARGUMENT, "LIMIT_EXCEEDED", errors.InvalidArgumentError),
        (S.NOT_FOUND, "NOT_FOUND", errors.NotFoundError),
        (S.ALREADY_EXISTS, "ALREADY_EXISTS", errors.AlreadyExistsError),
        (S.FAILED_PRECONDITION, "SESSION_FENCED", errors.SessionFencedError),
        (S.FAILED_PRECONDITION, "SESSION_UNKNOWN", errors.SessionUnknownError),
        (S.FAILED_PRECONDITION, "RUN_BUSY", errors.RunBusyError),
        (S.FAILED_PRECONDITION, "CHECKPOINT_CLOSED", errors.CheckpointClosedError),
        (S.FAILED_PRECONDITION, "RANKS_MISSING", errors.RanksMissingError),
        (S.FAILED_PRECONDITION, "RANK_FAILED", errors.RankFailedError),
        (S.FAILED_PRECONDITION, "GEOMETRY_OVERLAP", errors.InvalidGeometryError),
        (S.FAILED_PRECONDITION, "A_REASON_OF_TOMORROW", errors.FailedPreconditionError),
        (S.ABORTED, "ETAG_MISMATCH", errors.AbortedError),
        (S.RESOURCE_EXHAUSTED, "STORAGE_FULL", errors.ResourceExhaustedError),
        (S.UNAUTHENTICATED, "TOKEN_EXPIRED", errors.UnauthenticatedError),
        (S.PERMISSION_DENIED, "PERMISSION_DENIED", errors.PermissionDeniedError),
        (S.INTERNAL, "INTERNAL", errors.InternalError),
    ],
)
def test_class_follows_reason_then_status(
    status: grpc.StatusCode, reason: str, expected: type[errors.ShardbookError]
) -> None:
    """A known reason picks the class; one that this release does not know leaves it to the status."""
    # The text names other errors: whoever read it would be misled.
    message = "SESSION_FENCED? no: NOT_FOUND, UNAVAILABLE"

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, status, reason, message)

    with scripted_server(KeepAlive=handle) as server, pytest.raises(errors.ShardbookError) as caught:
        Client(server.target).keep_alive(pb.KeepAliveRequest(), deadline_s=5)
    assert expected is type(caught.value)
    assert (reason, message) == (caught.value.reason, str(caught.value))


def test_details_survive_the_wire() -> None:
    """Violations, metadata and RetryInfo of an error reach the caller as they were sent."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(
            context,
            S.INVALID_ARGUMENT,
            "INVALID_NAME",
            "two fields",
            metadata={"host": "node-7", "truncated": "3"},
            fields=[("key.run", "no name"), ("location.prefix", "leaves the directory")],
            retry_delay_s=1.5,
        )

    with scripted_server(RegisterShards=handle) as server, pytest.raises(errors.InvalidArgumentError) as caught:
        Client(server.target).register_shards(pb.RegisterShardsRequest())
    error = caught.value
    assert {"host": "node-7", "truncated": "3"} == error.metadata
    assert (
        errors.FieldViolation("key.run", "no name"),
        errors.FieldViolation("location.prefix", "leaves the directory"),
    ) == error.violations
    assert 1.5 == error.retry_delay_s


def test_reason_of_another_domain_does_not_count() -> None:
    """A proxy's SESSION_FENCED is not ours: only its status is believed."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, S.PERMISSION_DENIED, "SESSION_FENCED", domain="proxy.example")

    with scripted_server(KeepAlive=handle) as server, pytest.raises(errors.PermissionDeniedError) as caught:
        Client(server.target).keep_alive(pb.KeepAliveRequest())
    assert "PERMISSION_DENIED" == caught.value.reason


def test_plain_status_without_details_is_mapped() -> None:
    """A status without details, as a gateway sends, still picks the class."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        context.abort(S.UNAUTHENTICATED, "who are you")

    with scripted_server(KeepAlive=handle) as server, pytest.raises(errors.UnauthenticatedError, match="who are you"):
        Client(server.target).keep_alive(pb.KeepAliveRequest())


def test_call_that_the_server_lacks_says_so() -> None:
    """An older server's UNIMPLEMENTED is an error with that reason, naming the call and the server."""
    with scripted_server() as server, pytest.raises(errors.ShardbookError, match="older than this client") as caught:
        Client(server.target).keep_alive(pb.KeepAliveRequest())
    assert "UNIMPLEMENTED" == caught.value.reason
    assert {"target": server.target, "method": "KeepAlive"} == caught.value.metadata


def test_refused_connection_is_unavailable_and_names_the_next_command(free_port: int) -> None:
    """Nobody listening is UnavailableError within the deadline; the message says what to look at."""
    started = time.monotonic()
    with pytest.raises(errors.UnavailableError, match="shardbook-server serve") as caught:
        Client(f"127.0.0.1:{free_port}").keep_alive(pb.KeepAliveRequest(), deadline_s=1)
    assert time.monotonic() - started < 15  # of the 30 s that a call has otherwise
    assert f"127.0.0.1:{free_port}" == caught.value.metadata["target"]


def test_silence_is_deadline_exceeded() -> None:
    """A server that does not answer costs the deadline, no more."""

    release = threading.Event()

    def handle(_: Any, context: grpc.ServicerContext) -> pb.KeepAliveResponse:
        release.wait(60)
        return pb.KeepAliveResponse()

    with scripted_server(KeepAlive=handle) as server:
        started = time.monotonic()
        with pytest.raises(errors.DeadlineExceededError, match="may or may not have happened"):
            Client(server.target).keep_alive(pb.KeepAliveRequest(), deadline_s=0.3)
        assert time.monotonic() - started < 15
        release.set()
