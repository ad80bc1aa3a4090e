"""When to ask again: jittered exponential delays that never undercut what the server asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from shardbook.errors import DeadlineExceededError, ResourceExhaustedError, ShardbookError, UnavailableError


@dataclass(frozen=True)
class Backoff:
    """Delays between attempts of one call. Thread-safe.

    The delay before attempt n + 1 is drawn from the upper half of ``first_s * 2**n``, capped at ``cap_s``: ranks
    that failed together do not come back together, and none comes back at once.

    Attributes:
        first_s: Largest delay after the first failure, seconds.
        cap_s: Largest delay ever drawn, seconds. A longer one that the server asked for is kept.
        rng: Source of the jitter.
    """

    first_s: float = 0.1
    cap_s: float = 2.0
    rng: random.Random = field(default_factory=random.SystemRandom, repr=False, compare=False)

    def delay_s(self, failure_count: int, error: ShardbookError | None = None) -> float:
        """Returns the seconds to wait after ``failure_count`` failures (1 or more), the last one being ``error``."""
        top = min(self.cap_s, self.first_s * 2.0 ** min(failure_count - 1, 30))
        drawn = top * self.rng.uniform(0.5, 1.0)
        if error is None or error.retry_delay_s is None:
            return drawn
        # The jitter goes on top: a RetryInfo says "not before".
        return error.retry_delay_s + drawn


def may_pass(error: ShardbookError) -> bool:
    """True for what whoever goes on for hours tries again: also a call that ran out of its own short time."""
    return is_retryable(error) or isinstance(error, DeadlineExceededError)


def is_retryable(error: ShardbookError) -> bool:
    """True when the same call may succeed later without anything else changing.

    Every call of the API is idempotent, so a lost answer is as retryable as a lost request. A deadline is not:
    the caller's time is up.
    """
    if isinstance(error, UnavailableError):
        return True
    return isinstance(error, ResourceExhaustedError) and error.retry_delay_s is not None
