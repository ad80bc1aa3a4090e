"""What becomes known of a call when it ends: its numbers, and one log line when there is something to say.

A line has no payload, no message of a refusal (it may quote what the client sent) and no secret. When thousands of
ranks meet the same trouble, the first calls get a line each and the rest are counted: the log must not slow the save.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
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
#: Lines of one kind and method in so many seconds, when not every call is asked for; those beyond are counted.
BURST_LINES: Final = 20
BURST_S: Final = 10.0

_log = structlog.get_logger(__name__)


class AccessLog(StrEnum):
    """Which calls get a line: none, those that were refused, failed, cancelled or slow, or all."""

    NONE = "none"
    PROBLEMS = "problems"
    ALL = "all"


class _Burst:
    """How many lines of one kind were written lately, and how many were not."""

    __slots__ = ("_began_s", "_lines", "_unsaid")

    def __init__(self) -> None:
        self._began_s = 0.0
        self._lines = 0
        self._unsaid = 0

    def admit(self, now_s: float) -> dict[str, int] | None:
        """Returns what to add to a line, or None when the line is not to be written."""
        if now_s - self._began_s >= BURST_S:
            self._began_s, self._lines = now_s, 0
        if self._lines >= BURST_LINES:
            self._unsaid += 1
            return None
        self._lines += 1
        unsaid, self._unsaid = self._unsaid, 0
        return {"unsaid_before": unsaid} if unsaid else {}


class Watch:
    """Tells of the calls of one method. Belongs to the event loop's thread.

    Args:
        method: Full name.
        kind: How it is called: ``unary``, ``server_stream``, ``bidi_stream``.
        observer: Who counts.
        access_log: Which calls get a line.
    """

    __slots__ = ("_access_log", "_bursts", "_calls", "_method", "_observer")

    def __init__(self, method: str, observer: Observer, access_log: AccessLog, *, kind: str) -> None:
        self._method = method
        self._observer = observer
        self._calls = observer.method(method, kind=kind)
        self._access_log = access_log
        self._bursts: defaultdict[tuple[str, str], _Burst] = defaultdict(_Burst)

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
                self._say("slow", logging.WARNING, _facts(call, _OK, "", duration_s))
        elif self._access_log is AccessLog.ALL:
            _log.info("answered", **_facts(call, _OK, "", duration_s))

    def cancelled(self, call: Call, began_s: float) -> None:
        """The client went away, or its deadline passed."""
        duration_s = time.perf_counter() - began_s
        self._calls.ended("CANCELLED", duration_s)
        if self._access_log is not AccessLog.NONE:
            self._say("cancelled", logging.INFO, _facts(call, "CANCELLED", "", duration_s))

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
            self._say("failed", logging.WARNING, {**facts, "message": error.message})
        else:
            self._say("refused", logging.INFO, facts)

    def broken(self, call: Call, began_s: float, refusal: ShardbookError, bug: Exception) -> None:
        """A call met a bug; that is logged whatever the setting."""
        duration_s = time.perf_counter() - began_s
        # The client is told no more than INTERNAL, operators are: a damaged database is no ordinary bug.
        reason = bug.reason if isinstance(bug, ShardbookError) else refusal.reason
        self._calls.ended(refusal.status, duration_s)
        self._observer.refused(reason)
        _log.error("bug", **_facts(call, refusal.status, reason, duration_s), exc_info=bug)

    def _say(self, event: str, level: int, facts: dict[str, object]) -> None:
        """Writes a line, unless the setting is for problems and many like it were written lately."""
        more: dict[str, int] | None = {}
        if self._access_log is not AccessLog.ALL:
            more = self._bursts[event, str(facts["reason"])].admit(time.monotonic())
        if more is not None:
            _log.log(level, event, **facts, **more)


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
