"""Do the chunks of each tensor lie within it, apart from each other, and make the whole of it? numpy only.

Geometry is padded as in ``shardbook.core.table``: dimensions past a tensor's own have shape 1, offset 0 and size 1,
so that a 0-dim tensor is one cell and needs no case of its own. Chunks are tensor-major: ``counts`` says how many
each tensor has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.digest import digest_of
from shardbook.core.grid import prove_cuts, prove_even
from shardbook.core.overlap import Budget, BudgetExceededError, find_overlap
from shardbook.core.ragged import firsts_of, group_count, group_reduce, rows_of
from shardbook.core.table import check_volumes
from shardbook.errors import InvalidArgumentError

#: No row.
NONE = -1


class UndecidedError(Exception):
    """The chunks of a tensor lie so that telling them apart takes more than a checkpoint may take.

    Attributes:
        tensor: Its row.
        chunk_count: Its chunks.
    """

    def __init__(self, tensor: int, chunk_count: int) -> None:
        super().__init__(tensor, chunk_count)
        self.tensor = tensor
        self.chunk_count = chunk_count


@dataclass(frozen=True, eq=False)
class Verdict:
    """What is wrong with the chunks of each tensor. A tensor with a chunk out of bounds is judged no further.

    Attributes:
        out_of_bounds: (N,) True for chunks that leave their tensor.
        overlap: (T, 2) rows of two overlapping chunks; ``NONE`` where no two overlap.
        incomplete: (T,) True where the chunks' volumes do not add up to the tensor's. With no overlap, that is a hole.
    """

    out_of_bounds: BoolArray
    overlap: Int64Array
    incomplete: BoolArray

    @property
    def is_valid(self) -> bool:
        """True when every tensor is whole."""
        return not (self.out_of_bounds.any() or (self.overlap != NONE).any() or self.incomplete.any())


class Sweeps:
    """Comparisons of boxes that no proof settles; those of one checkpoint share what they may take. Not thread-safe."""

    def __init__(self) -> None:
        """Nothing has been compared."""
        self._budget = Budget()
        self._known: dict[bytes, tuple[int, int] | None] = {}

    def find_overlap(self, offsets: Int64Array, sizes: Int64Array) -> tuple[int, int] | None:
        """Returns as ``shardbook.core.overlap`` does, and raises its error."""
        # Optimizer moments are cut as their parameter is: the same boxes are swept once.
        key = digest_of(np.concatenate([offsets, sizes]).tobytes())
        if key not in self._known:
            self._known[key] = find_overlap(offsets, sizes, self._budget)
        return self._known[key]


def judge(
    counts: Int64Array,
    shapes: Int64Array,
    offsets: Int64Array,
    sizes: Int64Array,
    *,
    settled: BoolArray | None = None,
    sweeps: Sweeps | None = None,
) -> Verdict:
    """Returns the verdict on every tensor; exact for any arrangement of boxes.

    Empty chunks (a size of 0) overlap nothing and have no volume.

    Args:
        counts: (T,) chunks of each tensor.
        shapes: (T, D) elements.
        offsets: (N, D) elements.
        sizes: (N, D) elements.
        settled: (T,) True for tensors to pass over, with which nothing is wrong in the verdict; by default those that
            ``prove_even`` proves whole, which is nearly all of them and costs one pass.
        sweeps: Of the checkpoint that these tensors are a part of; by default they are all of it.

    Raises:
        InvalidArgumentError: Shapes of the arrays do not match, or a tensor has 2**63 elements or more.
        UndecidedError: Some tensor's chunks take more than ``limits.MAX_BOX_COMPARISONS``.
    """
    if offsets.shape != sizes.shape or offsets.shape[1:] != shapes.shape[1:]:
        raise InvalidArgumentError("offsets, sizes and shapes have different dimensions", field="offsets")
    if len(counts) != len(shapes) or int(counts.sum()) != len(offsets):
        raise InvalidArgumentError("chunk counts do not add up to the chunks", field="counts")
    check_volumes(shapes)
    verdict = Verdict(
        out_of_bounds=np.zeros(len(offsets), dtype=np.bool_),
        overlap=np.full((len(counts), 2), NONE, dtype=np.int64),
        incomplete=np.zeros(len(counts), dtype=np.bool_),
    )
    if settled is None:
        settled = prove_even(counts, shapes, offsets, sizes).tiled
    rest = np.flatnonzero(~settled)
    rows = rows_of(firsts_of(counts)[rest], counts[rest])
    counts, shapes, offsets, sizes = counts[rest], shapes[rest], offsets[rows], sizes[rows]
    out = out_of_bounds(counts, shapes, offsets, sizes)
    inside = group_count(out, counts) == 0
    try:
        pairs = _find_overlaps(counts, shapes, offsets, sizes, inside, sweeps or Sweeps())
    except UndecidedError as error:
        raise UndecidedError(int(rest[error.tensor]), error.chunk_count) from error
    verdict.out_of_bounds[rows] = out
    verdict.overlap[rest] = np.where(pairs == NONE, NONE, np.append(rows, NONE)[pairs])
    verdict.incomplete[rest] = inside & (covered(counts, shapes, sizes) != volumes(shapes))
    return verdict


def out_of_bounds(counts: Int64Array, shapes: Int64Array, offsets: Int64Array, sizes: Int64Array) -> BoolArray:
    """Returns (N,) True for chunks that leave their tensor or have a negative offset or size."""
    out = np.zeros(len(offsets), dtype=np.bool_)
    for dim in range(shapes.shape[1]):
        offset, size = offsets[:, dim], sizes[:, dim]
        # Shapes and offsets are below 2**63, so unlike offset + size their difference is too.
        out |= (offset < 0) | (size < 0) | (size > np.repeat(shapes[:, dim], counts) - np.maximum(offset, 0))
    return out


def volumes(sizes: Int64Array) -> Int64Array:
    """Returns (N,) the number of cells of each box; exact below 2**63, modulo 2**64 beyond."""
    product = sizes[:, 0].copy()
    for dim in range(1, sizes.shape[1]):
        product *= sizes[:, dim]
    return product


def is_empty(sizes: Int64Array) -> BoolArray:
    """Returns (N,) True for boxes without cells."""
    empty: BoolArray = sizes[:, 0] == 0
    for dim in range(1, sizes.shape[1]):
        empty |= sizes[:, dim] == 0
    return empty


def covered(counts: Int64Array, shapes: Int64Array, sizes: Int64Array) -> Int64Array:
    """Returns (T,) how many cells the chunks of each tensor have in all; -1 for 2**63 and more.

    Chunks lie within their tensors, whose volumes are below 2**63: then only the sums could wrap around.
    """
    cells = volumes(sizes)
    total = group_reduce(np.add, cells, counts)
    largest = float(volumes(shapes).max(initial=0)) * float(counts.max(initial=0))
    if largest >= 2.0**63:
        total[(group_reduce(np.add, cells.astype(np.float64), counts) > 1.5 * 2.0**63) | (total < 0)] = -1
    return total


def _find_overlaps(
    counts: Int64Array,
    shapes: Int64Array,
    offsets: Int64Array,
    sizes: Int64Array,
    inside: BoolArray,
    sweeps: Sweeps,
) -> Int64Array:
    """Returns (T, 2) rows of two overlapping chunks of each tensor that is ``inside``: proofs first, then sweeps."""
    pairs = np.full((len(counts), 2), NONE, dtype=np.int64)
    solid = ~is_empty(sizes)
    firsts = firsts_of(counts)
    tensors = np.flatnonzero(inside & (group_count(solid, counts) > 1))
    for prove in (prove_even, prove_cuts):
        rows = rows_of(firsts[tensors], counts[tensors])
        solid_counts = group_count(solid[rows], counts[tensors])
        rows = rows[solid[rows]]
        tensors = tensors[~prove(solid_counts, shapes[tensors], offsets[rows], sizes[rows]).disjoint]
    for tensor in tensors.tolist():
        rows = np.arange(firsts[tensor], firsts[tensor + 1])
        rows = rows[solid[rows]]
        try:
            pair = sweeps.find_overlap(offsets[rows], sizes[rows])
        except BudgetExceededError as error:
            raise UndecidedError(tensor, len(rows)) from error
        if pair is not None:
            pairs[tensor] = rows[list(pair)]
    return pairs
