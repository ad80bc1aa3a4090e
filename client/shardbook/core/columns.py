"""Canonical packing of integer columns and names, and the frame around every payload.

A column of int64 is stored as its smallest (difference) and the rest above it in the narrowest width that
holds all of them, so a constant or an evenly spaced column costs a few bytes whatever its length. One sequence
of values has exactly one packing: that is what makes a digest of the bytes a digest of the content.

Arithmetic is modulo 2**64, so every int64 column can be packed, and no input can make the reader overflow.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from shardbook.core import limits
from shardbook.core.texts import decode_name, encode_name
from shardbook.errors import InvalidArgumentError

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_RAW: Final = 0
_ZSTD: Final = 1
_ZSTD_LEVEL: Final = 3
#: Below this many bytes zstd cannot win.
_RAW_BELOW_BYTES: Final = 40
_WIDTHS: Final = (1, 2, 4, 8)
_MASK64: Final = (1 << 64) - 1
_BYTES: Final = tuple(bytes((value,)) for value in range(256))
#: Width of a column: the sum of the steps whose bits its largest value needs.
_WIDTH_STEPS: Final = ((0, 1), (8, 1), (16, 2), (32, 4))


def malformed(what: str, *, field: str = "payload") -> InvalidArgumentError:
    """Returns the error for bytes that are not what they should be."""
    return InvalidArgumentError(f"malformed payload: {what}", reason="MALFORMED_PAYLOAD", field=field)


def not_canonical(what: str, *, field: str = "payload") -> InvalidArgumentError:
    """Returns the error for bytes that decode, but are not the one encoding of what they mean."""
    return InvalidArgumentError(f"payload is not canonical: {what}", reason="NOT_CANONICAL", field=field)


class ByteWriter:
    """Collects the canonical bytes of one payload. Not thread-safe."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def raw(self, content: bytes) -> None:
        """Appends bytes whose length the reader knows."""
        self._parts.append(content)

    def byte(self, value: int) -> None:
        """Appends one byte, 0 to 255."""
        self._parts.append(_BYTES[value])

    def varint(self, value: int) -> None:
        """Appends an unsigned integer below 2**64."""
        self._parts.append(_BYTES[value] if value < 0x80 else _varint_bytes(value))

    def signed(self, value: int) -> None:
        """Appends an int64, small magnitudes in few bytes."""
        self._parts.append(_signed_bytes(value))

    def blob(self, content: bytes) -> None:
        """Appends bytes behind their length."""
        self.varint(len(content))
        self._parts.append(content)

    def names(self, names: Sequence[str]) -> None:
        """Appends names whose number the reader knows: their lengths as a column, then their bytes."""
        text = "".join(names)
        if text.isascii():  # then a character is a byte, and one encoding does for all
            self.column(np.fromiter(map(len, names), dtype=np.int64, count=len(names)), delta=False)
            self._parts.append(text.encode("ascii"))
            return
        encoded = [encode_name(name) for name in names]
        self.column(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), delta=False)
        self._parts.extend(encoded)

    def column(self, values: npt.NDArray[np.integer], *, delta: bool) -> None:
        """Appends a column whose length the reader knows.

        Args:
            values: (N,) integers within int64.
            delta: True to pack differences, for columns that run or climb.
        """
        if len(values) == 0:
            return
        if len(values) == 1:
            # What the lines below would write of it, without some calls of numpy: small questions have many of these.
            self.signed(int(values[0]))
            if not delta:
                self.byte(0)
            return
        column = np.ascontiguousarray(values, dtype=np.int64)
        if delta:
            self.signed(int(column[0]))
            column = column[1:] - column[:-1]
            if len(column) == 0:
                return
        smallest = int(column.min())
        above = column.view(np.uint64) - np.uint64(smallest & _MASK64)
        largest = int(above.max())
        self.signed(smallest)
        width = next((w for w in _WIDTHS if largest < 1 << 8 * w), 8) if largest else 0
        self.byte(width)
        if width:
            self._parts.append(above.astype(f"<u{width}").tobytes())

    def bits(self, flags: npt.NDArray[np.bool_]) -> None:
        """Appends booleans, eight a byte, most significant bit first, padded with zeros."""
        self._parts.append(np.packbits(flags).tobytes())

    def finish(self) -> bytes:
        """Returns everything appended."""
        return b"".join(self._parts)


