"""Bounds what an outage of the service may cost a training job: 10 s once, then 1 s per save.

An outage is silence, or an error that says nothing about the save: down, token expired, denied, quota, version.
A server that answers is no outage, whatever it answers and however long a save waits for it: WAITING,
``RANK_FAILED``, ``SESSION_FENCED``, ``RANKS_MISSING`` and bad input are answers.

::

    breaker = CircuitBreaker()                 # one per process
    save = breaker.start_save()                # one per save
    client = base_client.guarded(save)         # its calls are charged to the save
    client.plan_until_decided(...)             # UnavailableError, reason CIRCUIT_OPEN, once the save's share is spent
    save.outage                                # why the save is UNREGISTERED; None when all was well

Closed, a save may spend ``first_s`` on silence. The first call that meets an outage opens the circuit. Open, a save
may spend ``later_s``; its calls are probes, and each goes on in the background up to ``first_s`` after the save
has stopped waiting for it. So a server that is only slow after an outage is trusted again by the next save, and
no save pays for finding out. The circuit closes when every call that met the outage has been answered once, or
after a save whose calls were all answered.

What counts is the time from the last sign of life to the next one, or to the end of the call. Waiting for other ranks
is no silence: while such a call is out the server is asked every now and then whether it lives. A server that comes
back within the share costs what it was away for, and the save goes on with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shardbook.errors import (
    DeadlineExceededError,
    InternalError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ShardbookError,
    UnauthenticatedError,
    UnavailableError,
)

#: Silence that the first save of an outage may spend, seconds.
FIRST_S: Final = 10.0
#: Silence that every later save of the same outage may spend, seconds.
LATER_S: Final = 1.0
#: What gRPC's own retries may take before a failure is seen, seconds.
_HIDDEN_S: Final = 2.0
#: Below this much a call is not worth starting, seconds.
_LEAST_S: Final = 0.005

_OUTAGES: Final = (
    DeadlineExceededError,
    InternalError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)


def is_outage(error: BaseException) -> bool:
    """True when ``error`` says that the service does not do its work, rather than what it thinks of the request."""
    # The bare class stands for statuses without one of their own, such as UNIMPLEMENTED from an older server.
    return isinstance(error, _OUTAGES) or type(error) is ShardbookError


class CircuitBreaker:
    """What this process knows about the health of its service. Thread-safe; not picklable, make one per process.

    Args:
        first_s: Silence that the first save of an outage may spend, seconds.
        later_s: Silence that a later save may spend, seconds.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, first_s: float = FIRST_S, later_s: float = LATER_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.first_s = first_s
        self.later_s = min(later_s, first_s)
        self.clock = clock
        self._lock = threading.Lock()
        #: Names of the calls whose last try met the outage.
        self._failing: set[str] = set()
        self._opened_by: SaveBudget | None = None
        self._last_save: SaveBudget | None = None

    @property
    def is_open(self) -> bool:
        """True while a call that met an outage has not been answered since."""
        with self._lock:
            return bool(self._failing)

    def start_save(self) -> SaveBudget:
        """Returns the share of a new save; what the save before it went through counts from now on."""
        save = SaveBudget(self)
        with self._lock:
            last, self._last_save = self._last_save, save
            if last is not None and last.was_healthy:
                # The call that met the outage may be one that no save makes again, such as StartSession.
                self._failing.clear()
                self._opened_by = None
        return save

    def limit_s(self, save: SaveBudget) -> float:
        """Returns the silence that ``save`` may spend in all, as of now, seconds."""
        with self._lock:
            paying = not self._failing or self._opened_by is save
        return self.first_s if paying else self.later_s

    def answered(self, method: str) -> None:
        """Notes that the server answered a call; from any thread, also long after the save that made it."""
        with self._lock:
            self._failing.discard(method)
            if not self._failing:
                self._opened_by = None

    def failed(self, method: str, save: SaveBudget) -> None:
        """Notes that a call of ``save`` met an outage."""
        with self._lock:
            if not self._failing:
                self._opened_by = save
            self._failing.add(method)


