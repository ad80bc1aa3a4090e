"""What waits for something else: in a thread of its own, and seen from Postgres."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from sqlalchemy import text

from shardbook_server.storage.database import Database
from tests.behaviour.rpc.api import wait_until

T = TypeVar("T")

_WAITING = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = :event")


class Aside(Generic[T]):
    """Runs something in a thread of its own; its result, or its error, is asked for at the end.

    Args:
        call: What to run; begins at once.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._results: list[T] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """True once it is over."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """Waits for the end; raises what it raised."""
        self._thread.join(30)
        assert self.ended
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - told by result()
            self._error = error


def await_waiting(database: Database, event: str) -> None:
    """Waits until a session of this Postgres waits for ``event``: ``advisory``, ``transactionid``, ``SyncRep``."""

    def waits() -> bool:
        with database.read() as connection:
            return bool(connection.scalar(_WAITING, {"event": event}))

    wait_until(waits)
