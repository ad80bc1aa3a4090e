"""Work of the server's own that is done again and again, in a thread that may get stuck without harm."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import structlog

#: How long ``stop`` waits for work in progress: a database that hangs must not hold up the end, seconds.
_STOP_S: Final = 1.0

_log = structlog.get_logger(__name__)


class Periodic:
    """A daemon thread that does something every so often, until it is stopped.

    Args:
        name: Of the thread.
        work: What is done; an error is no end of it.
        period_s: Time between the end of one and the next.
        close: Done last, by the same thread.
    """

    def __init__(self, name: str, work: Callable[[], None], period_s: float, close: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._period_s = period_s
        self._close = close
        self._stopped = threading.Event()
        # Daemonic: the process ends though a database never answers.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins, with the first time at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it; waits for what is in progress, though not long."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    self._work()
                except Exception as error:  # noqa: BLE001 - the next time may be better
                    _log.debug("did not work this time", name=self._name, error=str(error))
                self._stopped.wait(self._period_s)
        finally:
            self._close()
