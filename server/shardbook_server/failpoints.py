"""Faults on purpose, for tests of crashes and lost answers; off unless ``SHARDBOOK_FAILPOINTS`` is set.

``SHARDBOOK_FAILPOINTS="commit.before_db=exit; commit.after_db=sleep(2); register.after_db=error(0.05)"``

A point is ``{call}.before_db`` or ``{call}.after_db``: just before a service call that writes, and just after its
transaction, before anybody learns of it. What happens there: ``exit`` ends the process at once, as SIGKILL would;
``sleep(s)`` holds the worker thread; ``error(p)`` raises UNAVAILABLE with probability p.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shardbook.errors import InvalidArgumentError, UnavailableError

VARIABLE: Final = "SHARDBOOK_FAILPOINTS"
#: Every point there is. A name that is not here is refused: a fault that never fires proves nothing.
POINTS: Final = frozenset(
    f"{call}.{side}"
    for call in (
        "session",
        "plan",
        "register",
        "failure",
        "commit",
        "abort",
        "record",
        "claim",
        "delete",
        "prune",
        "files",
        "update",
        "move",
        "alias",
        "hold",
        "policy",
        "missing",
        "lineage",
    )
    for side in ("before_db", "after_db")
)
#: Exit code of ``exit``: that of a process ended by SIGKILL.
EXIT_CODE: Final = 137

_ACTION = re.compile(r"(?P<kind>exit|sleep|error)(?:\((?P<number>\d+(?:\.\d*)?|\.\d+)\))?")


@dataclass(frozen=True)
class Fault:
    """What happens at a point: ``exit``, ``sleep`` for ``number`` seconds, ``error`` with probability ``number``."""

    kind: str
    number: float

    def fire(self, point: str) -> None:
        """Does it.

        Raises:
            UnavailableError: The fault is ``error``, and its probability struck.
        """
        if self.kind == "exit":
            os._exit(EXIT_CODE)
        elif self.kind == "sleep":
            time.sleep(self.number)
        elif random.random() < self.number:
            raise UnavailableError(f"failpoint {point}", reason="FAILPOINT", retry_delay_s=0.05)


class Failpoints:
    """The faults of a process by point; immutable, usable from any thread."""

    def __init__(self, faults: Mapping[str, Fault] | None = None) -> None:
        self._faults = dict(faults or {})

    @classmethod
    def parse(cls, text: str) -> Failpoints:
        """Reads ``point=action; point=action``.

        Raises:
            InvalidArgumentError: A point or an action is not known.
        """
        faults = {}
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            point, _, action = (piece.strip() for piece in part.partition("="))
            match = _ACTION.fullmatch(action)
            if point not in POINTS or match is None or (match["kind"] == "sleep" and match["number"] is None):
                raise InvalidArgumentError(
                    f"{VARIABLE}: {part!r} is not point=exit|sleep(seconds)|error(probability), "
                    f"with a point out of {', '.join(sorted(POINTS))}",
                    field=VARIABLE,
                )
            faults[point] = Fault(match["kind"], float(match["number"] or 1.0))
        return cls(faults)

    @classmethod
    def from_environment(cls) -> Failpoints:
        """Reads ``SHARDBOOK_FAILPOINTS``; no faults when it is unset."""
        return cls.parse(os.environ.get(VARIABLE, ""))

    def __bool__(self) -> bool:
        return bool(self._faults)

    def hit(self, point: str) -> None:
        """Passes a point, in the worker thread that does the work; does nothing unless a fault is set there."""
        fault = self._faults.get(point)
        if fault is not None:
            fault.fire(point)
