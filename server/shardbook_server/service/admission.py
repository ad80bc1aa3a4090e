"""Which large computations may go on at the same time: by their memory, and once for the same content."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class MemoryBudget:
    """Memory that computations take by their own estimate. Thread-safe.

    Small ones go on beside a large one, so that a job of a few ranks does not wait for one of many; two that do not
    fit together go one after the other, in the order they came.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Starts with nothing taken."""
        self._capacity_bytes = capacity_bytes
        self._taken_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Waits for room and takes it for the block. What is larger than the whole is let in alone."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._fits(size_bytes))
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
            self._taken_bytes += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._taken_bytes -= size_bytes
                self._changed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        return not self._taken_bytes or self._taken_bytes + size_bytes <= self._capacity_bytes


class SingleFlight:
    """Lets one thread at a time into the work with the same key. Thread-safe."""

    def __init__(self) -> None:
        """Starts with nobody inside."""
        self._locks: dict[Hashable, tuple[threading.Lock, int]] = {}
        self._guard = threading.Lock()

    @contextmanager
    def alone(self, key: Hashable) -> Iterator[None]:
        """Waits until no other thread is inside with ``key``."""
        with self._guard:
            lock, count = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = lock, count + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, count = self._locks[key]
                if count == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = lock, count - 1
