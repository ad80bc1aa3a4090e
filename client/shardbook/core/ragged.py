"""Rows that belong to groups of uneven size: one group's rows lie together, ``counts`` says how many each has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from shardbook.core.columns import Int64Array

Scalar = TypeVar("Scalar", bound=np.generic)


def firsts_of(counts: Int64Array) -> Int64Array:
    """Returns (G + 1,) the row at which each group begins, and the number of rows."""
    firsts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=firsts[1:])
    return firsts


def group_reduce(ufunc: np.ufunc, values: npt.NDArray[Scalar], counts: Int64Array) -> npt.NDArray[Scalar]:
    """Returns (G,) the reduction of each group's rows, in their dtype; 0 for a group without rows.

    Args:
        ufunc: ``np.add``, ``np.maximum`` or the like. Sums wrap around as the dtype does.
        values: (N,) rows.
        counts: (G,) rows of each group, N in all.
    """
    out = np.zeros(len(counts), dtype=values.dtype)
    held = counts > 0
    if held.any():
        out[held] = ufunc.reduceat(values, firsts_of(counts)[:-1][held], dtype=values.dtype)
    return out


def group_count(flags: npt.NDArray[np.bool_], counts: Int64Array) -> Int64Array:
    """Returns (G,) how many rows of each group are flagged."""
    running = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=running[1:])
    firsts = firsts_of(counts)
    flagged: Int64Array = running[firsts[1:]] - running[firsts[:-1]]
    return flagged


def within_group(counts: Int64Array) -> Int64Array:
    """Returns (N,) the number of each row within its group, from 0."""
    firsts = firsts_of(counts)
    return np.arange(firsts[-1], dtype=np.int64) - np.repeat(firsts[:-1], counts)


def rows_of(firsts: Int64Array, counts: Int64Array) -> Int64Array:
    """Returns the rows of the ranges ``firsts[i] .. firsts[i] + counts[i]``, one range after the other."""
    return np.repeat(firsts, counts) + within_group(counts)


def runs_of(rows: Int64Array, firsts: Int64Array) -> Iterator[tuple[int, slice, slice | Int64Array]]:
    """Yields, of each group that has some of ``rows`` (N,), which climb: its number, where they are, they within it.

    The rows within the group are a slice where they are neighbours.
    """
    cuts = np.searchsorted(rows, firsts)
    held = np.flatnonzero(cuts[1:] > cuts[:-1])
    lows, highs = cuts[held], cuts[held + 1]
    begins, ends = rows[lows] - firsts[held], rows[highs - 1] + 1 - firsts[held]
    columns = (held, lows, highs, begins, ends)
    for group, low, high, begin, end in zip(*(column.tolist() for column in columns), strict=True):
        neighbours = end - begin == high - low
        yield group, slice(low, high), slice(begin, end) if neighbours else rows[low:high] - firsts[group]


#: Most parts that large inputs are worked on in: each part goes through the arrays of all ranks.
_PART_COUNT: Final = 16


def part_items(item_count: int, at_least: int) -> int:
    """Returns how many of so many items to work on at a time, but for an entry that has more by itself.

    Args:
        item_count: All of them.
        at_least: Items below which numpy's calls cost more than their work.
    """
    return min(item_count, max(at_least, item_count // _PART_COUNT))


def bounds_of(counts: Iterable[int], limit: int) -> list[int]:
    """Returns where to cut consecutive entries into pages of about ``limit`` chunks; the first is 0, the last T."""
    bounds, held, at = [0], 0, 0
    for at, count in enumerate(counts, 1):
        held += count
        if held >= limit:
            bounds.append(at)
            held = 0
    if bounds[-1] != at:
        bounds.append(at)
    return bounds