def pack_columns(values: Int64Array, counts: Int64Array, *, delta: bool) -> list[bytes]:
    """Packs many consecutive columns at once, each as ``ByteWriter.column`` packs it.

    Args:
        values: (N,) the columns one behind the other.
        counts: (T,) length of each; they add up to N.
        delta: As for ``ByteWriter.column``.

    Returns:
        T packed columns. What is computed is computed for all of them together: a column of its own costs no call
        of numpy unless its values differ.
    """
    starts = np.cumsum(counts) - counts
    headers: list[bytes] = [b""] * len(counts)
    rest, rest_counts = values, counts
    if delta:
        held = np.flatnonzero(counts)
        for row, first in zip(held.tolist(), values[starts[held]].tolist(), strict=True):
            headers[row] = _signed_bytes(first)
        inside = np.ones(len(values), dtype=np.bool_)
        inside[starts[held]] = False
        rest = np.diff(values, prepend=values[:1])[inside]
        rest_counts = np.maximum(counts - 1, 0)
    rows = np.flatnonzero(rest_counts)
    if len(rows) == 0:
        return headers
    begins = (np.cumsum(rest_counts) - rest_counts)[rows]
    smallest = np.minimum.reduceat(rest, begins)
    above = rest.view(np.uint64) - np.repeat(smallest, rest_counts[rows]).view(np.uint64)
    largest = np.maximum.reduceat(above, begins)
    none: Int64Array = np.zeros(len(rows), dtype=np.int64)
    widths = sum(((largest >= np.uint64(1 << bits)).astype(np.int64) * step for bits, step in _WIDTH_STEPS), none)
    ends = begins + rest_counts[rows]
    described = zip(*(column.tolist() for column in (rows, smallest, widths, begins, ends)), strict=True)
    for row, least, width, begin, end in described:
        headers[row] += _signed_bytes(least) + _BYTES[width]
        if width:
            headers[row] += above[begin:end].astype(f"<u{width}").tobytes()
    return headers


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@lru_cache(maxsize=1 << 12)
def _signed_bytes(value: int) -> bytes:
    return _varint_bytes(value << 1 if value >= 0 else ((-value - 1) << 1) | 1)


