"""How the values of one chunk lie in the bytes of its item, whatever wrote them. No I/O."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardbook.core.box import Box
from shardbook.reading.ranges import Buffer

Array = npt.NDArray[Any]


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of an array without gaps, elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def span(strides: tuple[int, ...], box: Box) -> tuple[int, int]:
    """Returns the first element in memory that a box touches, and the first one past all that it touches.

    The box has cells. What lies between may be more than the box: some columns of all rows span nearly all of a matrix.
    """
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    last = first + sum((size - 1) * stride for size, stride in zip(box.sizes, strides, strict=True))
    return first, last + 1


@dataclass(frozen=True)
class StoredTensor:
    """A chunk in an item's bytes.

    Attributes:
        start: First byte of its memory in the item.
        size_bytes: Bytes of its memory.
        offset: First element in the memory, elements.
        strides: Elements, one a dimension.
        is_big_endian: Byte order of the memory.
        is_conjugate: The memory holds the conjugates of the values.
        is_negative: The memory holds the negatives of the values.
    """

    start: int
    size_bytes: int
    offset: int
    strides: tuple[int, ...]
    is_big_endian: bool = False
    is_conjugate: bool = False
    is_negative: bool = False

    def bytes_of(self, box: Box, itemsize: int) -> tuple[int, int]:
        """Returns first byte, in the item, and length of what a box needs; raises ValueError when it is not there."""
        first, end = span(self.strides, box)
        if (self.offset + end) * itemsize > self.size_bytes:
            raise ValueError(f"its memory of {self.size_bytes} bytes ends before its values do")
        return self.start + (self.offset + first) * itemsize, (end - first) * itemsize

    def is_plain(self, box: Box) -> bool:
        """Returns True when the memory of a box is, byte by byte, a row-major array of this machine."""
        if self.is_conjugate or self.is_negative or self.is_big_endian != (sys.byteorder == "big"):
            return False
        both = zip(self.strides, row_major(box.sizes), box.sizes, strict=True)
        return all(size == 1 or stride == plain for stride, plain, size in both)

    def values(self, content: Buffer, box: Box, dtype: np.dtype[Any]) -> Array:
        """Returns the cells of a box from the bytes that ``bytes_of`` names; a view of them where that is possible."""
        if self.is_big_endian != (sys.byteorder == "big"):
            content = _swapped(content, dtype)
        # Of a dimension of one element the stride is not bound by the memory, and may be any number.
        pairs = zip(self.strides, box.sizes, strict=True)
        strides = [0 if size == 1 else stride * dtype.itemsize for stride, size in pairs]
        found: Array = np.ndarray(box.sizes, dtype, content, strides=strides)
        if self.is_conjugate:
            found = np.conjugate(found)
        return np.negative(found) if self.is_negative else found


def _swapped(content: Buffer, dtype: np.dtype[Any]) -> bytes:
    """The same values in the other byte order; both halves of a complex number for itself."""
    width = dtype.itemsize // 2 if dtype.kind == "c" or dtype.name == "complex32" else dtype.itemsize
    return np.frombuffer(content, np.uint8).reshape(-1, width)[:, ::-1].tobytes()


__all__ = ["Array", "StoredTensor", "row_major", "span"]
