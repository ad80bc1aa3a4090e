"""What a query for chunks found: specifications of entries, and the chunks that meet the boxes, with their places.

The answer of ``QueryChunks`` and of a directory's manifest alike, as columns, and its wire form. A large answer comes
in parts, each about some of the tensors; ``merge`` makes them one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shardbook.core import limits
from shardbook.core.columns import (
    BoolArray,
    ByteReader,
    ByteWriter,
    Int64Array,
    expect_magic,
    frame,
    magic,
    malformed,
    unframe,
)
from shardbook.core.dtype import DTYPE_COUNT, LAYOUT_COUNT, MEMORY_FORMAT_COUNT
from shardbook.core.ragged import firsts_of
from shardbook.core.table import EntryKind, UInt8Array, read_padded, write_padded
from shardbook.core.wanted import Wanted, widened

T = TypeVar("T")
Scalar = TypeVar("Scalar", bound=np.generic)

_KIND = b"FC"
_VERSION = 1
#: Columns of a chunk besides its box; True where values climb from chunk to chunk.
_CHUNK_COLUMNS = (
    ("at", True),
    ("box", True),
    ("index", True),
    ("file", False),
    ("start", False),
    ("length", False),
    ("transform_index", False),
    ("hints", False),
    ("attributes", False),
    ("checksum", False),
)


@dataclass(frozen=True, eq=False)
class FoundPart:
    """Some of the tensors that were asked for, P of them, and K pairs of a wanted box and a chunk that meets it.

    Attributes:
        tensor: (P,) number of each in the question.
        kinds: (P,) EntryKind.
        dtypes: (P,) codes of ``shardbook.core.dtype``, 0 for BYTES.
        layouts: (P,) codes.
        memory_formats: (P,) codes.
        ndims: (P,) dimensions.
        shapes: (P, D) elements, padded with 1.
        chunk_counts: (P,) chunks that each is cut into, wanted or not.
        requires_grad: (P,) of the checkpoint; False for an entry that was not wanted whole, where it is not looked up.
        pin_memory: (P,) likewise.
        at: (K,) which of the P it is about; climbs.
        box: (K,) number of the wanted box in the question; -1 where the entry was wanted whole, or is no tensor.
        index: (K,) number of the chunk within its entry.
        offsets: (K, D) where the chunk begins, elements, padded with 0.
        sizes: (K, D) of the chunk, elements, padded with 1.
        file: (K,) index into ``paths``.
        start: (K,) first byte in the file.
        length: (K,) bytes in the file.
        transform_index: (K,) 0 for no transforms, else 1 + index into ``transforms``.
        hints: (K,) see ``shardbook.core.extents.HINT_POSITION``.
        attributes: (K,) bits, see ``shardbook.core.extents``.
        checksum: (K,) CRC32C of the chunk's bytes in the file; -1 where none was kept.
        paths: Files, relative to the checkpoint's directory.
        transforms: Distinct lists of transform descriptors.
    """

    tensor: Int64Array
    kinds: UInt8Array
    dtypes: UInt8Array
    layouts: UInt8Array
    memory_formats: UInt8Array
    ndims: Int64Array
    shapes: Int64Array
    chunk_counts: Int64Array
    requires_grad: BoolArray
    pin_memory: BoolArray
    at: Int64Array
    box: Int64Array
    index: Int64Array
    offsets: Int64Array
    sizes: Int64Array
    file: Int64Array
    start: Int64Array
    length: Int64Array
    transform_index: Int64Array
    hints: Int64Array
    attributes: Int64Array
    checksum: Int64Array
    paths: tuple[str, ...]
    transforms: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class FoundChunks:
    """The whole answer: one row for each tensor that was asked for, T, and one for each pair of box and chunk, N.

    Immutable, so usable from several threads.

    Attributes:
        wanted: The question.
        found: (T,) False where the checkpoint has no such entry; the other columns of it are 0 then.
        kinds: (T,) EntryKind; 0 where not found.
        dtypes: (T,) codes of ``shardbook.core.dtype``, 0 for entries that are no tensors.
        layouts: (T,) codes.
        memory_formats: (T,) codes.
        ndims: (T,) dimensions.
        shapes: (T, D) elements, padded with 1.
        chunk_counts: (T,) chunks that each is cut into, wanted or not.
        requires_grad: (T,) of the checkpoint; only looked up for what was wanted whole.
        pin_memory: (T,) likewise.
        tensor: (N,) number of the tensor; climbs.
        box: (N,) number of the wanted box; climbs within a tensor; -1 where it was wanted whole, or is no tensor.
        index: (N,) number of the chunk within its tensor; climbs within a box.
        offsets: (N, D) where the chunk begins, elements, padded with 0.
        sizes: (N, D) of the chunk, elements, padded with 1.
        file: (N,) index into ``paths``.
        start: (N,) first byte in the file.
        length: (N,) bytes in the file.
        transform_index: (N,) 0 for no transforms, else 1 + index into ``transforms``.
        hints: (N,) see ``shardbook.core.extents.HINT_POSITION``.
        attributes: (N,) bits, see ``shardbook.core.extents``.
        checksum: (N,) CRC32C of the chunk's bytes in the file; -1 where none was kept.
        paths: Files, relative to the checkpoint's directory.
        transforms: Distinct lists of transform descriptors, outermost last as DCP has them.
    """

    wanted: Wanted
    found: BoolArray
    kinds: UInt8Array
    dtypes: UInt8Array
    layouts: UInt8Array
    memory_formats: UInt8Array
    ndims: Int64Array
    shapes: Int64Array
    chunk_counts: Int64Array
    requires_grad: BoolArray
    pin_memory: BoolArray
    tensor: Int64Array
    box: Int64Array
    index: Int64Array
    offsets: Int64Array
    sizes: Int64Array
    file: Int64Array
    start: Int64Array
    length: Int64Array
    transform_index: Int64Array
    hints: Int64Array
    attributes: Int64Array
    checksum: Int64Array
    paths: tuple[str, ...]
    transforms: tuple[tuple[str, ...], ...]

    @property
    def is_bytes(self) -> BoolArray:
        """(T,) True for entries that are no tensors."""
        flags: BoolArray = self.kinds == EntryKind.BYTES
        return flags

    @property
    def firsts(self) -> Int64Array:
        """(T + 1,) index of each tensor's first row among the chunks, and N."""
        return firsts_of(np.bincount(self.tensor, minlength=len(self.found)).astype(np.int64))

    def shape_of(self, tensor: int) -> tuple[int, ...]:
        """Returns the shape of a tensor in the checkpoint."""
        return tuple(self.shapes[tensor, : int(self.ndims[tensor])].tolist())


