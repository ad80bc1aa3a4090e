"""Where the items of a registration lie, and what changes from save to save without changing the structure.

A rank's files are filled from the front, so a start follows from the lengths before it, and the lengths of tensors
are known from the structure. What is left are the lengths of bytes entries: some bytes a rank and save. Writers that
transform their streams or leave gaps send lengths and starts explicitly; they pay for what they send. So do those that
keep checksums: no two saves have the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
from shardbook.core.digest import ordered_digest
from shardbook.core.repeated import read_index, write_index
from shardbook.core.structure import RankStructure
from shardbook.errors import InvalidArgumentError

_VERSION = 1
_SEGMENT, _SEGMENT_VERSION = b"SG", 1
_EXPLICIT, _TRANSFORMS, _HINTS, _ATTRIBUTES, _CHECKSUMS, _UNCHECKED = 1, 2, 4, 8, 16, 32
_ALL_FLAGS = 63

#: Value of ``hints`` for "the chunk's own position in its tensor's list", which is what DCP writes.
HINT_POSITION = 0
#: Value of ``hints`` for None; an explicit hint h is h + 2.
HINT_NONE = 1
#: Bit of ``attributes``: ``transform_descriptors`` is None in the object's ``__dict__``, rather than absent from it.
ATTRIBUTE_NULL_TRANSFORMS = 1
#: Value of ``checksums`` for an item of which nobody computed one.
NO_CHECKSUM = -1


def _no_items() -> Int64Array:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class ExtentsFacts:
    """What extents say, without their columns.

    Attributes:
        item_count: Items that a column is about; None when no column is.
        variable_count: Lengths of BYTES items; 0 when lengths are explicit.
        size_bytes: Sum of the lengths given.
        explicit: Lengths and starts of all items are given.
    """

    item_count: int | None
    variable_count: int
    size_bytes: int
    explicit: bool


@dataclass(frozen=True, eq=False)
class Extents:
    """Where the items of a rank structure lie. Columns are in file order, K items of which V are variable.

    Attributes:
        variable_lengths: (V,) lengths of the BYTES items, bytes; empty when lengths are explicit.
        lengths: (K,) length of every item, bytes; None when the structure's expectations hold.
        starts: (K,) first byte of every item in its file; None when items follow each other from 0.
        transforms: Distinct lists of transform descriptors, outermost last as DCP has them.
        transform_index: (K,) 0 for no transforms, else 1 + index into ``transforms``; None when all are 0.
        hints: (K,) index hints of the storage data, see HINT_POSITION; None when all are HINT_POSITION.
        attributes: (K,) bits, see ATTRIBUTE_NULL_TRANSFORMS; None when all are 0.
        checksums: (K,) CRC32C of every item's bytes as they lie in the file, below 2**32; NO_CHECKSUM where there is
            none; None when there is none at all.

    Raises:
        InvalidArgumentError: A value is out of range, or columns differ in length.
    """

    variable_lengths: Int64Array = field(default_factory=_no_items)
    lengths: Int64Array | None = None
    starts: Int64Array | None = None
    transforms: tuple[tuple[str, ...], ...] = ()
    transform_index: Int64Array | None = None
    hints: Int64Array | None = None
    attributes: Int64Array | None = None
    checksums: Int64Array | None = None

    def __post_init__(self) -> None:
        if (self.lengths is None) != (self.starts is None):
            raise InvalidArgumentError("explicit lengths and starts come together", field="extents")
        if self.lengths is not None and len(self.variable_lengths):
            raise InvalidArgumentError("lengths are given twice", field="extents")
        counts = {len(column) for column in (*self._item_columns(), self.checksums) if column is not None}
        if len(counts) > 1:
            raise InvalidArgumentError("columns of extents differ in length", field="extents")
        for column in (self.variable_lengths, *self._item_columns()):
            if column is not None and len(column) and int(column.min()) < 0:
                raise InvalidArgumentError("a length, start or code is negative", field="extents")
        _check_checksums(self.checksums)
        if self.starts is not None and (self.starts > limits.INT64_MAX - self._explicit_lengths).any():
            raise InvalidArgumentError("an extent ends beyond 2**63", field="extents")
        if self.transform_index is not None and int(self.transform_index.max(initial=0)) > len(self.transforms):
            raise InvalidArgumentError("an item names an unknown transform", field="extents")
        total = self.variable_lengths if self.lengths is None else self.lengths
        if float(total.astype(np.float64).sum()) >= 2.0**62:
            raise InvalidArgumentError("extents add up to 2**62 bytes or more", field="extents")

    @property
    def _explicit_lengths(self) -> Int64Array:
        return _no_items() if self.lengths is None else self.lengths

    @property
    def facts(self) -> ExtentsFacts:
        """What they say, without the columns."""
        given = self.variable_lengths if self.lengths is None else self.lengths
        return ExtentsFacts(
            self.item_count, len(self.variable_lengths), int(given.sum()), explicit=self.lengths is not None
        )

    def _item_columns(self) -> tuple[Int64Array | None, ...]:
        return self.lengths, self.starts, self.transform_index, self.hints, self.attributes

    @property
    def item_count(self) -> int | None:
        """K when a column says so; None when only variable lengths are given."""
        columns = (*self._item_columns(), self.checksums)
        return next((len(column) for column in columns if column is not None), None)


def _check_checksums(checksums: Int64Array | None) -> None:
    if checksums is None:
        return
    if int(checksums.max(initial=NO_CHECKSUM)) == NO_CHECKSUM:
        raise InvalidArgumentError("a column of checksums holds none", field="extents")
    if int(checksums.min()) < NO_CHECKSUM or int(checksums.max()) >= 1 << 32:
        raise InvalidArgumentError("a checksum is not of 32 bits", field="extents")


@dataclass(frozen=True)
class StructureInfo:
    """What a registration is checked against without decoding geometry.

    Attributes:
        entry_count: Entries of the table.
        item_count: Kept items, K.
        variable_count: Kept BYTES items, V.
        fixed_bytes: Sum of the expected lengths, bytes.
    """

    entry_count: int
    item_count: int
    variable_count: int
    fixed_bytes: int


def structure_info(structure: RankStructure) -> StructureInfo:
    """Returns the counts of ``structure``."""
    return StructureInfo(
        structure.plan.table.entry_count,
        structure.item_count,
        int(structure.variable.sum()),
        int(structure.lengths.sum()),
    )


def encode_extents(extents: Extents) -> bytes:
    """Returns the payload of ``extents``: 3 bytes where everything follows from the structure."""
    writer = ByteWriter()
    explicit = extents.lengths is not None
    flags = (
        (_EXPLICIT if explicit else 0)
        | (_TRANSFORMS if extents.transform_index is not None else 0)
        | (_HINTS if extents.hints is not None else 0)
        | (_ATTRIBUTES if extents.attributes is not None else 0)
        | _checksum_flags(extents.checksums)
    )
    writer.byte(_VERSION)
    writer.byte(flags)
    if flags:
        writer.varint(extents.item_count or 0)
    if extents.lengths is not None and extents.starts is not None:
        ends = np.concatenate([[0], (extents.starts + extents.lengths)[:-1]]).astype(np.int64)
        writer.column(extents.lengths, delta=False)
        writer.column(extents.starts - ends[: len(extents.starts)], delta=False)
    else:
        writer.varint(len(extents.variable_lengths))
        writer.column(extents.variable_lengths, delta=False)
    if extents.transform_index is not None:
        writer.varint(len(extents.transforms))
        writer.column(np.array([len(names) for names in extents.transforms], dtype=np.int64), delta=False)
        writer.names([name for names in extents.transforms for name in names])
        writer.column(extents.transform_index, delta=False)
    for column in (extents.hints, extents.attributes):
        if column is not None:
            writer.column(column, delta=False)
    if extents.checksums is not None:
        _write_checksums(writer, extents.checksums)
    return frame(writer.finish())


def _checksum_flags(checksums: Int64Array | None) -> int:
    if checksums is None:
        return 0
    return _CHECKSUMS | (_UNCHECKED if int(checksums.min()) == NO_CHECKSUM else 0)


def _write_checksums(writer: ByteWriter, checksums: Int64Array) -> None:
    """Appends four raw bytes an item; which items have any, a bit an item, only where some have none."""
    held = checksums != NO_CHECKSUM
    if not held.all():
        writer.bits(held)
    writer.raw(checksums[held].astype("<u4").tobytes())


def _read_checksums(reader: ByteReader, count: int, flags: int) -> Int64Array:
    held = np.ones(count, dtype=np.bool_)
    if flags & _UNCHECKED:
        held = reader.bits(count)
        if held.all():
            raise not_canonical("every item has a checksum", field="extents")
    checksums = np.full(count, NO_CHECKSUM, dtype=np.int64)
    checksums[held] = np.frombuffer(reader.raw(4 * int(held.sum())), dtype="<u4")
    return checksums


def decode_extents(payload: bytes) -> Extents:
    """Returns the extents in ``payload``.

    Raises:
        InvalidArgumentError: The payload is damaged or beyond a limit.
    """
    reader = ByteReader(unframe(payload))
    if reader.byte() != _VERSION:
        raise malformed("unknown version of extents", field="extents")
    flags = reader.byte()
    if flags > _ALL_FLAGS or flags & (_CHECKSUMS | _UNCHECKED) == _UNCHECKED:
        raise malformed("unknown flags of extents", field="extents")
    count = reader.varint(limits.MAX_ITEMS, "the number of items") if flags else 0
    lengths = starts = transform_index = None
    variable_lengths = _no_items()
    transforms: tuple[tuple[str, ...], ...] = ()
    if flags & _EXPLICIT:
        lengths = reader.column(count, delta=False)
        gaps = reader.column(count, delta=False)
        starts = np.cumsum(gaps) + np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)[:count]
    else:
        variable_count = reader.varint(limits.MAX_ITEMS, "the number of variable lengths")
        variable_lengths = reader.column(variable_count, delta=False)
    if flags & _TRANSFORMS:
        transforms = _read_transforms(reader)
        transform_index = reader.column(count, delta=False)
    hints = reader.column(count, delta=False) if flags & _HINTS else None
    attributes = reader.column(count, delta=False) if flags & _ATTRIBUTES else None
    checksums = _read_checksums(reader, count, flags) if flags & _CHECKSUMS else None
    reader.end()
    return Extents(variable_lengths, lengths, starts, transforms, transform_index, hints, attributes, checksums)


def _read_transforms(reader: ByteReader) -> tuple[tuple[str, ...], ...]:
    list_count = reader.varint(limits.MAX_TRANSFORM_LISTS, "the number of transform lists")
    sizes = reader.column(list_count, delta=False)
    if list_count and (int(sizes.min()) < 0 or int(sizes.max()) > limits.MAX_TRANSFORM_LISTS):
        raise malformed("impossible length of a transform list")
    names = iter(reader.names(int(sizes.sum())))
    return tuple(tuple(next(names) for _ in range(size)) for size in sizes.tolist())


def check_extents(extents: ExtentsFacts, info: StructureInfo) -> int:
    """Returns the bytes that ``extents`` cover; raises InvalidArgumentError when they do not fit the structure."""
    if extents.item_count not in (None, info.item_count):
        raise InvalidArgumentError(
            f"extents of {extents.item_count} items for a structure of {info.item_count}",
            reason="EXTENTS_MISMATCH",
            field="extents",
        )
    if extents.explicit:
        return extents.size_bytes
    if extents.variable_count != info.variable_count:
        raise InvalidArgumentError(
            f"{extents.variable_count} variable lengths for a structure of {info.variable_count}",
            reason="EXTENTS_MISMATCH",
            field="extents",
        )
    return info.fixed_bytes + extents.size_bytes


def encode_volatile(requires_grad: BoolArray, pin_memory: BoolArray) -> bytes:
    """Returns the payload of two bits an entry of the table; empty when none is set."""
    if not requires_grad.any() and not pin_memory.any():
        return b""
    writer = ByteWriter()
    writer.byte(_VERSION)
    writer.varint(len(requires_grad))
    writer.bits(requires_grad)
    writer.bits(pin_memory)
    return frame(writer.finish())


def decode_volatile(payload: bytes, entry_count: int) -> tuple[BoolArray, BoolArray]:
    """Returns (requires_grad, pin_memory), each (entry_count,).

    Raises:
        InvalidArgumentError: The payload is damaged or is about another number of entries.
    """
    if not payload:
        return np.zeros(entry_count, dtype=np.bool_), np.zeros(entry_count, dtype=np.bool_)
    reader = ByteReader(unframe(payload))
    if reader.byte() != _VERSION:
        raise malformed("unknown version", field="volatile_properties")
    count = reader.varint(limits.MAX_ENTRIES, "the number of entries")
    if count != entry_count:
        raise InvalidArgumentError(
            f"properties of {count} entries for a table of {entry_count}",
            reason="EXTENTS_MISMATCH",
            field="volatile_properties",
        )
    requires_grad, pin_memory = reader.bits(count), reader.bits(count)
    reader.end()
    if not requires_grad.any() and not pin_memory.any():
        raise not_canonical("no property is set", field="volatile_properties")
    return requires_grad, pin_memory


def volatile_entry_count(payload: bytes) -> int | None:
    """Returns how many entries a volatile payload is about; None for the empty one."""
    if not payload:
        return None
    reader = ByteReader(unframe(payload))
    reader.byte()
    return reader.varint(limits.MAX_ENTRIES, "the number of entries")


def registration_digest(structure_digest: bytes, extents: bytes, volatile: bytes) -> bytes:
    """Returns the digest that says whether two registrations have the same content, however compressed."""
    parts = (structure_digest, unframe(extents), unframe(volatile) if volatile else b"")
    sizes = np.array([len(part) for part in parts], dtype="<u8").tobytes()
    return ordered_digest("registration", (sizes, *parts))


def encode_segment(registrations: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Returns the stored segment of consecutive ranks' (extents, volatile) payloads; equal ones are stored once."""
    writer = ByteWriter()
    writer.raw(magic(_SEGMENT, _SEGMENT_VERSION))
    for extents, volatile in write_index(writer, registrations, delta=False):
        writer.blob(extents)
        writer.blob(volatile)
    return frame(writer.finish())


def decode_segment(payload: bytes) -> list[tuple[bytes, bytes]]:
    """Returns the (extents, volatile) payloads of a segment's ranks; equal ones are the same objects."""
    reader = ByteReader(unframe(payload))
    expect_magic(reader, _SEGMENT, _SEGMENT_VERSION)
    index, distinct_count = read_index(reader, "extents", delta=False)
    distinct = [
        (reader.blob(limits.MAX_EXTENTS_BYTES, "extents"), reader.blob(limits.MAX_EXTENTS_BYTES, "properties"))
        for _ in range(distinct_count)
    ]
    reader.end()
    return [distinct[at] for at in index]
