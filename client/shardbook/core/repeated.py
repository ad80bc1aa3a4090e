"""Items of which many are equal, each distinct one written once: an index over them, and then the caller's own form.

What ranks say of themselves is often the same; a segment of ranks holds it once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from shardbook.core import limits
from shardbook.core.columns import ByteReader, ByteWriter, malformed

T = TypeVar("T", bound=Hashable)


def write_index(writer: ByteWriter, items: Sequence[T], *, delta: bool) -> list[T]:
    """Writes how many ``items`` there are and which are equal; returns the distinct ones, for the caller to write.

    Args:
        writer: Where.
        items: One a rank.
        delta: As for ``ByteWriter.column``: part of the format.
    """
    distinct: dict[T, int] = {}
    index = np.fromiter((distinct.setdefault(item, len(distinct)) for item in items), np.int64, len(items))
    writer.varint(len(items))
    writer.varint(len(distinct))
    writer.column(index, delta=delta)
    return list(distinct)


def read_index(reader: ByteReader, what: str, *, delta: bool) -> tuple[list[int], int]:
    """Returns which of the distinct items each item is, and how many distinct ones the caller has to read.

    Raises:
        InvalidArgumentError: It is damaged; ``what`` names the items.
    """
    count = reader.varint(limits.MAX_WORLD_SIZE, "the number of ranks")
    distinct_count = reader.varint(count, f"the number of distinct {what}")
    index = reader.column(count, delta=delta)
    if count and (int(index.min()) < 0 or int(index.max()) >= distinct_count):
        raise malformed(f"a rank names unknown {what}")
    return index.tolist(), distinct_count
