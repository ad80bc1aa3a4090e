"""What a loader wants to know of a checkpoint: tensors by name, and of each the boxes that it will fill.

The question of ``QueryChunks`` as columns, and its wire form. The answer is in ``shardbook.core.found``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardbook.core import limits
from shardbook.core.box import Box
from shardbook.core.columns import (
    BoolArray,
    ByteReader,
    ByteWriter,
    Int64Array,
    expect_magic,
    frame,
    magic,
    unframe,
)
from shardbook.core.ragged import firsts_of
from shardbook.core.table import read_padded, write_padded
from shardbook.errors import InvalidArgumentError

_KIND = b"WQ"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Wanted:
    """Tensors, and boxes of them. Immutable, so usable from several threads.

    Geometry is padded to D dimensions as in ``shardbook.core.table``: offsets with 0, sizes and shapes with 1.

    A tensor whose shape is stated and differs from the checkpoint's is answered with what the checkpoint has and no
    chunks: a loader tells all of its misfits at once. One whose shape is not stated must have boxes that fit. Entries
    that are no tensors have one chunk, whatever was wanted of them.

    Attributes:
        fqns: (T,) names.
        ndims: (T,) dimensions of the stated shape and of the boxes; 0 where neither is given.
        stated: (T,) True where the shape is stated.
        shapes: (T, D) stated shapes, elements.
        whole: (T,) True where every chunk is wanted; such a tensor has no boxes.
        box_counts: (T,) boxes of each tensor; a tensor may have none, and then only its specification is answered.
        offsets: (M, D) elements; a tensor's boxes lie together.
        sizes: (M, D) elements; an empty box meets no chunk.

    Raises:
        InvalidArgumentError: Columns do not fit each other, a limit is exceeded, or a box leaves its stated shape.
    """

    fqns: tuple[str, ...]
    ndims: Int64Array
    stated: BoolArray
    shapes: Int64Array
    whole: BoolArray
    box_counts: Int64Array
    offsets: Int64Array
    sizes: Int64Array

    def __post_init__(self) -> None:
        _check_counts(self)
        if not len(self.offsets):
            return
        if int(self.offsets.min()) < 0 or int(self.sizes.min()) < 0:
            raise _bad_box(int(np.flatnonzero((self.offsets < 0).any(1) | (self.sizes < 0).any(1))[0]), "is negative")
        beyond = self.sizes > limits.INT64_MAX - self.offsets
        if beyond.any():
            raise _bad_box(int(np.flatnonzero(beyond.any(1))[0]), "ends beyond 2**63 - 1")
        tensor = self.tensor_of_box
        # Without padding both are 0 and 1, which leaves nothing.
        leaves = ((self.offsets + self.sizes > self.shapes[tensor]).any(1)) & self.stated[tensor]
        if leaves.any():
            box = int(np.flatnonzero(leaves)[0])
            raise _bad_box(box, f"leaves a tensor of shape {self.shape_of(int(tensor[box]))}")

    @property
    def tensor_count(self) -> int:
        """Number of tensors, T."""
        return len(self.fqns)

    @cached_property
    def firsts(self) -> Int64Array:
        """(T + 1,) index of each tensor's first box, and M."""
        return firsts_of(self.box_counts)

    @cached_property
    def tensor_of_box(self) -> Int64Array:
        """(M,) which tensor each box is of."""
        return np.repeat(np.arange(len(self.fqns), dtype=np.int64), self.box_counts)

    def shape_of(self, tensor: int) -> tuple[int, ...]:
        """Returns a stated shape."""
        return tuple(self.shapes[tensor, : int(self.ndims[tensor])].tolist())

    @classmethod
    def all_of(cls, fqns: Sequence[str]) -> Wanted:
        """Returns the question for every chunk of some entries, whatever they are."""
        count = len(fqns)
        none, no_boxes = np.zeros(count, dtype=np.int64), np.zeros((0, 1), dtype=np.int64)
        return cls(
            fqns=tuple(fqns),
            ndims=none,
            stated=np.zeros(count, dtype=np.bool_),
            shapes=np.ones((count, 1), dtype=np.int64),
            whole=np.ones(count, dtype=np.bool_),
            box_counts=none,
            offsets=no_boxes,
            sizes=no_boxes,
        )

    @classmethod
    def boxes_of(cls, boxes: Mapping[str, Sequence[Box]]) -> Wanted:
        """Returns the question for the chunks that meet some boxes; shapes are not stated.

        A tensor without boxes is answered with its specification alone.

        Raises:
            InvalidArgumentError: Boxes of one tensor differ in dimensions.
        """
        counts = np.array([len(some) for some in boxes.values()], dtype=np.int64)
        ndims = np.array([some[0].ndim if some else 0 for some in boxes.values()], dtype=np.int64)
        every = [box for some in boxes.values() for box in some]
        if [box.ndim for box in every] != np.repeat(ndims, counts).tolist():
            raise InvalidArgumentError("boxes of one tensor differ in dimensions", field="wanted.boxes")
        width = max(1, int(ndims.max(initial=0)))
        return cls(
            fqns=tuple(boxes),
            ndims=ndims,
            stated=np.zeros(len(boxes), dtype=np.bool_),
            shapes=np.ones((len(boxes), width), dtype=np.int64),
            whole=np.zeros(len(boxes), dtype=np.bool_),
            box_counts=counts,
            offsets=padded([box.offsets for box in every], width, 0),
            sizes=padded([box.sizes for box in every], width, 1),
        )


def padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> Int64Array:
    """Returns rows of integers as a matrix, (N, ``width``), each filled up with ``fill``."""
    if set(map(len, rows)) == {width}:
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(rows) * width)
        return flat.reshape(len(rows), width)
    out = np.full((len(rows), width), fill, dtype=np.int64)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out


def _check_counts(wanted: Wanted) -> None:
    count, width = len(wanted.fqns), wanted.offsets.shape[1]
    if count > limits.MAX_WANTED_TENSORS or len(wanted.offsets) > limits.MAX_WANTED_BOXES:
        raise InvalidArgumentError(
            f"{count} tensors and {len(wanted.offsets)} boxes in one query, the limits are "
            f"{limits.MAX_WANTED_TENSORS} and {limits.MAX_WANTED_BOXES}: ask in parts",
            reason="LIMIT_EXCEEDED",
            field="wanted",
        )
    per_tensor = (wanted.ndims, wanted.stated, wanted.shapes, wanted.whole, wanted.box_counts)
    if any(len(column) != count for column in per_tensor):
        raise InvalidArgumentError("columns of tensors differ in length", field="wanted")
    if wanted.sizes.shape != wanted.offsets.shape or wanted.shapes.shape[1] != width:
        raise InvalidArgumentError("offsets, sizes and shapes differ in dimensions", field="wanted")
    if count and not 0 <= int(wanted.ndims.min()) <= int(wanted.ndims.max()) <= width <= limits.MAX_NDIM:
        raise InvalidArgumentError("a tensor has impossible dimensions", field="wanted.ndims")
    if count and (int(wanted.box_counts.min()) < 0 or int(wanted.shapes.min()) < 0):
        raise InvalidArgumentError("a count or a shape is negative", field="wanted")
    if float(wanted.box_counts.astype(np.float64).sum()) != len(wanted.offsets):
        raise InvalidArgumentError(
            f"box counts add up to {int(wanted.box_counts.sum())}, and there are {len(wanted.offsets)} boxes",
            field="wanted.box_counts",
        )
    if (wanted.whole & (wanted.box_counts > 0)).any():
        raise InvalidArgumentError("a tensor that is wanted whole has boxes too", field="wanted.box_counts")


def _bad_box(box: int, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"box {box} {what}", field=f"wanted.boxes[{box}]")


