"""Forked children: an error at once, never a hang; the parent works on. Row 19 of the fault matrix."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest

from shardbook.breaker import CircuitBreaker
from shardbook.client import Client
from shardbook.errors import ForkedClientError, UnavailableError
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.client.scripted import ScriptedServer, scripted_server

# Python warns of forks in a process with threads; to fork in one is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

REQUEST = pb.KeepAliveRequest()


def in_forked_child(action: Callable[[], int]) -> int:
    """Runs ``action`` in a forked child and returns its exit code; a child that hangs is killed and fails the test."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the forked child hangs")


def call_code(client: Client) -> int:
    """Returns 0 for an answer, 10 for ForkedClientError long before the deadline, 11 for anything else."""
    started = time.monotonic()
    try:
        client.keep_alive(REQUEST, deadline_s=20)
    except ForkedClientError:
        return 10 if time.monotonic() - started < 10 else 12
    return 0


def test_used_client_raises_in_the_child_and_works_on_in_the_parent() -> None:
    """The child of a process that made a call gets ForkedClientError at once, the parent does not notice."""
    with scripted_server(KeepAlive=lambda *_: pb.KeepAliveResponse()) as server:
        client = Client(server.target)
        client.keep_alive(REQUEST)
        for _ in range(3):
            assert 10 == in_forked_child(lambda: call_code(client))
            client.keep_alive(REQUEST, deadline_s=5)


def test_new_client_in_the_child_raises_too() -> None:
    """GRPC itself is broken in the child, not only the parent's channel; a guarded client is no way around it."""
    with scripted_server(KeepAlive=lambda *_: pb.KeepAliveResponse()) as server:
        Client(server.target).keep_alive(REQUEST)
        assert 10 == in_forked_child(lambda: call_code(Client(server.target)))
        save = CircuitBreaker().start_save()
        assert 10 == in_forked_child(lambda: call_code(Client(server.target).guarded(save)))


def test_fork_while_another_thread_opens_a_channel_does_not_deadlock() -> None:
    """A lock that another thread held at the fork is not waited for in the child."""
    from shardbook._channel import connections

    with scripted_server(KeepAlive=lambda *_: pb.KeepAliveResponse()) as server:
        client = Client(server.target)
        client.keep_alive(REQUEST)
        with connections._lock:
            assert 10 == in_forked_child(lambda: call_code(client))


SCRIPT = """
    import os, sys
    from shardbook.client import Client
    from shardbook.v1 import registration_pb2 as pb

    client = Client(sys.argv[1])
    if sys.argv[2] == "used":
        client.keep_alive(pb.KeepAliveRequest())
    pid = os.fork()
    if pid == 0:
        try:
            client.keep_alive(pb.KeepAliveRequest(), deadline_s=10)
            sys.exit(0)
        except Exception as error:
            sys.exit(10 if type(error).__name__ == "ForkedClientError" else 11)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if sys.argv[2] == "used":
        client.keep_alive(pb.KeepAliveRequest())
    sys.exit(code)
"""


def fork_in_fresh_interpreter(server: ScriptedServer, how: str) -> int:
    """Forks a process that has no other threads, whose child ends as programs do, through interpreter shutdown."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), server.target, how]
    return subprocess.run(command, timeout=60, check=False).returncode


def test_child_of_a_user_ends_normally() -> None:
    """Interpreter shutdown in the child does not hang on the parent's channel."""
    with scripted_server(KeepAlive=lambda *_: pb.KeepAliveResponse()) as server:
        assert 10 == fork_in_fresh_interpreter(server, "used")


def test_child_of_a_process_that_made_no_call_may_use_its_client() -> None:
    """A client that was only made holds nothing of gRPC: workers forked early may use it."""
    with scripted_server(KeepAlive=lambda *_: pb.KeepAliveResponse()) as server:
        assert 0 == fork_in_fresh_interpreter(server, "unused")


def _keep_alive(client: Client) -> str:
    client.keep_alive(REQUEST, deadline_s=10)
    return client.target


def test_pickled_client_works_in_a_spawned_process() -> None:
    """What travels is the address, the token and the timeout: no channel, no lock."""
    with scripted_server(KeepAlive=lambda *_: pb.KeepAliveResponse()) as server:
        client = Client(server.target, token="t", timeout_s=7)
        client.keep_alive(REQUEST)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert server.target == pool.apply(_keep_alive, (client,))
        assert "Bearer t" == server.requests[-1][2]["authorization"]


def test_pickling_keeps_the_settings_and_drops_the_budget() -> None:
    """A budget belongs to one save of one process; the pickled client has none."""
    save = CircuitBreaker().start_save()
    client = pickle.loads(pickle.dumps(Client("a:1,b:2", token="t", timeout_s=7).guarded(save)))
    assert ("a:1,b:2", 7, "t", None) == (
        client.target,
        client.timeout_s,
        client._transport.token,
        client._transport.budget,
    )


def test_making_a_client_opens_nothing(free_port: int) -> None:
    """The channel is made by the first call."""
    client = Client(f"127.0.0.1:{free_port}")
    with pytest.raises(UnavailableError):
        client.keep_alive(REQUEST, deadline_s=0.2)
