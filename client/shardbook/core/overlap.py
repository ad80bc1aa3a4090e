"""Do boxes of one tensor overlap? Exact for any arrangement, bounded in memory.

Two boxes overlap when their intervals meet in every dimension. So a sweep along one dimension leaves as candidates
the pairs that meet there, and each candidate is tested in the others. Every dimension is tried and the one with the
fewest candidates taken, which makes a tensor cut along its shorter side as cheap as one cut along its longer.
Where even the best dimension leaves too many (columns beside a stack of rows, say), the boxes are divided at a plane
and both sides are swept apart.
"""

from __future__ import annotations

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array

#: Candidate pairs above which boxes are divided before they are swept.
_PAIRS_PER_SWEEP = 1 << 23
#: Candidate pairs tested at a time: what bounds memory.
_PAIRS_PER_BLOCK = 1 << 20


def find_overlap(offsets: Int64Array, sizes: Int64Array) -> tuple[int, int] | None:
    """Returns the rows of two boxes that share a cell, the lower first; None when no two do.

    Args:
        offsets: (N, D) first elements, padded or not.
        sizes: (N, D) elements, 1 or more; a box ends at 2**63 - 1 at most.
    """
    ends = offsets + sizes
    pending = [np.arange(len(offsets), dtype=np.int64)]
    while pending:
        rows = pending.pop()
        if len(rows) < 2:
            continue
        order, later = _cheapest_sweep(offsets[rows], ends[rows])
        if int(later.sum()) > _PAIRS_PER_SWEEP:
            sides = _divide(offsets[rows], ends[rows])
            if sides is not None:
                pending.extend(rows[side] for side in sides)
                continue
        rows = rows[order]
        pair = _sweep(offsets[rows], ends[rows], later)
        if pair is not None:
            first, second = sorted(int(rows[at]) for at in pair)
            return first, second
    return None


def _cheapest_sweep(starts: Int64Array, ends: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Returns the order of the boxes along the best dimension, and how many of the next ones each meets there."""
    best: tuple[int, Int64Array, Int64Array] | None = None
    for dim in range(starts.shape[1]):
        start = starts[:, dim]
        if best is not None and (start == start[0]).all():
            continue  # here every box meets every other; padded dimensions are like this
        order = np.argsort(start, kind="stable")
        met = np.searchsorted(start[order], ends[order, dim], side="left")
        later = met.astype(np.int64) - np.arange(1, len(start) + 1)
        pairs = int(later.sum())
        if best is None or pairs < best[0]:
            best = pairs, order, later
    if best is None:
        raise ValueError("boxes have no dimension, not even a padded one")
    return best[1], best[2]


def _sweep(starts: Int64Array, ends: Int64Array, later: Int64Array) -> tuple[int, int] | None:
    """Tests each box against the ``later`` ones that follow it; returns the first pair found."""
    upto = np.cumsum(later)
    begun = upto - later
    total = int(upto[-1])
    for at in range(0, total, _PAIRS_PER_BLOCK):
        to = min(at + _PAIRS_PER_BLOCK, total)
        low = int(np.searchsorted(upto, at, side="right"))
        high = int(np.searchsorted(upto, to - 1, side="right")) + 1
        here = np.minimum(upto[low:high], to) - np.maximum(begun[low:high], at)
        first = np.repeat(np.arange(low, high), here)
        second = first + 1 + np.arange(at, to) - begun[first]
        hits = np.flatnonzero(_meet(starts, ends, first, second))
        if len(hits):
            return int(first[hits[0]]), int(second[hits[0]])
    return None


def _meet(starts: Int64Array, ends: Int64Array, first: Int64Array, second: Int64Array) -> BoolArray:
    met = np.ones(len(first), dtype=np.bool_)
    for dim in range(starts.shape[1]):
        start, end = starts[:, dim], ends[:, dim]
        met &= (start[first] < end[second]) & (start[second] < end[first])
    return met


def _divide(starts: Int64Array, ends: Int64Array) -> tuple[BoolArray, BoolArray] | None:
    """Returns the boxes on either side of the best plane; None when no plane divides them well.

    A box that the plane cuts is on both sides: two boxes that share a cell are then together on the cell's side.
    """
    count = len(starts)
    best: tuple[int, BoolArray, BoolArray] | None = None
    for dim in range(starts.shape[1]):
        start, end = starts[:, dim], ends[:, dim]
        for values in (start, end):
            plane = int(np.partition(values, count // 2)[count // 2])
            low, high = start < plane, end > plane
            low_count, high_count = int(low.sum()), int(high.sum())
            if max(low_count, high_count) > count * 7 // 8 or low_count + high_count > count * 5 // 4:
                continue
            if best is None or low_count + high_count < best[0]:
                best = low_count + high_count, low, high
    return None if best is None else (best[1], best[2])
