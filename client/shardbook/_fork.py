"""Keeps gRPC out of forked children, where it hangs instead of failing.

gRPC's threads do not survive ``fork``, so a call made in the child waits forever on a thread that is not there.
The rule: once a process has opened a channel, its forked children must not use Shardbook at all, not even through
a new client. A child of a process that never opened one may.
"""

from __future__ import annotations

import os

from shardbook.errors import ForkedClientError


class ForkGuard:
    """Remembers which process opened the first channel. Takes no lock, so it never blocks, also not after a fork."""

    def __init__(self) -> None:
        self._user_pid: int | None = None

    def mark_used(self) -> None:
        """Notes that this process is about to open a channel."""
        self._user_pid = os.getpid()

    def check(self) -> None:
        """Raises ForkedClientError in a process forked from one that opened a channel."""
        pid = os.getpid()
        if self._user_pid is not None and self._user_pid != pid:
            raise ForkedClientError(
                f"process {pid} was forked from process {self._user_pid}, which had already used Shardbook; gRPC does "
                "not survive fork. Use the 'spawn' or 'forkserver' start method, or fork before the first call",
                metadata={"pid": str(pid), "parent_pid": str(self._user_pid)},
            )
