"""Columns that are the same for many ranks, kept in memory once: which entries a rank has, in which order it writes."""

from __future__ import annotations

import threading
from typing import Final
from weakref import WeakValueDictionary

from shardbook.core.columns import Int64Array

_lock: Final = threading.Lock()
_held: Final[WeakValueDictionary[bytes, Int64Array]] = WeakValueDictionary()


def interned(column: Int64Array) -> Int64Array:
    """Returns a column equal to ``column`` (N,) that all callers with equal ones share; read-only. Thread-safe.

    It is forgotten when nobody holds it any more.
    """
    key = column.tobytes()
    with _lock:
        held = _held.get(key)
        if held is None:
            column.flags.writeable = False
            _held[key] = held = column
    return held