class ByteReader:
    """Reads what a ByteWriter wrote; raises InvalidArgumentError where the bytes end early or are not canonical."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def raw(self, size_bytes: int) -> bytes:
        """Returns the next ``size_bytes`` bytes."""
        end = self._at + size_bytes
        if size_bytes < 0 or end > len(self._content):
            raise malformed("it ends early")
        out = self._content[self._at : end]
        self._at = end
        return out

    def byte(self) -> int:
        """Returns the next byte."""
        at = self._at
        if at >= len(self._content):
            raise malformed("it ends early")
        self._at = at + 1
        return self._content[at]

    def varint(self, limit: int = _MASK64, what: str = "a count") -> int:
        """Returns the next unsigned integer; refuses one above ``limit``."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise malformed(f"{what} does not end")
        if byte == 0 and shift:
            raise not_canonical(f"{what} has leading zeros")
        if value > limit:
            raise InvalidArgumentError(
                f"{what} is {value}, the limit is {limit}", reason="LIMIT_EXCEEDED", field="payload"
            )
        return value

    def signed(self) -> int:
        """Returns the next int64."""
        coded = self.varint()
        return (coded >> 1) ^ -(coded & 1)

    def blob(self, limit: int, what: str) -> bytes:
        """Returns the next bytes that stand behind their length; refuses more than ``limit``."""
        return self.raw(self.varint(limit, what))

    def names(self, count: int, limit_bytes: int = limits.MAX_INFLATED_BYTES) -> tuple[str, ...]:
        """Returns the next ``count`` names."""
        lengths = self.column(count, delta=False)
        if count and (int(lengths.min()) < 0 or int(lengths.max()) > limit_bytes):
            raise malformed("a name has an impossible length")
        ends = list(itertools.accumulate(lengths.tolist()))
        content = self.raw(ends[-1] if ends else 0)
        if content.isascii():  # then a character is a byte, and one decoding does for all
            text = content.decode("ascii")
            return tuple(text[first:end] for first, end in zip([0, *ends], ends, strict=False))
        return tuple(decode_name(content[first:end]) for first, end in zip([0, *ends], ends, strict=False))

    def column(self, count: int, *, delta: bool) -> Int64Array:
        """Returns the next column, (count,) int64, writable."""
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        if not delta:
            return self._packed(count).view(np.int64)
        out = np.empty(count, dtype=np.uint64)
        out[0] = self.signed() & _MASK64
        if count > 1:
            out[1:] = self._packed(count - 1)
        np.cumsum(out, out=out)
        return out.view(np.int64)

    def _packed(self, count: int) -> npt.NDArray[np.uint64]:
        smallest = self.signed()
        width = self.byte()
        if width == 0:
            return np.full(count, smallest & _MASK64, dtype=np.uint64)
        if width not in _WIDTHS:
            raise malformed("a column has an unknown width")
        above = np.frombuffer(self.raw(count * width), dtype=f"<u{width}").astype(np.uint64)
        largest = int(above.max())
        if int(above.min()) != 0 or largest == 0 or (width > 1 and largest < 1 << 4 * width):
            raise not_canonical("a column could be narrower")
        out: npt.NDArray[np.uint64] = above + np.uint64(smallest & _MASK64)
        if int(out.view(np.int64).min()) != smallest:
            raise not_canonical("a column wraps around")
        return out

    def bits(self, count: int) -> npt.NDArray[np.bool_]:
        """Returns the next ``count`` booleans."""
        packed = np.frombuffer(self.raw((count + 7) // 8), dtype=np.uint8)
        flags = np.unpackbits(packed)
        if flags[count:].any():
            raise not_canonical("padding bits are set")
        return flags[:count].astype(np.bool_)

    def end(self) -> None:
        """Raises InvalidArgumentError unless everything was read."""
        if self._at != len(self._content):
            raise malformed(f"{len(self._content) - self._at} bytes are left over")


class _OwnZstd(threading.local):
    """A thread's own contexts: making one costs ten times what it does for a payload of some hundred bytes."""

    _compressor: zstandard.ZstdCompressor | None = None
    _decompressor: zstandard.ZstdDecompressor | None = None

    def compressor(self) -> zstandard.ZstdCompressor:
        if self._compressor is None:
            self._compressor = zstandard.ZstdCompressor(
                level=_ZSTD_LEVEL, write_checksum=False, write_content_size=True
            )
        return self._compressor

    def decompressor(self) -> zstandard.ZstdDecompressor:
        if self._decompressor is None:
            self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        return self._decompressor


_OWN = _OwnZstd()


def frame(content: bytes) -> bytes:
    """Returns ``content`` behind one byte that says raw or zstd, whichever is shorter."""
    if len(content) > _RAW_BELOW_BYTES:
        packed = _OWN.compressor().compress(content)
        if len(packed) < len(content):
            return bytes((_ZSTD,)) + packed
    return bytes((_RAW,)) + content


def inflated_bytes(payload: bytes) -> int:
    """Returns the bytes that a frame says it inflates to, which is what ``unframe`` holds it to.

    Raises:
        InvalidArgumentError: It is no frame, or does not say.
    """
    if not payload:
        raise malformed("it is empty")
    if payload[0] == _RAW:
        return len(payload) - 1
    if payload[0] != _ZSTD:
        raise malformed(f"unknown codec {payload[0]}")
    try:
        size_bytes = zstandard.frame_content_size(payload[1:])
    except zstandard.ZstdError as exc:
        raise malformed("it is not zstd") from exc
    if size_bytes < 0:
        raise malformed("its frame does not say its size")
    return int(size_bytes)


def unframe(payload: bytes, limit_bytes: int = limits.MAX_INFLATED_BYTES) -> bytes:
    """Returns the content of a frame; refuses one that inflates beyond ``limit_bytes`` before inflating it."""
    size_bytes = inflated_bytes(payload)
    codec, body = payload[0], payload[1:]
    if size_bytes > limit_bytes:
        raise InvalidArgumentError(
            f"payload inflates to {size_bytes} bytes, the limit is {limit_bytes}",
            reason="LIMIT_EXCEEDED",
            field="payload",
        )
    if codec == _RAW:
        return body
    try:
        return _OWN.decompressor().decompress(body, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise malformed("its zstd frame is damaged") from exc


def magic(kind: bytes, version: int) -> bytes:
    """Returns the header of a payload: ``SB``, two letters of its kind, its format version."""
    return struct.pack("<2s2sB", b"SB", kind, version)


def expect_magic(reader: ByteReader, kind: bytes, version: int) -> None:
    """Reads the header of a payload; refuses another kind and a version this code does not know."""
    header = reader.raw(5)
    if header[:4] != b"SB" + kind:
        raise malformed(f"it is not a {kind.decode()} payload")
    if header[4] != version:
        raise InvalidArgumentError(
            f"payload has format version {header[4]}, this release reads {version}",
            reason="UNSUPPORTED_FORMAT",
            field="payload",
        )