def merge(wanted: Wanted, parts: Sequence[FoundPart]) -> FoundChunks:
    """Returns the parts of an answer to ``wanted`` as one, in the order of the question.

    Raises:
        InvalidArgumentError: A part is about something that was not asked for, or two are about the same.
    """
    count = wanted.tensor_count
    tensor = _joined([part.tensor for part in parts])
    if len(tensor) and (int(tensor.min()) < 0 or int(tensor.max()) >= count or _has_twice(tensor)):
        raise malformed("an answer is about what was not asked for, or twice about the same")
    width = max([1, *(part.shapes.shape[1] for part in parts)])
    found = np.zeros(count, dtype=np.bool_)
    found[tensor] = True
    shapes = np.ones((count, width), dtype=np.int64)
    for part in parts:
        shapes[part.tensor, : part.shapes.shape[1]] = part.shapes

    def codes(columns: list[UInt8Array]) -> UInt8Array:
        return _scattered(np.zeros(count, dtype=np.uint8), tensor, columns)

    def counts(columns: list[Int64Array]) -> Int64Array:
        return _scattered(np.zeros(count, dtype=np.int64), tensor, columns)

    def flags(columns: list[BoolArray]) -> BoolArray:
        return _scattered(np.zeros(count, dtype=np.bool_), tensor, columns)

    of = _joined([part.tensor[part.at] for part in parts])
    order = np.argsort(of, kind="stable") if (np.diff(of) < 0).any() else slice(None)
    paths, file = _common([part.paths for part in parts], [part.file for part in parts])
    # Number 0 means no transforms in every part.
    transforms, transform_index = _common(
        [((), *part.transforms) for part in parts], [part.transform_index for part in parts]
    )
    return FoundChunks(
        wanted=wanted,
        found=found,
        kinds=codes([part.kinds for part in parts]),
        dtypes=codes([part.dtypes for part in parts]),
        layouts=codes([part.layouts for part in parts]),
        memory_formats=codes([part.memory_formats for part in parts]),
        ndims=counts([part.ndims for part in parts]),
        shapes=shapes,
        chunk_counts=counts([part.chunk_counts for part in parts]),
        requires_grad=flags([part.requires_grad for part in parts]),
        pin_memory=flags([part.pin_memory for part in parts]),
        tensor=of[order],
        box=_joined([part.box for part in parts])[order],
        index=_joined([part.index for part in parts])[order],
        offsets=_stacked([widened(part.offsets, width, 0) for part in parts], width)[order],
        sizes=_stacked([widened(part.sizes, width, 1) for part in parts], width)[order],
        file=file[order],
        start=_joined([part.start for part in parts])[order],
        length=_joined([part.length for part in parts])[order],
        transform_index=transform_index[order],
        hints=_joined([part.hints for part in parts])[order],
        attributes=_joined([part.attributes for part in parts])[order],
        checksum=_joined([part.checksum for part in parts])[order],
        paths=paths,
        transforms=transforms[1:],
    )


