"""Long lists in statements, and packed lists of ids in rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

import numpy as np

from shardbook.core import limits
from shardbook.core.columns import ByteReader, ByteWriter, Int64Array, frame, unframe

T = TypeVar("T")

#: Most values of one IN list: well below the parameter limit of every driver.
IN_LIST: Final = 500
_VERSION: Final = 1


def slices(values: Sequence[T], size: int = IN_LIST) -> Iterator[Sequence[T]]:
    """Yields ``values`` in slices of at most ``size``."""
    for at in range(0, len(values), size):
        yield values[at : at + size]


def pack_ids(ids: Sequence[int] | Int64Array) -> bytes:
    """Returns row ids packed for storing; neighbours cost next to nothing."""
    writer = ByteWriter()
    writer.byte(_VERSION)
    writer.varint(len(ids))
    writer.column(np.asarray(ids, dtype=np.int64), delta=True)
    return frame(writer.finish())


def unpack_ids(payload: bytes) -> Int64Array:
    """Returns the ids that ``pack_ids`` packed, (N,)."""
    reader = ByteReader(unframe(payload))
    reader.byte()
    ids = reader.column(reader.varint(limits.MAX_CELLS, "the number of ids"), delta=True)
    reader.end()
    return ids
