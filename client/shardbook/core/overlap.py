"""Do boxes of one tensor overlap? Exact for any arrangement, bounded in memory and in comparisons.

Two boxes overlap when their intervals meet in every dimension. So a sweep along one dimension leaves as candidates
the pairs that meet there, and each candidate is tested in the others. Every dimension is tried and the one with the
fewest candidates taken, which makes a tensor cut along its shorter side as cheap as one cut along its longer.
Where even the best dimension leaves too many (columns beside a stack of rows, or rods along each axis), the boxes are
divided at a plane, clipped to either side and judged apart, until few candidates are left or few places where they
begin and end: then they are painted on the grid of those, and no cell may have two coats. Of N rods in three dimensions
that is some N ** 1.5 cells, as in Overmars and Yap's partition. There are arrangements in many dimensions that no plane
divides: a budget ends those.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from shardbook.core import limits
from shardbook.core.columns import Int64Array

#: Candidate pairs above which boxes are divided or painted before they are swept.
_PAIRS_PER_SWEEP = 1 << 18
#: Candidate pairs tested at a time, and cells painted at a time: what bounds memory.
_PAIRS_PER_BLOCK = 1 << 18
_CELLS_PER_PAINTING = 1 << 22
#: Most dimensions that are painted: a box has two corners in each.
_PAINTED_DIMS = 6
#: Cells that are painted in the time of a comparison.
_CELLS_PER_COMPARISON = 8
#: What a plane must leave of the pairs that there are at most, to be worth the boxes that it puts on both sides.
_WORTHWHILE = 0.92


class BudgetExceededError(Exception):
    """Boxes could not be told apart within the comparisons that they may take."""


class Budget:
    """Comparisons that a checkpoint's boxes may take together. Not thread-safe."""

    def __init__(self, comparisons: int | None = None) -> None:
        self._left = limits.MAX_BOX_COMPARISONS if comparisons is None else comparisons

    def spend(self, comparisons: int) -> None:
        """Takes some off.

        Raises:
            BudgetExceededError: There are not so many left.
        """
        self._left -= comparisons
        if self._left < 0:
            raise BudgetExceededError