class GuardedCall:
    """One call while it runs.

    Attributes:
        method: Name of the call.
        silence_s: Seconds that the save waits for the answer.
        linger_s: Seconds that the call itself may live; where it is longer than ``silence_s``, whoever lets the
            call go on reports a late answer with ``answered``.
    """

    def __init__(self, breaker: CircuitBreaker, method: str, silence_s: float, linger_s: float) -> None:
        self._breaker = breaker
        self._quiet_since_s = breaker.clock()
        self._lost_s = 0.0
        self._is_failing = False
        self._was_alive = False
        self.method = method
        self.silence_s = silence_s
        self.linger_s = linger_s

    @property
    def quiet_s(self) -> float:
        """Seconds since the call began or the server last gave a sign of life, and what was lost before that.

        At most ``silence_s``.
        """
        return min(self._lost_s + self._breaker.clock() - self._quiet_since_s, self.silence_s)

    @property
    def lost_s(self) -> float:
        """Seconds that the call has lost to outages, as far as it got over them; at most ``silence_s``."""
        return self.quiet_s if self._is_failing else min(self._lost_s, self.silence_s)

    def alive(self) -> None:
        """Notes a sign of life while the call still runs: the time until now was silence only if a try had failed."""
        now_s = self._breaker.clock()
        if self._is_failing:
            self._lost_s += now_s - self._quiet_since_s
        self._quiet_since_s = now_s
        self._is_failing, self._was_alive = False, True

    def failed(self, error: ShardbookError) -> None:
        """Notes that a try of the call failed and will be made again."""
        # A connection on which the server has lately said that it lives breaks at the moment it dies, but for what
        # gRPC's own retries hide. One that is silent is noticed by the next look instead.
        if self._was_alive and not self._is_failing and isinstance(error, UnavailableError):
            self._quiet_since_s = max(self._quiet_since_s, self._breaker.clock() - _HIDDEN_S)
        self._is_failing, self._was_alive = True, False

    def answered(self) -> None:
        """Notes an answer to this call. Thread-safe."""
        self._breaker.answered(self.method)


class SaveBudget:
    """The silence that one save may still spend. Thread-safe.

    Attributes:
        outage: The last error that was an outage; None while the service answers.
    """

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._lock = threading.Lock()
        self._spent_s = 0.0
        self._sent_bytes = 0
        self._answered = False
        self.outage: ShardbookError | None = None

    @property
    def spent_s(self) -> float:
        """Seconds that this save lost to the outage."""
        with self._lock:
            return self._spent_s

    @property
    def sent_bytes(self) -> int:
        """Bytes of all messages that were sent for this save, those that were sent again included."""
        with self._lock:
            return self._sent_bytes

    def note_sent(self, size_bytes: int) -> None:
        """Counts a message."""
        with self._lock:
            self._sent_bytes += size_bytes

    @property
    def is_probing(self) -> bool:
        """True while the circuit is open: calls find out whether the outage is over."""
        return self._breaker.is_open

    @property
    def remaining_s(self) -> float:
        """Seconds of silence that this save may still spend."""
        return max(0.0, self._breaker.limit_s(self) - self.spent_s)

    @property
    def is_exhausted(self) -> bool:
        """True when further calls of this save are refused."""
        return self.remaining_s < _LEAST_S

    @property
    def was_healthy(self) -> bool:
        """True when calls of this save were answered and none met an outage."""
        return self._answered and self.outage is None

    @contextmanager
    def call(self, method: str) -> Iterator[GuardedCall]:
        """Runs one call inside the budget: charges the time it loses to an outage, and notes how it ended.

        Args:
            method: Name of the call; an outage that only one call meets is remembered for that call.

        Raises:
            UnavailableError: Nothing is left to spend (reason ``CIRCUIT_OPEN``); the call is not made.
        """
        silence_s = self.remaining_s
        if silence_s < _LEAST_S:
            raise self._refusal(method)
        # A healthy service's call ends with the save's patience; a probe may outlive it.
        guarded = GuardedCall(self._breaker, method, silence_s, max(silence_s, self._breaker.first_s))
        try:
            yield guarded
        except ShardbookError as error:
            if is_outage(error):
                self._charge(guarded, error)
            elif error.status != "UNKNOWN":  # errors without a status are the client's own: no word from the server
                self._note_answer(guarded)
            raise
        self._note_answer(guarded)

    def _charge(self, guarded: GuardedCall, error: ShardbookError) -> None:
        with self._lock:
            self._spent_s += guarded.quiet_s
            self.outage = error
        self._breaker.failed(guarded.method, self)

    def _note_answer(self, guarded: GuardedCall) -> None:
        with self._lock:
            self._spent_s += guarded.lost_s
        self._answered = True
        guarded.answered()

    def _refusal(self, method: str) -> UnavailableError:
        why = f": {self.outage.message}" if self.outage is not None else ""
        return UnavailableError(
            f"{method} was not tried: the Shardbook server did not answer for {self.spent_s:.1f} s and this save "
            f"goes on without it{why}",
            reason="CIRCUIT_OPEN",
            metadata={"method": method},
        )