def _has_twice(numbers: Int64Array) -> bool:
    return not (np.diff(numbers) > 0).all() and len(np.unique(numbers)) < len(numbers)


def _scattered(
    out: npt.NDArray[Scalar], tensor: Int64Array, columns: Sequence[npt.NDArray[Scalar]]
) -> npt.NDArray[Scalar]:
    if columns:
        out[tensor] = np.concatenate(columns)
    return out


def _joined(columns: Sequence[Int64Array]) -> Int64Array:
    return columns[0] if len(columns) == 1 else np.concatenate([np.zeros(0, dtype=np.int64), *columns])


def _stacked(matrices: Sequence[Int64Array], width: int) -> Int64Array:
    return matrices[0] if len(matrices) == 1 else np.concatenate([np.zeros((0, width), dtype=np.int64), *matrices])


def _common(names: Sequence[tuple[T, ...]], columns: Sequence[Int64Array]) -> tuple[tuple[T, ...], Int64Array]:
    """Returns the distinct names of all parts, and the parts' columns as indexes into them."""
    if len(names) == 1:
        return names[0], columns[0]
    numbers: dict[T, int] = {}
    out = []
    for some, column in zip(names, columns, strict=True):
        code = np.array([numbers.setdefault(name, len(numbers)) for name in some], dtype=np.int64)
        out.append(code[column])
    return tuple(numbers), _joined(out)


def encode_part(part: FoundPart) -> bytes:
    """Returns the payload of a part of an answer."""
    return frame(part_content(part))


def part_content(part: FoundPart) -> bytes:
    """Returns the canonical bytes of a part of an answer, whose digest names it."""
    writer = ByteWriter()
    writer.raw(magic(_KIND, _VERSION))
    writer.varint(len(part.tensor))
    writer.column(part.tensor, delta=True)
    for codes in (part.kinds, part.dtypes, part.layouts, part.memory_formats):
        writer.raw(codes.tobytes())
    writer.bits(part.requires_grad)
    writer.bits(part.pin_memory)
    writer.column(part.ndims, delta=False)
    write_padded(writer, part.shapes, part.ndims)
    writer.column(part.chunk_counts, delta=False)
    writer.varint(len(part.paths))
    writer.names(part.paths)
    write_transforms(writer, part.transforms)
    writer.varint(len(part.at))
    for name, climbs in _CHUNK_COLUMNS:
        writer.column(getattr(part, name), delta=climbs)
    ndims = part.ndims[part.at]
    write_padded(writer, part.offsets, ndims)
    write_padded(writer, part.sizes, ndims)
    return writer.finish()


