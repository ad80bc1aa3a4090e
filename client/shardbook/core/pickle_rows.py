"""Pickle, written without objects: opcodes of single values, and rows of equal width from integer columns.

A pickle is a program for a stack machine. Where many objects of one class differ in numbers alone, their programs
differ in a few bytes at fixed places: one template is repeated, and numpy puts each column in its place.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shardbook.core.columns import Int64Array
from shardbook.core.texts import encode_name

#: Begins a pickle of protocol 4, whose memo and frames every Python that runs torch knows.
START: Final = pickle.PROTO + bytes((4,))

MARK, STOP, POP, NONE = pickle.MARK, pickle.STOP, pickle.POP, pickle.NONE
TRUE, FALSE = pickle.NEWTRUE, pickle.NEWFALSE
REDUCE, BUILD = pickle.REDUCE, pickle.BUILD
LIST, APPENDS = pickle.EMPTY_LIST, pickle.APPENDS
DICT, SETITEMS = pickle.EMPTY_DICT, pickle.SETITEMS
TUPLE, TUPLE1 = pickle.TUPLE, pickle.TUPLE1
MEMOIZE, STACK_GLOBAL = pickle.MEMOIZE, pickle.STACK_GLOBAL
#: Makes an object of the class on the stack without calling its ``__init__``.
NEW: Final = pickle.EMPTY_TUPLE + pickle.NEWOBJ

_TUPLES: Final = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
#: Byte counts of a LONG1 that a column may have, with the numpy types of its parts.
_LONG_PARTS: Final = ((5, ("<u4", "u1")), (6, ("<u4", "<u2")), (8, ("<u8",)))


@dataclass(frozen=True, eq=False)
class IntColumn:
    """Integers that all rows have at the same place.

    Attributes:
        opcode: What comes before the number: the same in all rows.
        parts: Little-endian numpy types of the number's bytes, low ones first.
        values: (N,) numbers.
    """

    opcode: bytes
    parts: tuple[str, ...]
    values: Int64Array


def integers(values: Int64Array) -> IntColumn:
    """Returns the column that pushes ``values`` (N,), any int64, in the narrowest form that holds all of them."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if low >= 0:
        if high < 1 << 8:
            return IntColumn(pickle.BININT1, ("u1",), values)
        if high < 1 << 16:
            return IntColumn(pickle.BININT2, ("<u2",), values)
    if low >= -(1 << 31) and high < 1 << 31:
        return IntColumn(pickle.BININT, ("<u4",), values)
    # LONG1 is two's complement: its highest bit is the sign.
    width, parts = next(
        (width, parts) for width, parts in _LONG_PARTS if width == 8 or (low >= 0 and high < 1 << (8 * width - 1))
    )
    return IntColumn(pickle.LONG1 + bytes((width,)), parts, values)


def memoized(indices: Int64Array) -> IntColumn:
    """Returns the column that pushes the objects under memo ``indices`` (N,)."""
    return IntColumn(pickle.LONG_BINGET, ("<u4",), indices)


def rows(parts: Iterable[bytes | IntColumn], count: int) -> bytearray:
    """Returns ``count`` programs, one after the other: what is constant in all of them, and columns in their places."""
    template = bytearray()
    fields: list[tuple[int, str, Int64Array, int]] = []
    for part in parts:
        if isinstance(part, bytes):
            template += part
            continue
        template += part.opcode
        shift = 0
        for kind in part.parts:
            fields.append((len(template), kind, part.values, shift))
            width = np.dtype(kind).itemsize
            template += bytes(width)
            shift += 8 * width
    content = template * count
    if count:
        for offset, kind, values, shift in fields:
            place = np.ndarray((count,), kind, content, offset, (len(template),))
            # Keeps the low bits, which is what a narrower part of a longer number is.
            place[:] = (values >> shift if shift else values).astype(kind)
    return content


def tuple_of(values: Sequence[IntColumn]) -> tuple[bytes | IntColumn, ...]:
    """Returns parts of a row that push a tuple of the columns' numbers."""
    if len(values) < len(_TUPLES):
        return *values, _TUPLES[len(values)]
    return MARK, *values, TUPLE


class Memo:
    """Counts what an unpickler will have in its memo, in which objects get indices in order."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int = 1) -> int:
        """Returns the index of the next object that is memoized, and reserves ``count`` of them."""
        first = self.size
        self.size += count
        return first


def text(value: str) -> bytes:
    """Returns what pushes a ``str``, lone surrogates included."""
    content = encode_name(value)
    if len(content) < 256:
        return pickle.SHORT_BINUNICODE + bytes((len(content),)) + content
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def integer(value: int) -> bytes:
    """Returns what pushes one ``int`` within int64."""
    return bytes(rows((integers(np.array([value], dtype=np.int64)),), 1))


def optional_text(value: str | None) -> bytes:
    """Returns what pushes a ``str`` or None."""
    return NONE if value is None else text(value)


def get(index: int) -> bytes:
    """Returns what pushes the object under a memo index."""
    if index < 256:
        return pickle.BINGET + bytes((index,))
    return pickle.LONG_BINGET + struct.pack("<I", index)


def framed(parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Returns whole opcodes as one frame: an unpickler reads it at once, instead of opcode by opcode."""
    content = b"".join(parts)
    return b"".join((pickle.FRAME, struct.pack("<Q", len(content)), content))
