"""Whose ``.metadata`` a directory holds: Shardbook's, or that of a plain DCP save that came later.

Plain DCP may save into a directory that Shardbook saved into before. Its ``.metadata`` then speaks of newer data than
our manifest does, and whoever loads must get that. Shardbook notes what it exported, so that it knows its own file
again, wherever the directory was copied to; another file counts when it is younger than ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: DCP ends its metadata with the id of the save, so the end of the file tells saves apart.
TAIL_BYTES: Final = 4096


@dataclass(frozen=True)
class FileFacts:
    """What a filesystem knows of a file: its size, bytes, and when it was written, seconds since the epoch."""

    size_bytes: int
    mtime_s: float | None


@dataclass(frozen=True)
class Fingerprint:
    """What tells one ``.metadata`` from another without reading all of it."""

    size_bytes: int
    tail_sha256: str

    @classmethod
    def of(cls, size_bytes: int, tail: bytes) -> Fingerprint:
        """Returns the fingerprint of a file by its size and its last ``TAIL_BYTES`` bytes, or all where it has less."""
        return cls(size_bytes, hashlib.sha256(tail[-TAIL_BYTES:]).hexdigest())

    def to_bytes(self) -> bytes:
        """Returns what is kept in ``.shardbook/exported``."""
        return json.dumps({"v": 1, "size": self.size_bytes, "tail_sha256": self.tail_sha256}).encode()

    @classmethod
    def from_bytes(cls, content: bytes | None) -> Fingerprint | None:
        """Returns what was kept; None when it is absent or damaged: then no file is known again."""
        try:
            fields = json.loads(content or b"")
            return cls(int(fields["size"]), str(fields["tail_sha256"]))
        except (ValueError, KeyError, TypeError):
            return None


def foreign_since(facts: FileFacts | None, tail: Callable[[], bytes], exported: bytes | None) -> float | None:
    """Returns when somebody else wrote ``.metadata``, seconds since the epoch; None when it is ours, or nobody knows.

    Args:
        facts: Of ``.metadata``; None when there is none.
        tail: Reads its last ``TAIL_BYTES`` bytes.
        exported: Content of ``.shardbook/exported``; None when there is none.
    """
    if facts is None or facts.mtime_s is None:
        return None
    own = Fingerprint.from_bytes(exported)
    if own is not None and own.size_bytes == facts.size_bytes and own == Fingerprint.of(facts.size_bytes, tail()):
        return None
    return facts.mtime_s


def is_saved_over(foreign_s: float | None, ours: FileFacts | None) -> bool:
    """Returns True when ``.metadata`` is somebody else's and younger than our file about an attempt."""
    return foreign_s is not None and ours is not None and ours.mtime_s is not None and foreign_s > ours.mtime_s
