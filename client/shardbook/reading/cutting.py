"""What is wanted of each chunk of a tensor, and where it goes in the result. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardbook.core.box import Box
from shardbook.core.columns import Int64Array
from shardbook.core.overlap import BudgetExceededError, find_overlap
from shardbook.errors import CorruptDataError, ResourceExhaustedError
from shardbook.reading.finding import WantedTensor
from shardbook.reading.stored import Array
from shardbook.reading.transforms import check_transforms


@dataclass(frozen=True, eq=False)
class Piece:
    """Cells of one chunk that are wanted.

    Attributes:
        fqn: Tensor.
        dtype_name: torch's name of its dtype.
        dtype: numpy's.
        path: File of the item, relative to the checkpoint's directory.
        start: First byte of the item.
        length: Bytes of the item.
        transforms: Transform descriptors.
        sizes: Of the chunk, elements.
        inside: The cells, in the chunk's coordinates.
        out: Where they go.
    """

    fqn: str
    dtype_name: str
    dtype: np.dtype[Any]
    path: str
    start: int
    length: int
    transforms: tuple[str, ...]
    sizes: tuple[int, ...]
    inside: Box
    out: Array

    @property
    def values_bytes(self) -> int:
        """Bytes of the chunk's values."""
        return math.prod(self.sizes) * self.dtype.itemsize


def cut(wanted: WantedTensor, dtype: np.dtype[Any]) -> tuple[Array, list[Piece]]:
    """Returns memory for the wanted cells, in all of the tensor's dimensions, and the pieces that fill it.

    Raises:
        CorruptDataError: Chunks do not cover the cells.
        InvalidArgumentError: A chunk's bytes can only be read with torch (reason ``UNSUPPORTED_TRANSFORM``).
        ResourceExhaustedError: There is no memory for the result (``OUT_OF_MEMORY``).
    """
    chunks = _Cut.of(wanted)
    out = _empty(wanted, dtype)
    return out, list(_pieces(wanted, chunks, out))


@dataclass(frozen=True, eq=False)
class _Cut:
    """The chunks that hold wanted cells, K of them, D dimensions.

    Attributes:
        rows: (K,) chunks.
        low: (K, D) first wanted cell of each, in the tensor's coordinates.
        high: (K, D) first one past the wanted cells.
    """

    rows: Int64Array
    low: Int64Array
    high: Int64Array

    @classmethod
    def of(cls, wanted: WantedTensor) -> _Cut:
        """Returns what is wanted of each chunk; raises CorruptDataError where chunks leave cells out."""
        chunks, box = wanted.chunks, wanted.selection.box
        rows = chunks.touching(box)
        low = np.maximum(chunks.offsets[rows], np.array(box.offsets, np.int64))
        high = np.minimum(chunks.offsets[rows] + chunks.sizes[rows], np.array(box.ends, np.int64))
        missing = box.volume - _covered(low - np.array(box.offsets, np.int64), high - low, box)
        if missing > 0:
            raise CorruptDataError(f"the checkpoint's chunks leave out {missing} of {chunks.fqn!a}'s cells")
        return cls(rows, low, high)


def _covered(offsets: Int64Array, sizes: Int64Array, box: Box) -> int:
    """How many cells of a box are covered. Plain DCP proves nothing, and a chunk that is there twice is no harm."""
    if len(offsets) < 2 or not box.ndim or not _may_overlap(offsets, sizes):
        return sum(map(math.prod, sizes.tolist()))
    mask = np.zeros(box.sizes, np.bool_)
    for begin, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        mask[tuple(slice(first, first + count) for first, count in zip(begin, size, strict=True))] = True
    return int(np.count_nonzero(mask))


def _may_overlap(offsets: Int64Array, sizes: Int64Array) -> bool:
    try:
        return find_overlap(offsets, sizes) is not None
    except BudgetExceededError:
        return True


def _empty(wanted: WantedTensor, dtype: np.dtype[Any]) -> Array:
    """Memory for the result; raises ResourceExhaustedError when there is not so much."""
    box = wanted.selection.box
    try:
        return np.empty(box.sizes, dtype)
    except (MemoryError, ValueError) as error:
        raise ResourceExhaustedError(
            f"{wanted.chunks.fqn!a} takes {box.volume * dtype.itemsize} bytes of memory: read a part of it",
            reason="OUT_OF_MEMORY",
        ) from error


def _pieces(wanted: WantedTensor, cut: _Cut, out: Array) -> Iterator[Piece]:
    """What is wanted of each chunk."""
    chunks, box, dtype = wanted.chunks, wanted.selection.box, out.dtype
    for row, first, end in zip(cut.rows.tolist(), cut.low.tolist(), cut.high.tolist(), strict=True):
        at = tuple(slice(*pair) for pair in zip(_minus(first, box.offsets), _minus(end, box.offsets), strict=True))
        number = int(chunks.transform_index[row])
        transforms = chunks.transforms[number - 1] if number else ()
        check_transforms(transforms, chunks.fqn)
        yield Piece(
            fqn=chunks.fqn,
            dtype_name=chunks.dtype,
            dtype=dtype,
            path=chunks.paths[int(chunks.file[row])],
            start=int(chunks.start[row]),
            length=int(chunks.length[row]),
            transforms=transforms,
            sizes=tuple(chunks.sizes[row].tolist()),
            inside=Box(_minus(first, chunks.offsets[row].tolist()), _minus(end, first)),
            out=out[at] if at else out,
        )


def _minus(one: Iterable[int], other: Iterable[int]) -> tuple[int, ...]:
    return tuple(left - right for left, right in zip(one, other, strict=True))


__all__ = ["Piece", "cut"]
