"""The small parts: threads that may get stuck, connections as the kernel counts them."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from shardbook_server.connections import count_connections
from shardbook_server.periodic import Periodic
from tests.behaviour.rpc.api import wait_until


def test_work_goes_on_after_an_error_and_closes_at_the_end() -> None:
    """Rule: a database that is away is asked again; the thread that used it closes it."""
    done: list[int] = []
    closed = threading.Event()

    def work() -> None:
        done.append(1)
        raise RuntimeError("away")

    periodic = Periodic("test", work, 0.01, closed.set)
    periodic.start()
    wait_until(lambda: len(done) >= 3)
    periodic.stop()
    assert closed.is_set()


def test_work_that_hangs_holds_up_no_end() -> None:
    """Rule: stop waits a second; what hangs is closed when it comes back."""
    hangs, closed = threading.Event(), threading.Event()

    def work() -> None:
        hangs.wait(30)

    periodic = Periodic("test", work, 1.0, closed.set)
    periodic.start()
    began_s = time.monotonic()
    periodic.stop()
    assert 0.9 < time.monotonic() - began_s < 5
    assert not closed.is_set()
    hangs.set()
    assert closed.wait(5)


def test_what_was_never_started_can_be_stopped() -> None:
    """Rule: a server that is refused its address ends like any other."""
    Periodic("test", lambda: None, 1.0, lambda: None).stop()


def test_connections_are_those_of_one_address(tmp_path: Path) -> None:
    """Rule: clients that are connected, by TCP or a socket file; neither the listener nor the clients' own ends."""
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        host, port = tcp.getsockname()[:2]
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        assert 0 == count_connections(f"{host}:{port}")
        for _ in range(3):
            stack.enter_context(socket.create_connection((host, port)))
            stack.enter_context(tcp.accept()[0])
        stack.enter_context(socket.create_connection(other.getsockname()[:2]))
        stack.enter_context(other.accept()[0])
        assert 3 == count_connections(f"{host}:{port}")
        path = str(tmp_path / "s")
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen()
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(path)
        stack.enter_context(listener.accept()[0])
        assert 1 == count_connections(f"unix:{path}")


def test_where_the_kernel_does_not_tell_there_is_no_number(tmp_path: Path) -> None:
    """Rule: other systems have no such tables; the gauge has no sample there."""
    assert count_connections("127.0.0.1:1", tmp_path) is None
    assert count_connections("unix:/s", tmp_path) is None
