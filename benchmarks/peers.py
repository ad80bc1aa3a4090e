"""Client processes that writers and watchers live in."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

#: In a client process: ``begin`` is a barrier of all that write, ``ready`` a semaphore for each watcher that is level.
GATES: Final[dict[str, Any]] = {}


@dataclass(frozen=True)
class Peers:
    """Client processes that writers and watchers live in. Not thread-safe.

    Attributes:
        writers: Runs ``write`` and ``call_nothing``, one in each process at a time.
        watchers: Runs ``follow``, likewise.
        processes: How many of each.
        ready: Released by each watcher that hears a round begin.
    """

    writers: ProcessPoolExecutor
    watchers: ProcessPoolExecutor
    processes: int
    ready: Any


def _set_gates(gates: dict[str, Any]) -> None:
    GATES.update(gates)


@contextmanager
def peers(processes: int = 2) -> Iterator[Peers]:
    """Yields client processes that are ended with the block."""
    context = multiprocessing.get_context("spawn")
    begin, ready = context.Barrier(processes), context.Semaphore(0)
    gates = {"begin": begin, "ready": ready}
    with (
        ProcessPoolExecutor(processes, context, initializer=_set_gates, initargs=(gates,)) as writers,
        ProcessPoolExecutor(processes, context, initializer=_set_gates, initargs=(gates,)) as watchers,
    ):
        yield Peers(writers, watchers, processes, ready)
