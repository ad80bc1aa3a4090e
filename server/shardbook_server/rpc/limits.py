"""Limits that only the edge knows: how long a call may wait, how much is checked at once, sizes of replies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from google.protobuf.duration_pb2 import Duration

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError, ResourceExhaustedError
from shardbook_server.rpc.call import current_call
from shardbook_server.rpc.times import seconds

#: Calls whose uploads are inflated and checked at the same time; each may hold ``limits.MAX_INFLATED_BYTES``.
UPLOADS_AT_ONCE: Final = 2
#: Calls whose uploads, all of them small, are checked in one go.
CHECKS_AT_ONCE: Final = 128
#: Time kept for the answer itself when a wait is cut to fit below the call's deadline, seconds.
ANSWER_S: Final = 0.5
#: Time between two looks at another job's lease, seconds.
LEASE_LOOK_S: Final = 0.5
#: How old the progress may be that a waiting call is shown, seconds; and attempts whose progress is kept.
RECENT_S: Final = 0.25
RECENT_COUNT: Final = 256
#: Told to clients whose uploads found no room, seconds.
ROOM_RETRY_S: Final = 0.5


class ByteBudget:
    """Bytes that calls may hold at the same time; belongs to the event loop's thread."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self._name = name
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    @contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Takes room and gives it back at the end.

        Raises:
            ResourceExhaustedError: There is no room. Alone, a call finds room whatever its size.
        """
        if self._held_bytes and self._held_bytes + size_bytes > self._limit_bytes:
            raise ResourceExhaustedError(
                f"{self._held_bytes} bytes of {self._name} in progress, the limit is {self._limit_bytes}: try again",
                reason="SERVER_BUSY",
                retry_delay_s=ROOM_RETRY_S,
            )
        self._held_bytes += size_bytes
        try:
            yield
        finally:
            self._held_bytes -= size_bytes


def wait_s(wait: Duration) -> float:
    """Returns how long this call may wait: as asked, at most 20 s, and short enough to answer before the deadline.

    A handler that waits up to the deadline loses its answer to DEADLINE_EXCEEDED.

    Raises:
        InvalidArgumentError: The wait is negative, or no valid duration.
    """
    asked_s = seconds(wait, "wait")
    if asked_s < 0:
        raise InvalidArgumentError("a wait is not negative", field="wait")
    return max(0.0, min(asked_s, limits.MAX_WAIT_S, current_call().remaining_s() - ANSWER_S))
