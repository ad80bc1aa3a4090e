"""Proofs that the chunks of a tensor are disjoint because they are cells of a grid: every tensor in one pass.

Sharding makes grids, so these proofs settle nearly every tensor of a checkpoint without comparing boxes. A proof
never says that chunks overlap; a tensor without one goes to ``shardbook.core.overlap``.

Both proofs find for every chunk the cell it would be in each dimension, and check that it is exactly that cell.
Chunks are then disjoint when no two are the same cell, and tile the tensor when they are as many as the cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.ragged import firsts_of, group_count, group_reduce

#: Cells of a tensor's grid for each of its chunks, beyond which a grid is too sparse to mark its cells.
_CELLS_PER_CHUNK = 4
_CELLS_AT_LEAST = 64


@dataclass(frozen=True, eq=False)
class GridProof:
    """What a grid says of each tensor.

    Attributes:
        disjoint: (T,) True where no two chunks overlap, for certain, and no chunk is empty.
        tiled: (T,) True where the chunks are moreover the whole tensor, once.
    """

    disjoint: BoolArray
    tiled: BoolArray


def prove_even(counts: Int64Array, shapes: Int64Array, offsets: Int64Array, sizes: Int64Array) -> GridProof:
    """Proves tensors cut as ``torch.chunk`` cuts: in each dimension boxes of one size, and a rest at the end.

    Args:
        counts: (T,) chunks of each tensor; its chunks lie together.
        shapes: (T, D) elements, padded with 1.
        offsets: (N, D) elements, padded with 0.
        sizes: (N, D) elements, padded with 1; not negative.
    """
    fits = np.ones(len(offsets), dtype=np.bool_)
    cells = np.zeros(len(offsets), dtype=np.int64)
    parts = np.zeros_like(shapes)
    for dim in range(shapes.shape[1]):
        offset, size = offsets[:, dim], sizes[:, dim]
        step = np.maximum(group_reduce(np.maximum, size, counts), 1)
        parts[:, dim] = -(-shapes[:, dim] // step)
        step_of = np.repeat(step, counts)
        index = offset // step_of
        fits &= (index * step_of == offset) & (offset >= 0) & (size > 0)
        fits &= size == np.minimum(step_of, np.repeat(shapes[:, dim], counts) - offset)
        _append_digit(cells, index, parts[:, dim], counts)
    return _prove(counts, fits, cells, parts)


def prove_cuts(counts: Int64Array, shapes: Int64Array, offsets: Int64Array, sizes: Int64Array) -> GridProof:
    """Proves tensors cut at any places, as long as every cut goes through; arguments as in ``prove_even``.

    It sorts the chunks, so it costs several times what ``prove_even`` does.
    """
    fits = np.ones(len(offsets), dtype=np.bool_)
    cells = np.zeros(len(offsets), dtype=np.int64)
    parts = np.zeros_like(shapes)
    tensor = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    for dim in range(shapes.shape[1]):
        offset, size = offsets[:, dim], sizes[:, dim]
        order = np.lexsort((offset, tensor))
        sorted_offset, sorted_tensor = offset[order], tensor[order]
        is_cut = np.ones(len(order), dtype=np.bool_)
        is_cut[1:] = (sorted_offset[1:] != sorted_offset[:-1]) | (sorted_tensor[1:] != sorted_tensor[:-1])
        cut, cut_tensor = sorted_offset[is_cut], sorted_tensor[is_cut]
        parts[:, dim] = np.bincount(cut_tensor, minlength=len(counts))
        firsts = firsts_of(parts[:, dim])
        end = np.empty_like(cut)
        end[:-1] = cut[1:]
        held = parts[:, dim] > 0
        end[firsts[1:][held] - 1] = shapes[held, dim]
        index = np.empty_like(offset)
        index[order] = np.cumsum(is_cut) - 1
        fits &= (size == end[index] - offset) & (offset >= 0) & (size > 0)
        begins_at_0 = np.zeros(len(counts), dtype=np.bool_)
        begins_at_0[held] = cut[firsts[:-1][held]] == 0
        fits &= np.repeat(begins_at_0, counts)
        _append_digit(cells, index - firsts[tensor], parts[:, dim], counts)
    return _prove(counts, fits, cells, parts)


def _append_digit(cells: Int64Array, index: Int64Array, parts: Int64Array, counts: Int64Array) -> None:
    """Turns the number of each cell in the dimensions so far into its number with one more."""
    if (parts > 1).any():
        cells *= np.repeat(parts, counts)
        cells += index


def _prove(counts: Int64Array, fits: BoolArray, cells: Int64Array, parts: Int64Array) -> GridProof:
    """Decides, from the cell of each chunk that ``fits`` one and the (T, D) ``parts`` of each dimension."""
    # As floats, because the grid of a tensor that has none may have any number of cells.
    cell_count = parts.astype(np.float64).prod(axis=1)
    dense = cell_count <= np.maximum(_CELLS_PER_CHUNK * counts, _CELLS_AT_LEAST)
    held = (group_count(fits, counts) == counts) & (counts > 0) & dense
    marks = np.where(held, cell_count, 0).astype(np.int64)
    bases = firsts_of(marks)
    cell = cells + np.repeat(bases[:-1], counts)
    if not held.all():
        cell = cell[np.repeat(held, counts)]
    seen = np.zeros(bases[-1], dtype=np.bool_)
    seen[cell] = True
    disjoint = held & (group_count(seen, marks) == counts)
    return GridProof(disjoint=disjoint, tiled=disjoint & (marks == counts))
