"""Whose ``.metadata`` a directory holds: which attempt's, or that of a plain DCP save that came later.

Plain DCP may save into a directory that Shardbook saved into before. Its ``.metadata`` then speaks of newer data than
our manifest does, and whoever loads must get that. Shardbook leaves a mark in the attempt's directory before it writes
the attempt's export, so that it knows its own file again, wherever the directory was copied to, and whose it is, also
where several write at the same time. Another file counts when it is younger than what Shardbook left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

#: DCP ends its metadata with the id of the save, and Shardbook with the attempt, so the end tells files apart.
TAIL_BYTES: Final = 4096
_MARK_DIGITS: Final = 32


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

    @property
    def mark(self) -> str:
        """Name of the mark: several exports of one attempt have one each, so none is lost to another."""
        return f"exported-{self.size_bytes}-{self.tail_sha256[:_MARK_DIGITS]}"

    def to_bytes(self) -> bytes:
        """Returns the content of the mark, for people: its name says all."""
        return json.dumps({"v": 1, "size": self.size_bytes, "tail_sha256": self.tail_sha256}).encode()

    @classmethod
    def from_bytes(cls, content: bytes | None) -> Fingerprint | None:
        """Returns what ``.shardbook/exported`` says, which earlier versions kept; None when it is absent or damaged."""
        try:
            fields = json.loads(content or b"")
            return cls(int(fields["size"]), str(fields["tail_sha256"]))
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Exported:
    """Whose ``.metadata`` a directory holds.

    Attributes:
        is_there: There is one.
        prefix: Attempt that it was exported from; None when it is nobody's that is known.
        foreign_s: When somebody else wrote it, seconds since the epoch; None when nobody else did, or nobody knows.
        is_known: False where the filesystem cannot say.
    """

    is_there: bool
    prefix: str | None = None
    foreign_s: float | None = None
    is_known: bool = True


def noted(blocks: Iterable[bytes], note: Callable[[Fingerprint], object]) -> Iterator[bytes]:
    """Yields ``blocks``, and hands on their fingerprint after the last: before the file takes its place.

    Args:
        blocks: Content of ``.metadata``.
        note: Leaves the mark.
    """
    size_bytes, tail = 0, b""
    for block in blocks:
        size_bytes += len(block)
        tail = (tail + block[-TAIL_BYTES:])[-TAIL_BYTES:]
        yield block
    note(Fingerprint.of(size_bytes, tail))


def is_saved_over(foreign_s: float | None, ours: FileFacts | None) -> bool:
    """Returns True when ``.metadata`` is somebody else's and younger than our file about an attempt."""
    return foreign_s is not None and ours is not None and ours.mtime_s is not None and foreign_s > ours.mtime_s
