"""What the ranks of a save drop, packed for storing: a bitmap over each rank's items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardbook.core import limits
from shardbook.core.columns import ByteReader, ByteWriter, expect_magic, frame, magic, malformed, unframe

_DROPS = b"SP"
_VERSION = 1


def encode_drops(drops: Sequence[bytes]) -> bytes:
    """Returns the stored form of consecutive ranks' bitmaps; equal ones are stored once.

    Args:
        drops: One a rank: bit i, most significant first, is 1 when another rank writes item i. Empty drops nothing.
    """
    distinct: dict[bytes, int] = {}
    index = np.fromiter((distinct.setdefault(drop, len(distinct)) for drop in drops), np.int64, len(drops))
    writer = ByteWriter()
    writer.raw(magic(_DROPS, _VERSION))
    writer.varint(len(drops))
    writer.varint(len(distinct))
    writer.column(index, delta=True)
    for drop in distinct:
        writer.blob(drop)
    return frame(writer.finish())


def decode_drops(payload: bytes) -> list[bytes]:
    """Returns the bitmaps in ``payload``; equal ones are the same object.

    Raises:
        InvalidArgumentError: It is damaged.
    """
    reader = ByteReader(unframe(payload))
    expect_magic(reader, _DROPS, _VERSION)
    count = reader.varint(limits.MAX_WORLD_SIZE, "the number of ranks")
    distinct_count = reader.varint(count, "the number of distinct bitmaps")
    index = reader.column(count, delta=True)
    distinct = [reader.blob(limits.MAX_ITEMS // 8, "a bitmap") for _ in range(distinct_count)]
    reader.end()
    if count and (int(index.min()) < 0 or int(index.max()) >= distinct_count):
        raise malformed("a rank names an unknown bitmap")
    return [distinct[at] for at in index.tolist()]
