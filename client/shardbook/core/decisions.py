"""What the ranks of a save drop, packed for storing: a bitmap over each rank's items."""

from __future__ import annotations

from collections.abc import Sequence

from shardbook.core import limits
from shardbook.core.columns import ByteReader, ByteWriter, expect_magic, frame, magic, unframe
from shardbook.core.repeated import read_index, write_index

_DROPS = b"SP"
_VERSION = 1


def encode_drops(drops: Sequence[bytes]) -> bytes:
    """Returns the stored form of consecutive ranks' bitmaps; equal ones are stored once.

    Args:
        drops: One a rank: bit i, most significant first, is 1 when another rank writes item i. Empty drops nothing.
    """
    writer = ByteWriter()
    writer.raw(magic(_DROPS, _VERSION))
    for drop in write_index(writer, drops, delta=True):
        writer.blob(drop)
    return frame(writer.finish())


def decode_drops(payload: bytes) -> list[bytes]:
    """Returns the bitmaps in ``payload``; equal ones are the same object.

    Raises:
        InvalidArgumentError: It is damaged.
    """
    reader = ByteReader(unframe(payload))
    expect_magic(reader, _DROPS, _VERSION)
    index, distinct_count = read_index(reader, "bitmaps", delta=True)
    distinct = [reader.blob(limits.MAX_ITEMS // 8, "a bitmap") for _ in range(distinct_count)]
    reader.end()
    return [distinct[at] for at in index]
