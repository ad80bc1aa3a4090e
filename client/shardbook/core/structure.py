"""A rank's plan and structure: everything about its shards that stays the same from save to save.

Content is addressed on three levels, so that what is shared is stored and sent once::

    table      names, dtypes, shapes, key paths     shared by every rank of the same model part
    plan       table + boxes, before deduplication  shared by replicas
    structure  plan + what was kept, file order     what a registration names

The rank's number is in none of them. Offsets and sizes are packed as quotients (how many boxes of this size make
the dimension, which of them this is), so a regularly sharded rank costs some hundred bytes, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final

import numpy as np

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
    not_canonical,
    unframe,
)
from shardbook.core.digest import DIGEST_BYTES, digest_of
from shardbook.core.dtype import ITEMSIZES
from shardbook.core.interned import interned
from shardbook.core.table import Encoded, EntryKind, TensorTable, read_padded
from shardbook.core.texts import encode_name
from shardbook.errors import InvalidArgumentError

_PLAN, _STRUCTURE = b"PL", b"ST"
_VERSION = 1
_ALL_KEPT, _SOME_KEPT = 0, 1
_NO_LENGTHS, _LENGTHS = 0, 1


class BlobKind(IntEnum):
    """Level of a content-addressed blob; the numbers are those of ``shardbook.v1.BlobKind``."""

    TABLE = 1
    PLAN = 2
    STRUCTURE = 3


@dataclass(frozen=True, eq=False)
class RankPlan:
    """A rank's items before deduplication, in the order its planner made them.

    Attributes:
        table: Entries the items belong to.
        entry: (N,) index into the table.
        offsets: (N, D) first element of each box, elements; 0 in padded dimensions.
        sizes: (N, D) size of each box, elements; 1 in padded dimensions and for BYTES items.

    Raises:
        InvalidArgumentError: A value is out of range. Boxes beyond their tensor are refused at assembly, not here.
    """

    table: TensorTable
    entry: Int64Array
    offsets: Int64Array
    sizes: Int64Array

    def __post_init__(self) -> None:
        count, width = len(self.entry), self.table.shapes.shape[1]
        if count > limits.MAX_ITEMS or count * width > limits.MAX_CELLS:
            raise InvalidArgumentError(f"{count} items, the limit is {limits.MAX_ITEMS}", field="items")
        for field in ("offsets", "sizes"):
            if getattr(self, field).shape != (count, width):
                raise InvalidArgumentError(f"{field} is not ({count}, {width})", field=field)
        if count == 0:
            return
        if int(self.entry.min()) < 0 or int(self.entry.max()) >= self.table.entry_count:
            raise InvalidArgumentError("an item belongs to no entry of the table", field="entry")
        if int(self.sizes.min()) < 0 or int(self.offsets.min()) < 0:
            raise InvalidArgumentError("an offset or size is negative", field="sizes")
        if (self.offsets > limits.INT64_MAX - self.sizes).any():
            raise InvalidArgumentError("a box ends beyond 2**63", field="offsets")
        ndims = self.table.ndims[self.entry]
        padded = np.arange(width) >= ndims[:, None] if int(ndims.min()) < width else np.zeros(0, dtype=np.bool_)
        if padded.size and ((self.offsets[padded] != 0).any() or (self.sizes[padded] != 1).any()):
            raise InvalidArgumentError("a padded dimension is not offset 0 and size 1", field="offsets")

    @property
    def item_count(self) -> int:
        """Number of items, N."""
        return len(self.entry)

    @cached_property
    def variable(self) -> BoolArray:
        """(N,) True for items whose byte length changes from save to save: BYTES."""
        flags: BoolArray = self.table.kinds[self.entry] == EntryKind.BYTES
        return flags


@dataclass(frozen=True)
class FileName:
    """Name of a data file below its attempt's prefix, without the rank's number.

    Attributes:
        ranked: True when the file is called ``__{rank}_{name}``, as DCP's writers do.
        name: The rest of the name, or all of it; relative, with ``/`` between directories.
    """

    ranked: bool
    name: str

    def __post_init__(self) -> None:
        if not self.name or len(encode_name(self.name)) > limits.MAX_FILE_NAME_BYTES:
            raise InvalidArgumentError("a file name is empty or too long", field="files")
        segments = self.name.split("/")
        if "\0" in self.name or "" in segments or ".." in segments or "." in segments or ":" in segments[0]:
            raise InvalidArgumentError("a file name leaves its directory", field="files")

    def path(self, rank: int) -> str:
        """Returns the path below the prefix for ``rank``."""
        return f"__{rank}_{self.name}" if self.ranked else self.name

    @classmethod
    def of(cls, path: str, rank: int) -> FileName:
        """Returns the name of a path below the prefix that ``rank`` wrote."""
        head = f"__{rank}_"
        return cls(True, path[len(head) :]) if path.startswith(head) and path != head else cls(False, path)


@dataclass(frozen=True, eq=False)
class RankStructure:
    """What a rank wrote: the items it kept, and how they share files.

    Attributes:
        plan: The plan the items come from.
        kept: (K,) increasing indices of the plan's items.
        files: (F,) files that hold at least one item.
        file_items: (F,) number of items in each file, 1 or more.
        order: (K,) ``order[p]`` is the index into ``kept`` of the item at file position p; positions run through
            the files in turn, inside a file by offset.
        lengths: (K,) expected length of each kept item, bytes; 0 for BYTES items, and for all items when the
            writer transforms its streams, so that lengths are not known beforehand.

    Raises:
        InvalidArgumentError: Columns contradict each other.
    """

    plan: RankPlan
    kept: Int64Array
    files: tuple[FileName, ...]
    file_items: Int64Array
    order: Int64Array
    lengths: Int64Array

    def __post_init__(self) -> None:
        count = len(self.kept)
        if len(self.order) != count or len(self.lengths) != count or len(self.file_items) != len(self.files):
            raise InvalidArgumentError("columns of a structure differ in length", field="order")
        if len(set(self.files)) != len(self.files):
            raise InvalidArgumentError("a file is named twice", field="files")
        # Each by itself first: a sum of numbers from outside may wrap around to anything.
        possible = not len(self.files) or (int(self.file_items.min()) >= 1 and int(self.file_items.max()) <= count)
        if not possible or int(self.file_items.sum()) != count:
            raise InvalidArgumentError("files do not hold the kept items", field="file_items")
        if count == 0:
            return
        if int(self.kept[0]) < 0 or int(self.kept[-1]) >= self.plan.item_count or (np.diff(self.kept) < 1).any():
            raise InvalidArgumentError("kept items are not increasing items of the plan", field="kept")
        if int(self.order.min()) < 0 or int(self.order.max()) >= count:
            raise InvalidArgumentError("file order names an item that was not kept", field="order")
        if (np.bincount(self.order, minlength=count) != 1).any():
            raise InvalidArgumentError("file order is not a permutation", field="order")
        if int(self.lengths.min()) < 0 or self.lengths[self.variable].any():
            raise InvalidArgumentError("an expected length is impossible", field="lengths")
        if float(self.lengths.astype(np.float64).sum()) >= 2.0**62:
            raise InvalidArgumentError("expected lengths add up to 2**62 bytes or more", field="lengths")

    @property
    def item_count(self) -> int:
        """Number of kept items, K."""
        return len(self.kept)

    @cached_property
    def variable(self) -> BoolArray:
        """(K,) True for kept BYTES items."""
        flags: BoolArray = self.plan.variable[self.kept]
        return flags


#: Far enough below 2**63 for a sum of rounded numbers.
_SURELY_SMALL: Final = 2.0**62


def encode_plan(plan: RankPlan, table_digest: bytes) -> Encoded:
    """Returns the canonical encoding of ``plan``, which refers to its table by digest."""
    writer = ByteWriter()
    writer.raw(magic(_PLAN, _VERSION))
    writer.raw(table_digest)
    writer.varint(plan.item_count)
    writer.column(plan.entry, delta=True)
    ndims = plan.table.ndims[plan.entry]
    for dim in range(int(ndims.max(initial=0))):
        rows = ndims > dim
        shape = plan.table.shapes[plan.entry[rows], dim]
        size, offset = plan.sizes[rows, dim], plan.offsets[rows, dim]
        parts = _parts(shape, size)
        index = offset // np.maximum(size, 1) * (size > 0)
        for column in (parts, size - _even(shape, parts), index, offset - index * size):
            writer.column(column, delta=False)
    content = writer.finish()
    return Encoded(digest_of(content), frame(content))


def _parts(shape: Int64Array, size: Int64Array) -> Int64Array:
    """Boxes of ``size`` that make up ``shape``: the quotient rounded up, 0 for an empty box."""
    return -(-shape // np.maximum(size, 1)) * (size > 0)


def _even(shape: Int64Array, parts: Int64Array) -> Int64Array:
    """Size of a box when ``shape`` is cut into ``parts``: rounded up, as torch.chunk cuts; 0 when parts is 0."""
    return -(-shape // np.maximum(parts, 1)) * (parts > 0)


def decode_plan(payload: bytes, tables: Callable[[bytes], TensorTable]) -> tuple[RankPlan, bytes]:
    """Returns the plan in ``payload`` and its digest.

    Args:
        payload: Framed bytes.
        tables: Finds a table by digest; its errors pass through.

    Raises:
        InvalidArgumentError: The payload is damaged, not canonical, or beyond a limit.
    """
    content = unframe(payload)
    reader = ByteReader(content)
    expect_magic(reader, _PLAN, _VERSION)
    table = tables(reader.raw(DIGEST_BYTES))
    count = reader.varint(limits.MAX_ITEMS, "the number of items")
    entry = reader.column(count, delta=True)
    if count and (int(entry.min()) < 0 or int(entry.max()) >= table.entry_count):
        raise malformed("an item belongs to no entry of the table")
    width = table.shapes.shape[1]
    if count * width > limits.MAX_CELLS:
        raise malformed("too many cells")
    offsets = np.zeros((count, width), dtype=np.int64)
    sizes = np.ones((count, width), dtype=np.int64)
    ndims = table.ndims[entry]
    for dim in range(int(ndims.max(initial=0))):
        rows = ndims > dim
        offsets[rows, dim], sizes[rows, dim] = _read_boxes(reader, table.shapes[entry[rows], dim])
    reader.end()
    return RankPlan(table, interned(entry), offsets, sizes), digest_of(content)


def _read_boxes(reader: ByteReader, shape: Int64Array) -> tuple[Int64Array, Int64Array]:
    parts, extra, index, rest = (reader.column(len(shape), delta=False) for _ in range(4))
    if int(parts.min()) < 0 or int(index.min()) < 0 or int(rest.min()) < 0:
        raise malformed("a box is negative")
    size = _even(shape, parts) + extra
    if int(size.min()) < 0:
        raise malformed("a size is negative or 2**63 and more")
    # A look at the largest spares a division for each, but where numbers are absurd.
    if float(index.max()) * float(size.max()) + float(rest.max()) >= _SURELY_SMALL and (
        ((size > 0) & (index > (limits.INT64_MAX - rest) // np.maximum(size, 1))).any()
    ):
        raise malformed("an offset is 2**63 or more")
    if (_parts(shape, size) != parts).any() or ((size > 0) & (rest >= size)).any() or index[size == 0].any():
        raise not_canonical("a box has another quotient")
    return index * size + rest, size


def encode_structure(structure: RankStructure, plan_digest: bytes) -> Encoded:
    """Returns the canonical encoding of ``structure``, which refers to its plan by digest."""
    writer = ByteWriter()
    writer.raw(magic(_STRUCTURE, _VERSION))
    writer.raw(plan_digest)
    writer.varint(structure.plan.item_count)
    if structure.item_count == structure.plan.item_count:
        writer.byte(_ALL_KEPT)
    else:
        writer.byte(_SOME_KEPT)
        flags = np.zeros(structure.plan.item_count, dtype=np.bool_)
        flags[structure.kept] = True
        writer.bits(flags)
    writer.varint(len(structure.files))
    writer.bits(np.fromiter((file.ranked for file in structure.files), np.bool_, len(structure.files)))
    writer.names([file.name for file in structure.files])
    writer.column(structure.file_items, delta=False)
    writer.column(structure.order, delta=True)
    if structure.lengths.any():
        writer.byte(_LENGTHS)
        fixed = ~structure.variable
        writer.column((structure.lengths - _raw_bytes(structure.plan, structure.kept))[fixed], delta=False)
    else:
        writer.byte(_NO_LENGTHS)
    content = writer.finish()
    return Encoded(digest_of(content), frame(content))


def _raw_bytes(plan: RankPlan, kept: Int64Array) -> Int64Array:
    """(K,) bytes of the kept boxes without any header, modulo 2**64 where a box is absurd."""
    raw: Int64Array = ITEMSIZES[plan.table.dtypes[plan.entry[kept]]].astype(np.int64)
    for column in plan.sizes.T:  # a dimension at a time: numpy reduces a short axis slowly
        raw *= column[kept]
    return raw


def decode_structure(payload: bytes, plans: Callable[[bytes], RankPlan]) -> tuple[RankStructure, bytes]:
    """Returns the structure in ``payload`` and its digest; ``plans`` finds a plan by digest.

    Raises:
        InvalidArgumentError: The payload is damaged, not canonical, or beyond a limit.
    """
    content = unframe(payload)
    reader = ByteReader(content)
    expect_magic(reader, _STRUCTURE, _VERSION)
    plan = plans(reader.raw(DIGEST_BYTES))
    if reader.varint(limits.MAX_ITEMS, "the number of items") != plan.item_count:
        raise malformed("it is not a structure of its plan")
    kept = _read_kept(reader, plan.item_count)
    count = len(kept)
    file_count = reader.varint(count, "the number of files")
    ranked = reader.bits(file_count).tolist()
    files = tuple(FileName(*pair) for pair in zip(ranked, reader.names(file_count), strict=True))
    file_items = reader.column(file_count, delta=False)
    order = reader.column(count, delta=True)
    lengths = _read_lengths(reader, plan, kept)
    reader.end()
    return RankStructure(plan, interned(kept), files, file_items, interned(order), lengths), digest_of(content)


def _read_kept(reader: ByteReader, item_count: int) -> Int64Array:
    form = reader.byte()
    if form == _ALL_KEPT:
        return np.arange(item_count, dtype=np.int64)
    if form != _SOME_KEPT:
        raise malformed("unknown form of kept items")
    kept = np.flatnonzero(reader.bits(item_count)).astype(np.int64)
    if len(kept) == item_count:
        raise not_canonical("every item is kept")
    return kept


def _read_lengths(reader: ByteReader, plan: RankPlan, kept: Int64Array) -> Int64Array:
    lengths = np.zeros(len(kept), dtype=np.int64)
    form = reader.byte()
    if form == _LENGTHS:
        fixed = ~plan.variable[kept]
        lengths[fixed] = reader.column(int(fixed.sum()), delta=False) + _raw_bytes(plan, kept)[fixed]
        if not lengths.any():
            raise not_canonical("all lengths are 0")
    elif form != _NO_LENGTHS:
        raise malformed("unknown form of lengths")
    return lengths


def reference_of(kind: BlobKind, content: bytes) -> tuple[BlobKind, bytes] | None:
    """Returns the (kind, digest) that a blob refers to, without decoding the rest of it; None for a table.

    Args:
        kind: What the blob holds.
        content: Its canonical bytes, out of their frame.

    Raises:
        InvalidArgumentError: The content is damaged or of another kind.
    """
    if kind is BlobKind.TABLE:
        return None
    reader = ByteReader(content)
    expect_magic(reader, _PLAN if kind is BlobKind.PLAN else _STRUCTURE, _VERSION)
    below = BlobKind.TABLE if kind is BlobKind.PLAN else BlobKind.PLAN
    return below, reader.raw(DIGEST_BYTES)


__all__ = [
    "BlobKind",
    "FileName",
    "RankPlan",
    "RankStructure",
    "decode_plan",
    "decode_structure",
    "encode_plan",
    "encode_structure",
    "read_padded",
    "reference_of",
]