def decode_part(payload: bytes) -> FoundPart:
    """Returns the part of an answer in ``payload``.

    Raises:
        InvalidArgumentError: It is damaged, or beyond a limit.
    """
    reader = ByteReader(unframe(payload))
    expect_magic(reader, _KIND, _VERSION)
    count = reader.varint(limits.MAX_WANTED_TENSORS, "the number of tensors")
    tensor = reader.column(count, delta=True)
    codes = [np.frombuffer(reader.raw(count), dtype=np.uint8) for _ in range(4)]
    bounds = (EntryKind.BYTES + 1, DTYPE_COUNT, LAYOUT_COUNT, MEMORY_FORMAT_COUNT)
    if any(int(column.max(initial=0)) >= bound for column, bound in zip(codes, bounds, strict=True)):
        raise malformed("an answer has a code that this release does not know")
    requires_grad, pin_memory = reader.bits(count), reader.bits(count)
    ndims = reader.column(count, delta=False)
    shapes = read_padded(reader, ndims, 1)
    chunk_counts = reader.column(count, delta=False)
    paths = reader.names(reader.varint(limits.MAX_CELLS, "the number of files"))
    transforms = read_transforms(reader)
    chunk_count = reader.varint(limits.MAX_CELLS, "the number of chunks")
    columns = {name: reader.column(chunk_count, delta=climbs) for name, climbs in _CHUNK_COLUMNS}
    _check_indexes(columns, count, len(paths), len(transforms))
    chunk_ndims = ndims[columns["at"]]
    offsets, sizes = read_padded(reader, chunk_ndims, 0), read_padded(reader, chunk_ndims, 1)
    reader.end()
    width = shapes.shape[1]
    return FoundPart(
        tensor=tensor,
        kinds=codes[0],
        dtypes=codes[1],
        layouts=codes[2],
        memory_formats=codes[3],
        ndims=ndims,
        shapes=shapes,
        chunk_counts=chunk_counts,
        requires_grad=requires_grad,
        pin_memory=pin_memory,
        at=columns["at"],
        box=columns["box"],
        index=columns["index"],
        offsets=widened(offsets, width, 0),
        sizes=widened(sizes, width, 1),
        file=columns["file"],
        start=columns["start"],
        length=columns["length"],
        transform_index=columns["transform_index"],
        hints=columns["hints"],
        attributes=columns["attributes"],
        checksum=columns["checksum"],
        paths=paths,
        transforms=transforms,
    )


def write_transforms(writer: ByteWriter, transforms: Sequence[Sequence[str]]) -> None:
    """Appends lists of transform descriptors."""
    writer.varint(len(transforms))
    writer.column(np.array([len(names) for names in transforms], dtype=np.int64), delta=False)
    writer.names([name for names in transforms for name in names])


def read_transforms(reader: ByteReader) -> tuple[tuple[str, ...], ...]:
    """Returns what ``write_transforms`` appended."""
    list_count = reader.varint(limits.MAX_CELLS, "the number of transform lists")
    sizes = reader.column(list_count, delta=False)
    if list_count and (int(sizes.min()) < 0 or int(sizes.max()) > limits.MAX_TRANSFORM_LISTS):
        raise malformed("impossible length of a transform list")
    names = iter(reader.names(int(sizes.sum())))
    return tuple(tuple(next(names) for _ in range(size)) for size in sizes.tolist())


def _check_indexes(columns: dict[str, Int64Array], tensors: int, paths: int, transforms: int) -> None:
    bounds = (("at", tensors), ("file", paths), ("transform_index", transforms + 1))
    for name, bound in bounds:
        column = columns[name]
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < bound:
            raise malformed(f"an answer's {name} is out of range")
