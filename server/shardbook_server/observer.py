"""What the parts of the server tell whoever measures them, free of any library for metrics.

The base class listens to nothing, so that every part works without a listener. ``shardbook_server.metrics`` listens.
"""

from __future__ import annotations

from typing import Final


class MethodObserver:
    """Listens to the calls of one gRPC method, on the event loop: a few microseconds at most."""

    def began(self) -> None:
        """A call begins."""

    def ended(self, code: str, duration_s: float) -> None:
        """A call ends with a status of gRPC, such as ``NOT_FOUND``; its waiting counts as time."""


class Observer:
    """Listens to what happens. Called from any thread, once it has happened; never raises."""

    def method(self, name: str, *, kind: str) -> MethodObserver:
        """Returns who listens to a method.

        Args:
            name: Full name, such as ``/shardbook.v1.CatalogService/GetRun``.
            kind: How it is called: ``unary``, ``server_stream``, ``bidi_stream``.
        """
        del name, kind
        return MethodObserver()

    def refused(self, reason: str) -> None:
        """A call ended with an error of this reason, such as ``QUEUE_FULL``."""

    def batch(self, kind: str, count: int) -> None:
        """A batch of ``kind`` (plans, registrations, uploads, decisions) goes to its service."""

    def registered(self, count: int) -> None:
        """Registrations are durable, repeated ones included."""

    def planned(self, count: int) -> None:
        """Plans are durable, repeated ones included."""

    def commit_phase(self, phase: str, duration_s: float) -> None:
        """A phase of a commit is done: ``read``, ``fold`` (assembly included), ``transaction``."""

    def commit_ended(self, outcome: str) -> None:
        """A commit ended: ``committed``, ``repeated``, or the reason of its refusal in lower case."""

    def recorded_late(self) -> None:
        """A save that had not been registered while it was made is committed now."""

    def session_fenced(self) -> None:
        """A session took a (run, part) that another one held: what that one writes from now on is refused."""

    def attempts_expired(self, count: int) -> None:
        """Open attempts expired: their writers' lease ended, or a later session came."""

    def attempt_failed(self) -> None:
        """An attempt failed: a rank said so, its geometry is wrong, or it was aborted."""

    def connection_taken(self, wait_s: float) -> None:
        """A thread got a connection to the database, after a wait."""

    def transaction_committed(self, duration_s: float) -> None:
        """A write transaction is durable; the duration is that of its COMMIT alone, mostly the fsync."""


#: Listens to nothing.
SILENT: Final = Observer()
