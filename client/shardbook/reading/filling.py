"""Reads the cells that are wanted of tensors, chunk by chunk, in as few byte ranges as hold them.

Chunks that are wanted as a whole, and small ones, take one range. Of others the two ends are read first, which say
where the values are, and then the values: as far as the wanted part spans in memory, which for rows is exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shardbook.core.box import Box
from shardbook.core.columns import Int64Array
from shardbook.core.limits import INT64_MAX
from shardbook.core.overlap import BudgetExceededError, find_overlap
from shardbook.errors import CorruptDataError, ResourceExhaustedError
from shardbook.reading import safetensors_file, torch_save
from shardbook.reading.dtypes import numpy_dtype
from shardbook.reading.finding import WantedTensor
from shardbook.reading.ranges import ByteRange, RangeReader
from shardbook.reading.stored import Array, StoredTensor, row_major, span
from shardbook.reading.transforms import check_transforms, undo_transforms
from shardbook.reading.window import Window

#: Items up to this many bytes are read as a whole: a second request costs more than its bytes.
SMALL_BYTES: Final = 256 << 10
#: Bytes that are in flight at once, beside the result; a chunk that is wanted as a whole may be more by itself.
IN_FLIGHT_BYTES: Final = 256 << 20
#: Enough of an item's beginning to tell what wrote it.
_SNIFFED_BYTES: Final = 64


@dataclass(frozen=True, eq=False)
class _Piece:
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
    def is_read_whole(self) -> bool:
        """True when the item is read with one range."""
        return bool(self.transforms) or self.length <= SMALL_BYTES or self.inside.sizes == self.sizes

    @property
    def cost_bytes(self) -> int:
        """Bytes that reading it takes, at a guess: chunks are row-major but for a few."""
        if self.is_read_whole:
            return self.length
        first, end = span(row_major(self.sizes), self.inside)
        return (end - first) * self.dtype.itemsize + torch_save.HEAD_BYTES + torch_save.TAIL_BYTES


class Filler:
    """Reads tensors of one checkpoint. Not thread-safe.

    Args:
        reader: Reads its files.
    """

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        #: Headers of safetensors items by file and first byte: many chunks share one.
        self._headers: dict[tuple[str, int], dict[str, safetensors_file.HeaderEntry]] = {}
        self._sizes: dict[str, int] = {}

    def fill(self, wanted: Sequence[WantedTensor]) -> list[Array]:
        """Returns the cells of each tensor as a new array of the selection's shape, row-major.

        Raises:
            InvalidArgumentError: A dtype, transform or format that cannot be read without torch.
            FailedPreconditionError: An item holds no plain tensor (reason ``UNSAFE_ENTRY``).
            CorruptDataError: A file is not what the metadata says, or chunks do not cover the cells.
            NotFoundError: A data file is not there (``NO_DATA_FILE``).
            ResourceExhaustedError: There is no memory for the result (``OUT_OF_MEMORY``).
            OSError: The storage failed.
        """
        dtypes = [numpy_dtype(one.chunks.dtype, one.chunks.fqn) for one in wanted]
        found: list[Array] = []
        pieces: list[_Piece] = []
        for one, dtype in zip(wanted, dtypes, strict=True):
            cut = _Cut.of(one)
            out = _empty(one, dtype)
            pieces += _pieces(one, cut, out)
            found.append(out.reshape(one.selection.shape))
        pieces.sort(key=lambda piece: (piece.path, piece.start))
        for batch in _batches(pieces):
            self._read(batch)
        return found

    def _read(self, pieces: Sequence[_Piece]) -> None:
        """Reads pieces together: what describes them, then what of their values is not at hand yet."""
        windows = self._open(pieces)
        stored = [self._stored(piece, window) for piece, window in zip(pieces, windows, strict=True)]
        needs = [_needed(*both) for both in zip(pieces, windows, stored, strict=True)]
        lacking = [at for at, window in enumerate(windows) if window.held(*needs[at]) is None]
        ranges = [windows[at].range(*needs[at]) for at in lacking]
        for at, wanted, content in zip(lacking, ranges, self._reader.fetch(ranges), strict=True):
            windows[at].hold(wanted, content)
        for piece, window, where, need in zip(pieces, windows, stored, needs, strict=True):
            piece.out[...] = where.values(window.read(*need), piece.inside, piece.dtype)

    def _open(self, pieces: Sequence[_Piece]) -> list[Window]:
        """Windows on the items, with the first bytes that each takes."""
        firsts = [_first_ranges(piece) for piece in pieces]
        contents = iter(self._reader.fetch([one for ranges in firsts for one in ranges]))
        windows = []
        for piece, ranges in zip(pieces, firsts, strict=True):
            window = Window(self._reader, piece.path, piece.start, piece.length)
            for one in ranges:
                window.hold(one, next(contents))
            if piece.transforms:
                try:
                    plain = undo_transforms(window.read(0, piece.length), piece.transforms, _values_bytes(piece))
                except CorruptDataError as error:
                    raise window.corrupt(error.message) from error
                window = Window(self._reader, piece.path, piece.start, len(plain))
                window.hold(ByteRange(piece.path, piece.start, len(plain)), plain)
            windows.append(window)
        return windows

    def _stored(self, piece: _Piece, window: Window) -> StoredTensor:
        """Where the values are, by what wrote the item."""
        if window.size < _SNIFFED_BYTES and not piece.transforms:
            # No archive is as short; DCP's safetensors items are as long as their values, whatever the file holds.
            window.size = self._left_in_file(piece)
        beginning = bytes(window.read(0, min(_SNIFFED_BYTES, window.size)))
        if beginning.startswith(torch_save.MAGIC):
            return torch_save.stored_tensor(window, piece.sizes, piece.dtype_name, piece.dtype.itemsize)
        if safetensors_file.is_safetensors(beginning):
            return self._in_safetensors(piece, window)
        torch_save.check_not_legacy(window, beginning)
        raise window.corrupt(f"{piece.fqn!a} is neither what torch.save writes nor a safetensors file")

    def _in_safetensors(self, piece: _Piece, window: Window) -> StoredTensor:
        """DCP says where the file begins, and how long the values are; the rest of the file is beyond the item."""
        window.size = self._left_in_file(piece)
        key = (piece.path, piece.start)
        if key not in self._headers:
            self._headers[key] = safetensors_file.read_header(window)
        entry = self._headers[key].get(piece.fqn)
        return safetensors_file.stored_tensor(window, entry, piece.fqn, piece.sizes, piece.dtype_name)

    def _left_in_file(self, piece: _Piece) -> int:
        if piece.path not in self._sizes:
            self._sizes[piece.path] = self._reader.size(piece.path)
        return max(0, self._sizes[piece.path] - piece.start)


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


def _pieces(wanted: WantedTensor, cut: _Cut, out: Array) -> Iterator[_Piece]:
    """What is wanted of each chunk."""
    chunks, box, dtype = wanted.chunks, wanted.selection.box, out.dtype
    for row, first, end in zip(cut.rows.tolist(), cut.low.tolist(), cut.high.tolist(), strict=True):
        at = tuple(slice(*pair) for pair in zip(_minus(first, box.offsets), _minus(end, box.offsets), strict=True))
        number = int(chunks.transform_index[row])
        transforms = chunks.transforms[number - 1] if number else ()
        check_transforms(transforms, chunks.fqn)
        yield _Piece(
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


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in groups that are read together, each within what may be in flight."""
    batch: list[_Piece] = []
    held_bytes = 0
    for piece in pieces:
        if batch and held_bytes + piece.cost_bytes > IN_FLIGHT_BYTES:
            yield batch
            batch, held_bytes = [], 0
        batch.append(piece)
        held_bytes += piece.cost_bytes
    if batch:
        yield batch


def _first_ranges(piece: _Piece) -> list[ByteRange]:
    if piece.start > INT64_MAX - piece.length:
        raise CorruptDataError(f"{piece.fqn!a} ends beyond 2**63 bytes in {piece.path!a}")
    if piece.is_read_whole:
        return [ByteRange(piece.path, piece.start, piece.length)]
    tail = piece.start + piece.length - torch_save.TAIL_BYTES
    return [
        ByteRange(piece.path, piece.start, torch_save.HEAD_BYTES),
        ByteRange(piece.path, tail, torch_save.TAIL_BYTES),
    ]


def _needed(piece: _Piece, window: Window, stored: StoredTensor) -> tuple[int, int]:
    """First byte, in the item, and length of the values."""
    try:
        return stored.bytes_of(piece.inside, piece.dtype.itemsize)
    except ValueError as error:
        raise window.corrupt(str(error)) from error


def _values_bytes(piece: _Piece) -> int:
    return math.prod(piece.sizes) * piece.dtype.itemsize


__all__ = ["IN_FLIGHT_BYTES", "SMALL_BYTES", "Filler"]