def misfit(wanted: Wanted, box: int, shape: tuple[int, ...]) -> InvalidArgumentError:
    """Returns the error for a box that is none of a stored tensor's."""
    tensor = int(wanted.tensor_of_box[box])
    ndim = int(wanted.ndims[tensor])
    if ndim != len(shape):
        return _bad_box(box, f"has {ndim} dimensions, {wanted.fqns[tensor]!a:.200} has {len(shape)}")
    return _bad_box(box, f"leaves {wanted.fqns[tensor]!a:.200}, whose shape is {shape}")


def encode_wanted(wanted: Wanted) -> bytes:
    """Returns the payload of a question."""
    writer = ByteWriter()
    writer.raw(magic(_KIND, _VERSION))
    writer.varint(len(wanted.fqns))
    writer.names(wanted.fqns)
    writer.column(wanted.ndims, delta=False)
    writer.bits(wanted.stated)
    writer.bits(wanted.whole)
    writer.varint(len(wanted.offsets))
    writer.column(wanted.box_counts, delta=False)
    box_ndims = wanted.ndims[wanted.tensor_of_box]
    for matrix, ndims in ((wanted.shapes[wanted.stated], wanted.ndims[wanted.stated]), (wanted.offsets, box_ndims)):
        write_padded(writer, matrix, ndims)
    write_padded(writer, wanted.sizes, box_ndims)
    return frame(writer.finish())


def decode_wanted(payload: bytes) -> Wanted:
    """Returns the question in ``payload``.

    Raises:
        InvalidArgumentError: It is damaged, beyond a limit, or no question; the field is ``wanted`` or below it.
    """
    try:
        return _decode(ByteReader(unframe(payload, limits.MAX_WANTED_BYTES)))
    except InvalidArgumentError as error:
        if [one for one in error.violations if one.field.startswith("wanted")]:
            raise
        raise InvalidArgumentError(error.message, reason=error.reason, field="wanted") from error


def _decode(reader: ByteReader) -> Wanted:
    expect_magic(reader, _KIND, _VERSION)
    count = reader.varint(limits.MAX_WANTED_TENSORS, "the number of tensors")
    fqns = reader.names(count, limits.MAX_FQN_BYTES)
    ndims = reader.column(count, delta=False)
    stated, whole = reader.bits(count), reader.bits(count)
    box_count = reader.varint(limits.MAX_WANTED_BOXES, "the number of boxes")
    box_counts = reader.column(count, delta=False)
    if count and (int(box_counts.min()) < 0 or float(box_counts.astype(np.float64).sum()) != box_count):
        raise InvalidArgumentError("box counts do not add up to the boxes", field="wanted.box_counts")
    if not count and box_count:
        raise InvalidArgumentError("boxes of no tensor", field="wanted.box_counts")
    box_ndims = np.repeat(ndims, box_counts)
    known = read_padded(reader, ndims[stated], 1)
    offsets, sizes = read_padded(reader, box_ndims, 0), read_padded(reader, box_ndims, 1)
    reader.end()
    width = max(known.shape[1], offsets.shape[1])
    if count * width > limits.MAX_CELLS:
        raise InvalidArgumentError("too many dimensions in one query", reason="LIMIT_EXCEEDED", field="wanted.ndims")
    shapes = np.ones((count, width), dtype=np.int64)
    shapes[stated, : known.shape[1]] = known
    return Wanted(fqns, ndims, stated, shapes, whole, box_counts, widened(offsets, width, 0), widened(sizes, width, 1))


def widened(matrix: Int64Array, width: int, fill: int) -> Int64Array:
    """Returns a padded matrix with ``width`` dimensions; those beyond, which must be padding, are cut off."""
    if matrix.shape[1] >= width:
        return matrix[:, :width]
    more = np.full((len(matrix), width - matrix.shape[1]), fill, dtype=np.int64)
    return np.concatenate([matrix, more], axis=1)
