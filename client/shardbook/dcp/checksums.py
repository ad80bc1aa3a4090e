"""CRC32C of every item, computed while a storage writer writes it; no file is read again.

DCP's writers ask their stream where it stands before and after each item. So a checksum of what was written since the
stream was last asked is one of an item, as it lies in the file; whether it is, the writer's own report of offset and
length says. Where nothing fits exactly, an item has no checksum rather than a wrong one.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import numpy as np
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.storage import WriteResult

from shardbook.config import Checksum
from shardbook.core.columns import Int64Array
from shardbook.core.extents import NO_CHECKSUM
from shardbook.dcp._torch import StorageInfo
from shardbook.errors import InvalidArgumentError

#: Bytes that are read under the interpreter's lock at a time: some tenths of a millisecond.
_SLICE_BYTES: Final = 4 << 20

#: Modes in which a file begins empty.
_NEW_FILE: Final = ("wb", "xb")
#: What one file's items begin at and how long they are, both in bytes, and their checksums.
_Segments = dict[tuple[int, int], int]


def check_available(checksum: Checksum) -> None:
    """Refuses a checksum that this machine cannot compute.

    Raises:
        InvalidArgumentError: The package for it is not installed (reason ``MISSING_PACKAGE``).
    """
    if checksum is Checksum.CRC32C and importlib.util.find_spec("google_crc32c") is None:
        raise InvalidArgumentError(
            "checksums need the package google-crc32c, which the extra [checksum] brings: "
            "pip install 'shardbook[checksum]'",
            reason="MISSING_PACKAGE",
            field="checksum",
        )


@cache
def _extend() -> Callable[[int, Any], int]:
    import google_crc32c

    extend: Callable[[int, Any], int] = google_crc32c.extend
    return extend


class _Summing:
    """A stream that sums what goes through it. Used by one thread, as the stream is.

    Args:
        stream: Stream of a new file.
        segments: Filled with what was written between two looks at the position.
    """

    def __init__(self, stream: Any, segments: _Segments) -> None:
        self._stream = stream
        self._segments = segments
        self._extend = _extend()
        self._begin = self._end = self._sum = 0
        self._is_straight = True

    def write(self, content: Any) -> Any:
        """Writes and sums; returns what the stream does."""
        written = self._stream.write(content)
        view = memoryview(content)
        if view.nbytes:  # the package takes arrays without copying them, but no memoryview
            array = np.frombuffer(view, dtype=np.uint8)
            for begin in range(0, len(array), _SLICE_BYTES):
                self._sum = self._extend(self._sum, array[begin : begin + _SLICE_BYTES])
            self._end += len(array)
        return written

    def writelines(self, lines: Sequence[Any]) -> None:
        """Writes one after the other."""
        for line in lines:
            self.write(line)

    def tell(self) -> int:
        """Returns the position; what was written since the last look becomes a segment."""
        position: int = self._stream.tell()
        if self._is_straight and position == self._end:
            self._segments[self._begin, position - self._begin] = self._sum
        self._begin = self._end = position
        self._sum = 0
        return position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> Any:
        """Goes elsewhere: what comes next may replace what was summed, so nothing of this file counts."""
        self._forget()
        return self._stream.seek(offset, whence)

    def truncate(self, size: int | None = None) -> Any:
        """Cuts the file: nothing of it counts."""
        self._forget()
        return self._stream.truncate(size)

    def _forget(self) -> None:
        self._is_straight = False
        self._segments.clear()

    def __getattr__(self, name: str) -> Any:
        """What does not change the content is the stream's."""
        return getattr(self._stream, name)


class WrittenChecksums:
    """Checksums of what a storage writer wrote. Thread-safe: a writer's threads have streams of their own.

    Args:
        writer: The writer.
    """

    def __init__(self, writer: FileSystemWriter) -> None:
        self._writer = writer
        self._files: dict[str, _Segments] = {}
        self._lock = threading.Lock()

    def of(self, results: Sequence[WriteResult]) -> Int64Array:
        """Returns the checksum of each result's bytes, (len(results),); NO_CHECKSUM where none is about just them."""
        found = map(self._checksum, results)
        return np.fromiter(found, dtype=np.int64, count=len(results))

    def _checksum(self, result: WriteResult) -> int:
        info = result.storage_data
        if type(info) is not StorageInfo:
            return NO_CHECKSUM
        path = self._writer.fs.concat_path(self._writer.path, info.relative_path)
        return self._files.get(str(path), {}).get((info.offset, info.length), NO_CHECKSUM)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sums, within the block, what the writer writes.

        The writer has a copy of its filesystem meanwhile: others may use the original.
        """
        filesystem = self._writer.fs
        watched = copy.copy(filesystem)
        watched.create_stream = self._summed(filesystem.create_stream)  # type: ignore[method-assign] # of this copy
        self._writer.fs = watched
        try:
            yield
        finally:
            self._writer.fs = filesystem

    def _summed(self, create_stream: Callable[..., Any]) -> Any:
        @contextmanager
        def summed(path: Any, mode: str) -> Iterator[Any]:
            with create_stream(path, mode) as stream:
                segments: _Segments = {}
                if mode != "rb":  # also of a file that is added to or changed: it is not what it was
                    with self._lock:
                        self._files[str(path)] = segments
                yield _Summing(stream, segments) if mode in _NEW_FILE else stream

        return summed
