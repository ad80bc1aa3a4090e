"""How long the statements of the current call may take: whoever carries a call into a thread says so here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_deadline_s: Final[ContextVar[float]] = ContextVar("shardbook_statement_deadline", default=math.inf)


@contextmanager
def statements_until(deadline_s: float) -> Iterator[None]:
    """Bounds the statements of transactions that begin within the block, on ``time.monotonic``'s clock."""
    token = _deadline_s.set(deadline_s)
    try:
        yield
    finally:
        _deadline_s.reset(token)


def remaining_s() -> float:
    """Returns what is left for the statements of the current call, seconds; infinite when nothing bounds them."""
    return _deadline_s.get() - time.monotonic()
