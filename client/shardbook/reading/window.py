"""The bytes of one item of a data file that are at hand, and a way to get more of them."""

from __future__ import annotations

import io

from shardbook.errors import CorruptDataError
from shardbook.reading.ranges import Buffer, ByteRange, RangeReader

#: Most bytes that one item may have fetched, beside its values, to be understood.
MAX_DESCRIPTION_BYTES = 64 << 20


class Window:
    """A part of a file, of which some ranges were read already. Positions are relative to its beginning.

    Not thread-safe.

    Args:
        reader: Reads what is not at hand.
        path: The file, relative to the checkpoint's directory.
        base: First byte of the part.
        size: Bytes of the part.
    """

    def __init__(self, reader: RangeReader, path: str, base: int, size: int) -> None:
        self.path = path
        self.base = base
        self.size = size
        self._reader = reader
        self._held: list[tuple[int, Buffer]] = []
        self._fetched_bytes = 0

    def range(self, start: int, length: int) -> ByteRange:
        """Returns a range of this part as one of the file; raises CorruptDataError where it leaves the part."""
        if start < 0 or length < 0 or start + length > self.size:
            raise self.corrupt(f"an item of {self.size} bytes names bytes {start} to {start + length} of itself")
        return ByteRange(self.path, self.base + start, length)

    def hold(self, wanted: ByteRange, content: Buffer) -> None:
        """Keeps bytes that were read."""
        self._held.append((wanted.start - self.base, content))

    def held(self, start: int, length: int) -> memoryview | None:
        """Returns bytes without a copy; None when not all of them are at hand."""
        for first, content in self._held:
            if first <= start and start + length <= first + len(content):
                return memoryview(content)[start - first : start - first + length]
        return None

    def read(self, start: int, length: int) -> memoryview:
        """Returns bytes, which are read now when they are not at hand.

        Raises:
            CorruptDataError: They leave the part, or are more than any description takes.
        """
        found = self.held(start, length)
        if found is None:
            wanted = self.range(start, length)
            self._fetched_bytes += length
            if self._fetched_bytes > MAX_DESCRIPTION_BYTES:
                raise self.corrupt("an item's description is too long")
            (content,) = self._reader.fetch([wanted])
            self.hold(wanted, content)
            found = memoryview(content)
        return found

    def corrupt(self, why: str) -> CorruptDataError:
        """Returns the error that says where the item is."""
        return CorruptDataError(
            f"{self.path!a} at byte {self.base}: {why}", metadata={"file": self.path, "offset": str(self.base)}
        )


class WindowFile(io.RawIOBase):
    """A window as a file, for whoever reads files. What is read of it is what is fetched."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window
        self._at = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position; raises OSError, as files do, where it would be negative."""
        at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._window.size}[whence] + offset
        if at < 0:
            raise OSError("a negative position")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        """Returns the next bytes, less of them at the end."""
        left = max(0, self._window.size - self._at)
        count = left if size is None or size < 0 else min(size, left)
        content = bytes(self._window.read(self._at, count))
        self._at += count
        return content


__all__ = ["MAX_DESCRIPTION_BYTES", "Window", "WindowFile"]
