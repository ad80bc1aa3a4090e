"""What becomes known of a call when it ends: its numbers, and one log line when there is something to say.

A line has no payload, no message of a refusal (it may quote what the client sent) and no secret.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Final

import structlog

from shardbook.errors import ShardbookError
from shardbook_server.observer import Observer
from shardbook_server.rpc.call import Call

#: A call that took longer, its waiting for others not counted, is slow, seconds.
SLOW_S: Final = 1.0
#: Statuses that are the server's trouble; the others are what the client asked for.
FAILED: Final = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"})
_OK: Final = "OK"

_log = structlog.get_logger(__name__)


class AccessLog(StrEnum):
    """Which calls get a line: none, those that were refused, failed, cancelled or slow, or all."""

    NONE = "none"
    PROBLEMS = "problems"
    ALL = "all"


class Watch:
    """Tells of the calls of one method. Belongs to the event loop's thread.

    Args:
        method: Full name.
        streams: True when it answers a stream.
        observer: Who counts.
        access_log: Which calls get a line.
    """

    __slots__ = ("_access_log", "_calls", "_method", "_observer")

    def __init__(self, method: str, observer: Observer, access_log: AccessLog, *, streams: bool) -> None:
        self._method = method
        self._observer = observer
        self._calls = observer.method(method, streams=streams)
        self._access_log = access_log

    def begin(self) -> float:
        """A call begins; returns the moment for ``ended``."""
        self._calls.began()
        return time.perf_counter()

    def answered(self, call: Call, began_s: float) -> None:
        """A call was answered."""
        duration_s = time.perf_counter() - began_s
        self._calls.ended(_OK, duration_s)
        if self._access_log is AccessLog.PROBLEMS:
            if duration_s - call.waited_s > SLOW_S:
                _log.warning("slow", **_facts(call, _OK, "", duration_s))
        elif self._access_log is AccessLog.ALL:
            _log.info("answered", **_facts(call, _OK, "", duration_s))

    def cancelled(self, call: Call, began_s: float) -> None:
        """The client went away, or its deadline passed."""
        duration_s = time.perf_counter() - began_s
        self._calls.ended("CANCELLED", duration_s)
        if self._access_log is not AccessLog.NONE:
            _log.info("cancelled", **_facts(call, "CANCELLED", "", duration_s))

    def refused(self, call: Call, began_s: float, error: ShardbookError) -> None:
        """A call ends with an error of ours."""
        duration_s = time.perf_counter() - began_s
        self._calls.ended(error.status, duration_s)
        self._observer.refused(error.reason)
        if self._access_log is AccessLog.NONE:
            return
        facts = _facts(call, error.status, error.reason, duration_s)
        if error.status in FAILED:
            # Its message is about this server, never about what was sent.
            _log.warning("failed", **facts, message=error.message)
        else:
            _log.info("refused", **facts)

    def broken(self, call: Call, began_s: float, refusal: ShardbookError, bug: Exception) -> None:
        """A call met a bug; that is logged whatever the setting."""
        duration_s = time.perf_counter() - began_s
        # The client is told no more than INTERNAL, operators are: a damaged database is no ordinary bug.
        reason = bug.reason if isinstance(bug, ShardbookError) else refusal.reason
        self._calls.ended(refusal.status, duration_s)
        self._observer.refused(reason)
        _log.error("bug", **_facts(call, refusal.status, reason, duration_s), exc_info=bug)


def _facts(call: Call, code: str, reason: str, duration_s: float) -> dict[str, object]:
    return {
        "method": call.method,
        "request_id": call.request_id,
        "principal": call.principal,
        "code": code,
        "reason": reason,
        "duration_ms": round(duration_s * 1000, 1),
        "waited_ms": round(call.waited_s * 1000, 1),
    }
