"""Byte ranges of files: of this machine by ``pread``, of object stores by fsspec's ``cat_ranges``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from shardbook._fsspec_tree import filesystem_of, storage_errors
from shardbook._side_by_side import side_by_side
from shardbook.errors import CorruptDataError, NotFoundError
from shardbook.stores import encodable, normalized

#: Bytes of one ``pread``: large ranges are read by several threads, which is mostly the kernel's making of pages.
_BLOCK_BYTES: Final = 32 << 20

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ByteRange:
    """Bytes of one file.

    Attributes:
        path: Path relative to the checkpoint's directory.
        start: First byte.
        length: Bytes, none less than asked for.
    """

    path: str
    start: int
    length: int

    @property
    def end(self) -> int:
        """First byte past the range."""
        return self.start + self.length


class RangeReader(Protocol):
    """Reads byte ranges of a checkpoint's files. Thread-safe."""

    def fetch(self, ranges: Sequence[ByteRange]) -> list[Buffer]:
        """Returns the bytes of each range, in order, each exactly as long as asked for.

        Raises:
            NotFoundError: Reason ``NO_DATA_FILE``: a file is not there.
            CorruptDataError: A file ends before the range does.
            OSError: The storage failed.
        """
        ...

    def fill(self, wanted: Sequence[tuple[ByteRange, memoryview]]) -> None:
        """Reads each range into memory of its length; raises as ``fetch`` does."""
        ...

    def size(self, path: str) -> int:
        """Returns a file's size, bytes."""
        ...

    @property
    def is_distant(self) -> bool:
        """True when a second request costs more than many bytes."""
        ...


def range_reader(directory: str) -> RangeReader:
    """Returns the reader of a checkpoint's directory or URL.

    Raises:
        InvalidArgumentError: A URL, and fsspec or the package behind its scheme is not installed.
    """
    if "://" in directory and not directory.startswith("file://"):
        return _FsspecRanges(directory)
    return _LocalRanges(normalized(directory))


def check_path(path: str) -> str:
    """Returns a data file's path when it stays below the checkpoint's directory.

    Raises:
        CorruptDataError: It does not: whoever wrote the metadata must not choose which other files are read.
    """
    segments = path.split("/")
    if not path or "\0" in path or "" in segments or ".." in segments or ":" in segments[0]:
        raise CorruptDataError(f"the metadata names the file {path!a}, which leaves the checkpoint's directory")
    return path


@dataclass(frozen=True)
class _LocalRanges:
    """Files below a directory of this machine, network mounts included."""

    root: str

    @property
    def is_distant(self) -> bool:
        return False

    def fetch(self, ranges: Sequence[ByteRange]) -> list[Buffer]:
        return side_by_side(self._read, ranges)

    def fill(self, wanted: Sequence[tuple[ByteRange, memoryview]]) -> None:
        blocks = [
            (ByteRange(one.path, one.start + at, len(view[at : at + _BLOCK_BYTES])), view[at : at + _BLOCK_BYTES])
            for one, view in wanted
            for at in range(0, one.length, _BLOCK_BYTES)
        ]
        side_by_side(lambda block: self._read_into(*block), blocks)

    def size(self, path: str) -> int:
        with _missing():
            return os.stat(self._full(path)).st_size  # noqa: PTH116 - as bytes on disk, no Path wanted

    def _read(self, wanted: ByteRange) -> Buffer:
        # Before memory is taken for them: the metadata may claim any length.
        if self.size(wanted.path) < wanted.end:
            raise _truncated(wanted)
        out = bytearray(wanted.length)
        self.fill([(wanted, memoryview(out))])
        return out

    def _read_into(self, wanted: ByteRange, view: memoryview) -> None:
        with _missing():
            descriptor = os.open(self._full(wanted.path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < wanted.length:
                count = os.preadv(descriptor, [view[done:]], wanted.start + done)
                if not count:
                    raise _truncated(wanted)
                done += count
        finally:
            os.close(descriptor)

    def _full(self, path: str) -> str:
        return f"{self.root}/{check_path(path)}"


class _FsspecRanges:
    """Files below a URL."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = filesystem_of(url)

    @property
    def is_distant(self) -> bool:
        return True

    def fill(self, wanted: Sequence[tuple[ByteRange, memoryview]]) -> None:
        for (_, view), content in zip(wanted, self.fetch([one for one, _ in wanted]), strict=True):
            view[:] = content

    def fetch(self, ranges: Sequence[ByteRange]) -> list[Buffer]:
        if not ranges:
            return []
        paths = [self._full(one.path) for one in ranges]
        starts, ends = [one.start for one in ranges], [one.end for one in ranges]
        with storage_errors("read", self._root), _missing():
            try:
                found: list[Buffer] = self._fs.cat_ranges(paths, starts, ends, on_error="raise")
            except OSError:
                # Stores say in their own words that a range begins beyond the end.
                self._check_ends(ranges)
                raise
        for one, content in zip(ranges, found, strict=True):
            if len(content) != one.length:
                raise _truncated(one)
        return found

    def size(self, path: str) -> int:
        with storage_errors("look at", path), _missing():
            return int(self._fs.info(self._full(path))["size"])

    def _check_ends(self, ranges: Sequence[ByteRange]) -> None:
        sizes = {path: self.size(path) for path in {one.path for one in ranges}}
        for one in ranges:
            if one.end > sizes[one.path]:
                raise _truncated(one)

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{check_path(path)}"


@contextmanager
def _missing() -> Iterator[None]:
    """Raises NotFoundError where a file is not there."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"a data file of the checkpoint is not there: {encodable(str(error))}", reason="NO_DATA_FILE"
        ) from error


def _truncated(wanted: ByteRange) -> CorruptDataError:
    return CorruptDataError(
        f"{encodable(wanted.path)} ends before byte {wanted.end}, where the checkpoint's metadata has data",
        metadata={"file": encodable(wanted.path), "offset": str(wanted.start)},
    )


__all__ = ["Buffer", "ByteRange", "RangeReader", "check_path", "range_reader"]