def find_overlap(offsets: Int64Array, sizes: Int64Array, budget: Budget | None = None) -> tuple[int, int] | None:
    """Returns the rows of two boxes that share a cell, the lower first; None when no two do.

    Args:
        offsets: (N, D) first elements, padded or not.
        sizes: (N, D) elements, 1 or more; a box ends at 2**63 - 1 at most.
        budget: What it may take; as much as a whole checkpoint when None.

    Raises:
        BudgetExceededError: It would take more.
    """
    budget = Budget() if budget is None else budget
    pending = [(np.arange(len(offsets), dtype=np.int64), offsets, offsets + sizes)]
    while pending:
        rows, starts, ends = pending.pop()
        if len(rows) < 2:
            continue
        budget.spend(len(rows))
        order, later, dims = _cheapest_sweep(starts, ends)
        pairs = int(later.sum())
        pair: tuple[int, int] | None
        if pairs > _PAIRS_PER_SWEEP:
            grid = _Grid.of(starts, ends)
            if grid is not None and grid.cell_count <= pairs * _CELLS_PER_COMPARISON:
                budget.spend(grid.cell_count // _CELLS_PER_COMPARISON)
                pair = grid.find_second_coat(starts, ends)
                if pair is not None:
                    return _sorted(rows, pair)
                continue
            plane = _best_plane(starts, ends)
            if plane is not None:
                pending.extend(_divide(rows, starts, ends, *plane))
                continue
        budget.spend(pairs)
        pair = _sweep(starts[order], ends[order], later, dims)
        if pair is not None:
            return _sorted(rows[order], pair)
    return None


def _sorted(rows: Int64Array, pair: tuple[int, int]) -> tuple[int, int]:
    first, second = sorted(int(rows[at]) for at in pair)
    return first, second


@dataclass(frozen=True)
class _Grid:
    """Cells between all the places where boxes begin and end.

    Attributes:
        dims: Dimensions that have more than one cell.
        cuts: Those places, sorted, by dimension of ``dims``.
    """

    dims: list[int]
    cuts: list[Int64Array]

    @classmethod
    def of(cls, starts: Int64Array, ends: Int64Array) -> _Grid | None:
        """Returns the grid of boxes; None when it is too large to paint."""
        dims, cuts, cells = [], [], 1
        for dim in range(starts.shape[1]):
            places = np.unique(np.concatenate([starts[:, dim], ends[:, dim]]))
            if len(places) > 2:
                dims.append(dim)
                cuts.append(places)
                cells *= len(places)
                if cells > _CELLS_PER_PAINTING or len(dims) > _PAINTED_DIMS:
                    return None
        return cls(dims, cuts)

    @property
    def cell_count(self) -> int:
        """Cells to paint, with those behind the last cut of each dimension."""
        return math.prod(len(places) for places in self.cuts)

    def find_second_coat(self, starts: Int64Array, ends: Int64Array) -> tuple[int, int] | None:
        """Returns two boxes that paint one cell; None when no cell has two coats."""
        if not self.dims:
            return 0, 1  # all of them are the same box
        shape = tuple(len(places) for places in self.cuts)
        first = [np.searchsorted(cut, starts[:, dim]) for dim, cut in zip(self.dims, self.cuts, strict=True)]
        last = [np.searchsorted(cut, ends[:, dim]) for dim, cut in zip(self.dims, self.cuts, strict=True)]
        # Corners, of which sums along each dimension make boxes.
        coats = np.zeros(shape, np.int32)
        for corner in itertools.product((0, 1), repeat=len(shape)):
            at = tuple((first, last)[end][axis] for axis, end in enumerate(corner))
            np.add.at(coats, at, -1 if sum(corner) % 2 else 1)
        for axis in range(len(shape)):
            np.cumsum(coats, axis=axis, out=coats)
        top = int(np.argmax(coats))
        cell = np.unravel_index(top, shape)
        if coats[cell] < 2:
            return None
        covers = np.ones(len(starts), np.bool_)
        for axis, index in enumerate(cell):
            covers &= (first[axis] <= index) & (index < last[axis])
        one, two = np.flatnonzero(covers)[:2].tolist()
        return one, two


def _cheapest_sweep(starts: Int64Array, ends: Int64Array) -> tuple[Int64Array, Int64Array, list[int]]:
    """Returns the order of the boxes along the best dimension, and how many of the next ones each meets there.

    And the other dimensions in which some pair may be apart, those that tell most pairs apart first.
    """
    count = len(starts)
    sweeps: list[tuple[int, int, Int64Array, Int64Array]] = []
    for dim in range(starts.shape[1]):
        start = starts[:, dim]
        if (start == start[0]).all():
            continue  # here every box meets every other; padded dimensions are like this
        order = np.argsort(start, kind="stable")
        met = np.searchsorted(start[order], ends[order, dim], side="left")
        later = met.astype(np.int64) - np.arange(1, count + 1)
        sweeps.append((int(later.sum()), dim, order, later))
    if not sweeps:
        return np.arange(count), np.arange(count - 1, -1, -1), []
    sweeps.sort(key=lambda sweep: sweep[:2])
    return sweeps[0][2], sweeps[0][3], [dim for _, dim, _, _ in sweeps[1:]]


def _sweep(starts: Int64Array, ends: Int64Array, later: Int64Array, dims: list[int]) -> tuple[int, int] | None:
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
        first, second = _meeting(starts, ends, first, second, dims)
        if len(first):
            return int(first[0]), int(second[0])
    return None


def _meeting(
    starts: Int64Array, ends: Int64Array, first: Int64Array, second: Int64Array, dims: list[int]
) -> tuple[Int64Array, Int64Array]:
    """Returns those pairs that meet in all of ``dims`` too; a pair that is apart is looked at no further."""
    for dim in dims:
        start, end = starts[:, dim], ends[:, dim]
        met = np.flatnonzero((start[first] < end[second]) & (start[second] < end[first]))
        first, second = first[met], second[met]
        if not len(first):
            break
    return first, second


def _best_plane(starts: Int64Array, ends: Int64Array) -> tuple[int, int] | None:
    """Returns the dimension and place of the plane that divides boxes best; None when no plane is worth it."""
    count = len(starts)
    best = _WORTHWHILE * count * count, -1, 0
    for dim in range(starts.shape[1]):
        start, end = starts[:, dim], ends[:, dim]
        # Where half of them begin or end, and where their middles have half on either side.
        for values in (start, end, start + (end - start) // 2):
            place = int(np.partition(values, count // 2)[count // 2])
            low, high = int((start < place).sum()), int((end > place).sum())
            if max(low, high) < count:
                best = min(best, (float(low * low + high * high), dim, place))
    return None if best[1] < 0 else (best[1], best[2])


def _divide(
    rows: Int64Array, starts: Int64Array, ends: Int64Array, dim: int, place: int
) -> list[tuple[Int64Array, Int64Array, Int64Array]]:
    """Returns the boxes on either side of a plane, clipped to it; one that it cuts is on both.

    Two boxes that share a cell are then together on the cell's side.
    """
    low, high = starts[:, dim] < place, ends[:, dim] > place
    low_ends, high_starts = ends[low], starts[high]
    low_ends[:, dim] = np.minimum(low_ends[:, dim], place)
    high_starts[:, dim] = np.maximum(high_starts[:, dim], place)
    return [(rows[low], starts[low], low_ends), (rows[high], high_starts, ends[high])]
