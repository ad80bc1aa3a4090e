"""Waiting for what other processes do: for a state that is seen, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_LIMIT_S: Final = 60.0
_PAUSE_S: Final = 0.02


def await_that(what: str, holds: Callable[[], bool], limit_s: float = _LIMIT_S) -> None:
    """Waits until something holds; fails when it does not in time."""
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, f"not within {limit_s:.0f} s: {what}"
        time.sleep(_PAUSE_S)


def await_stop(pid: int) -> None:
    """Waits until a process is stopped."""
    await_that(f"{pid} is stopped", lambda: "T" == _state(pid))


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
