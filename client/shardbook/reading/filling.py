"""Reads the cells that are wanted of tensors, chunk by chunk, in as few byte ranges as hold them.

Small items take one range, and so do chunks that are wanted as a whole from a store where requests are dear. Of others
the two ends are read first, which say where the values are, and then the values: as far as the wanted part spans in
memory, which for rows is exactly that, and right into the result where they lie there as they do in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from shardbook.core.limits import INT64_MAX
from shardbook.errors import CorruptDataError
from shardbook.reading import safetensors_file, torch_save
from shardbook.reading.cutting import Piece, cut
from shardbook.reading.dtypes import numpy_dtype
from shardbook.reading.finding import WantedTensor
from shardbook.reading.ranges import ByteRange, RangeReader
from shardbook.reading.stored import Array, StoredTensor, row_major, span
from shardbook.reading.transforms import undo_transforms
from shardbook.reading.window import Window

#: Items up to this many bytes are read as a whole: a second request costs more than its bytes.
SMALL_BYTES: Final = 256 << 10
#: Bytes that are in flight at once, beside the result; a chunk that is wanted as a whole may be more by itself.
IN_FLIGHT_BYTES: Final = 256 << 20
#: Enough of an item's beginning to tell what wrote it.
_SNIFFED_BYTES: Final = 64


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
        pieces: list[Piece] = []
        for one, dtype in zip(wanted, dtypes, strict=True):
            out, some = cut(one, dtype)
            pieces += some
            found.append(out.reshape(one.selection.shape))
        pieces.sort(key=lambda piece: (piece.path, piece.start))
        for batch in _batches(pieces):
            self._read(batch)
        return found

    def _read(self, pieces: Sequence[Piece]) -> None:
        """Reads pieces together: what describes them, then what of their values is not at hand yet."""
        windows = self._open(pieces)
        stored = [self._stored(piece, window) for piece, window in zip(pieces, windows, strict=True)]
        needs = [_needed(*both) for both in zip(pieces, windows, stored, strict=True)]
        lacking = [at for at, window in enumerate(windows) if window.held(*needs[at]) is None]
        direct = {at for at in lacking if pieces[at].out.flags.c_contiguous and stored[at].is_plain(pieces[at].inside)}
        self._reader.fill([(windows[at].range(*needs[at]), _memory_of(pieces[at].out)) for at in sorted(direct)])
        ranges = {at: windows[at].range(*needs[at]) for at in lacking if at not in direct}
        for (at, wanted), content in zip(ranges.items(), self._reader.fetch(list(ranges.values())), strict=True):
            windows[at].hold(wanted, content)
        for at, piece in enumerate(pieces):
            if at not in direct:
                piece.out[...] = stored[at].values(windows[at].read(*needs[at]), piece.inside, piece.dtype)

    def _open(self, pieces: Sequence[Piece]) -> list[Window]:
        """Windows on the items, with the first bytes that each takes."""
        firsts = [_first_ranges(piece, is_distant=self._reader.is_distant) for piece in pieces]
        contents = iter(self._reader.fetch([one for ranges in firsts for one in ranges]))
        windows = []
        for piece, ranges in zip(pieces, firsts, strict=True):
            window = Window(self._reader, piece.path, piece.start, piece.length)
            for one in ranges:
                window.hold(one, next(contents))
            if piece.transforms:
                try:
                    plain = undo_transforms(window.read(0, piece.length), piece.transforms, piece.values_bytes)
                except CorruptDataError as error:
                    raise window.corrupt(error.message) from error
                window = Window(self._reader, piece.path, piece.start, len(plain))
                window.hold(ByteRange(piece.path, piece.start, len(plain)), plain)
            windows.append(window)
        return windows

    def _stored(self, piece: Piece, window: Window) -> StoredTensor:
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

    def _in_safetensors(self, piece: Piece, window: Window) -> StoredTensor:
        """DCP says where the file begins, and how long the values are; the rest of the file is beyond the item."""
        window.size = self._left_in_file(piece)
        key = (piece.path, piece.start)
        if key not in self._headers:
            self._headers[key] = safetensors_file.read_header(window)
        entry = self._headers[key].get(piece.fqn)
        return safetensors_file.stored_tensor(window, entry, piece.fqn, piece.sizes, piece.dtype_name)

    def _left_in_file(self, piece: Piece) -> int:
        if piece.path not in self._sizes:
            self._sizes[piece.path] = self._reader.size(piece.path)
        return max(0, self._sizes[piece.path] - piece.start)


def _is_read_whole(piece: Piece, *, is_distant: bool) -> bool:
    """True when the item is read with one range; values that are read by themselves go right where they belong."""
    if piece.transforms or piece.length <= SMALL_BYTES:
        return True
    return is_distant and piece.inside.sizes == piece.sizes


def _memory_of(out: Array) -> memoryview:
    return out.reshape(-1).view(np.uint8).data


def _cost_bytes(piece: Piece) -> int:
    """Bytes that reading a piece takes, at a guess: chunks are row-major but for a few."""
    if piece.transforms or piece.length <= SMALL_BYTES:
        return piece.length
    first, end = span(row_major(piece.sizes), piece.inside)
    return (end - first) * piece.dtype.itemsize + torch_save.HEAD_BYTES + torch_save.TAIL_BYTES


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups that are read together, each within what may be in flight."""
    batch: list[Piece] = []
    held_bytes = 0
    for piece in pieces:
        if batch and held_bytes + _cost_bytes(piece) > IN_FLIGHT_BYTES:
            yield batch
            batch, held_bytes = [], 0
        batch.append(piece)
        held_bytes += _cost_bytes(piece)
    if batch:
        yield batch


def _first_ranges(piece: Piece, *, is_distant: bool) -> list[ByteRange]:
    if piece.start > INT64_MAX - piece.length:
        raise CorruptDataError(f"{piece.fqn!a} ends beyond 2**63 bytes in {piece.path!a}")
    if _is_read_whole(piece, is_distant=is_distant):
        return [ByteRange(piece.path, piece.start, piece.length)]
    tail = piece.start + piece.length - torch_save.TAIL_BYTES
    return [
        ByteRange(piece.path, piece.start, torch_save.HEAD_BYTES),
        ByteRange(piece.path, tail, torch_save.TAIL_BYTES),
    ]


def _needed(piece: Piece, window: Window, stored: StoredTensor) -> tuple[int, int]:
    """First byte, in the item, and length of the values."""
    try:
        return stored.bytes_of(piece.inside, piece.dtype.itemsize)
    except ValueError as error:
        raise window.corrupt(str(error)) from error


__all__ = ["IN_FLIGHT_BYTES", "SMALL_BYTES", "Filler"]
