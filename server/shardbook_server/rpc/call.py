"""What is known of the call that the current task answers: method, request id, deadline."""

from __future__ import annotations

import math
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from shardbook.errors import DeadlineExceededError


@dataclass(eq=False, slots=True)
class Call:
    """One call in progress.

    Attributes:
        method: Full name, such as ``/shardbook.v1.CatalogService/GetRun``.
        request_id: Told to the client and written to the log with every error.
        deadline_s: On ``time.monotonic``'s clock; infinite when the client set none.
        principal: Who calls; empty as long as there are no tokens.
        authorization: The caller's credentials as they came, whichever way the call took; never written anywhere.
        waited_s: How long it has waited for others, which is no time of the server's.
    """

    method: str
    request_id: str
    deadline_s: float = math.inf
    principal: str = ""
    authorization: str = field(default="", repr=False)
    waited_s: float = 0.0

    def remaining_s(self) -> float:
        """Returns the seconds until the deadline; negative when it has passed, infinite when there is none."""
        return self.deadline_s - time.monotonic()

    def check_time(self) -> None:
        """Refuses to begin work whose answer nobody waits for any more.

        Raises:
            DeadlineExceededError: The deadline has passed.
        """
        if self.remaining_s() <= 0:
            raise DeadlineExceededError(f"the deadline of {self.method} passed before its turn came; nothing was done")


#: What runs outside any call: background work, tests.
NO_CALL = Call(method="", request_id="")

_current: ContextVar[Call] = ContextVar("shardbook_call", default=NO_CALL)


def current_call() -> Call:
    """Returns the call that this task answers; ``NO_CALL`` outside of one."""
    return _current.get()


def set_current_call(call: Call) -> None:
    """Sets the call that this task answers."""
    _current.set(call)
