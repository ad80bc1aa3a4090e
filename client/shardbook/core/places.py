"""What of an answer differs between checkpoints of one structure: where the found chunks lie.

A ``FoundPart`` taken apart: what the structure says, which every checkpoint of the structure shares and readers keep,
and what one checkpoint's extents say, as differences to it. Those are mostly 0, so that the second part is small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    unframe,
)
from shardbook.core.extents import HINT_POSITION, NO_CHECKSUM
from shardbook.core.found import FoundPart, read_transforms, write_transforms

_KIND = b"FP"
_VERSION = 1
_COLUMNS = ("shift", "extra", "transform_index", "hints", "attributes", "checksum")


@dataclass(frozen=True, eq=False)
class Places:
    """Where the K chunks of a part about P entries lie in one checkpoint.

    Attributes:
        shift: (K,) first byte in the file, less what the structure says.
        extra: (K,) bytes in the file, less what the structure says.
        transform_index: (K,) as in ``FoundPart``.
        hints: (K,) likewise.
        attributes: (K,) likewise.
        checksum: (K,) likewise.
        requires_grad: (P,) likewise.
        pin_memory: (P,) likewise.
        transforms: Likewise.
    """

    shift: Int64Array
    extra: Int64Array
    transform_index: Int64Array
    hints: Int64Array
    attributes: Int64Array
    checksum: Int64Array
    requires_grad: BoolArray
    pin_memory: BoolArray
    transforms: tuple[tuple[str, ...], ...]


def apart(part: FoundPart, base: Int64Array, length: Int64Array) -> tuple[FoundPart, Places]:
    """Takes an answer apart that was found without a prefix.

    Args:
        part: The answer.
        base: (K,) first bytes as the structure has them.
        length: (K,) bytes as the structure has them.
    """
    chunk_count, no_flags = len(part.at), np.zeros(len(part.tensor), dtype=np.bool_)
    places = Places(
        shift=part.start - base,
        extra=part.length - length,
        transform_index=part.transform_index,
        hints=part.hints,
        attributes=part.attributes,
        checksum=part.checksum,
        requires_grad=part.requires_grad,
        pin_memory=part.pin_memory,
        transforms=part.transforms,
    )
    zeros = np.zeros(chunk_count, dtype=np.int64)
    shared = replace(
        part,
        start=base,
        length=length,
        transform_index=zeros,
        hints=np.full(chunk_count, HINT_POSITION, dtype=np.int64),
        attributes=zeros,
        checksum=np.full(chunk_count, NO_CHECKSUM, dtype=np.int64),
        requires_grad=no_flags,
        pin_memory=no_flags,
        transforms=(),
    )
    return shared, places


def together(shared: FoundPart, places: Places, prefix: str) -> FoundPart:
    """Returns the answer that was taken apart, for a checkpoint whose files lie in ``prefix``.

    Raises:
        InvalidArgumentError: The two are not of one answer.
    """
    if len(places.shift) != len(shared.at) or len(places.requires_grad) != len(shared.tensor):
        raise malformed("places of other chunks than were found")
    return replace(
        shared,
        start=shared.start + places.shift,
        length=shared.length + places.extra,
        transform_index=places.transform_index,
        hints=places.hints,
        attributes=places.attributes,
        checksum=places.checksum,
        requires_grad=places.requires_grad,
        pin_memory=places.pin_memory,
        transforms=places.transforms,
        paths=tuple(f"{prefix}/{path}" for path in shared.paths) if prefix else shared.paths,
    )


def encode_places(places: Places) -> bytes:
    """Returns the payload of places."""
    writer = ByteWriter()
    writer.raw(magic(_KIND, _VERSION))
    writer.varint(len(places.requires_grad))
    writer.bits(places.requires_grad)
    writer.bits(places.pin_memory)
    write_transforms(writer, places.transforms)
    writer.varint(len(places.shift))
    for name in _COLUMNS:
        writer.column(getattr(places, name), delta=False)
    return frame(writer.finish())


def decode_places(payload: bytes) -> Places:
    """Returns the places in ``payload``.

    Raises:
        InvalidArgumentError: It is damaged, or beyond a limit.
    """
    reader = ByteReader(unframe(payload))
    expect_magic(reader, _KIND, _VERSION)
    count = reader.varint(limits.MAX_WANTED_TENSORS, "the number of tensors")
    requires_grad, pin_memory = reader.bits(count), reader.bits(count)
    transforms = read_transforms(reader)
    chunk_count = reader.varint(limits.MAX_CELLS, "the number of chunks")
    columns = {name: reader.column(chunk_count, delta=False) for name in _COLUMNS}
    reader.end()
    index = columns["transform_index"]
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) <= len(transforms):
        raise malformed("an answer's transform_index is out of range")
    return Places(requires_grad=requires_grad, pin_memory=pin_memory, transforms=transforms, **columns)
