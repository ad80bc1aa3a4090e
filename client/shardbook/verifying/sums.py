"""Whether data files hold the bytes that were written: CRC32C of every extent that a checksum was kept of."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Final

import numpy as np

from shardbook._side_by_side import side_by_side
from shardbook._trees import Tree
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.footprint import Footprint
from shardbook.errors import InvalidArgumentError

#: Bytes that one thread reads and sums at a time; summing holds the interpreter's lock, for less than a millisecond.
_SLICE_BYTES: Final = 4 << 20

_Sum = Callable[[int, bytes], int]


def altered_extents(
    tree: Tree, directory: str, footprint: Footprint, rows: Int64Array, tell: Callable[[int], None]
) -> BoolArray:
    """Reads extents and compares them with their checksums, many files at a time.

    Args:
        tree: The storage.
        directory: The checkpoint's directory.
        footprint: Its extents, N of them.
        rows: The ones to look at: with a checksum, in files that are long enough.
        tell: Hears of how many bytes more were read, from several threads.

    Returns:
        (N,) True for those that are not what was written.

    Raises:
        InvalidArgumentError: The package that sums is not installed (``MISSING_PACKAGE``).
        OSError: The storage failed.
    """
    altered = np.zeros(footprint.extent_count, dtype=np.bool_)
    if not len(rows):
        return altered
    extend = _extend()
    wanted = np.zeros(footprint.extent_count, dtype=np.bool_)
    wanted[rows] = True

    def look(file: int) -> Int64Array:
        own = footprint.rows_of(file)
        own = own[wanted[own]]
        with tree.open(f"{directory}/{footprint.paths[file]}") as stream:
            return own[_differ(stream, footprint, own, extend, tell)]

    for wrong in side_by_side(look, np.unique(footprint.file[rows]).tolist()):
        altered[wrong] = True
    return altered


def _differ(
    stream: IO[bytes], footprint: Footprint, rows: Int64Array, extend: _Sum, tell: Callable[[int], None]
) -> BoolArray:
    """Which of the extents in one file are not what was written; they come in the order in which they begin."""
    columns = (footprint.start[rows], footprint.length[rows], footprint.checksum[rows])
    differ = np.zeros(len(rows), dtype=np.bool_)
    for at, (start, length, checksum) in enumerate(zip(*(one.tolist() for one in columns), strict=True)):
        if stream.tell() != start:
            stream.seek(start)
        differ[at] = _sum_of(stream, length, extend) != checksum
        tell(length)
    return differ


def _sum_of(stream: IO[bytes], length: int, extend: _Sum) -> int | None:
    """Sums the next bytes of a stream; None where it ends before them."""
    value, left = 0, length
    while left:
        content = stream.read(min(left, _SLICE_BYTES))
        if not content:
            return None
        value = extend(value, content)
        left -= len(content)
    return value


def _extend() -> _Sum:
    try:
        import google_crc32c
    except ImportError as error:
        raise InvalidArgumentError(
            "checksums need the package google-crc32c, which the extra [checksum] brings: "
            "pip install 'shardbook[checksum]'",
            reason="MISSING_PACKAGE",
            field="checksums",
        ) from error
    extend: _Sum = google_crc32c.extend
    return extend


__all__ = ["altered_extents"]
