"""Tensors cut in chunks, right and wrong, and the oracle that paints their cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from shardbook.core.columns import Int64Array

Chunk = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Cut:
    """A tensor and its chunks, unpadded.

    Attributes:
        shape: Elements in each dimension.
        chunks: (offsets, sizes) of each chunk.
    """

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Painted:
    """What painting the cells of a tensor shows.

    Attributes:
        out_of_bounds: One flag a chunk.
        overlaps: Some cell is painted twice.
        has_hole: Some cell is not painted.
        volume_differs: The chunks' volumes do not add up to the tensor's.
    """

    out_of_bounds: tuple[bool, ...]
    overlaps: bool
    has_hole: bool
    volume_differs: bool


def paint(cut: Cut) -> Painted:
    """Returns the verdict of brute force; overlaps and holes are those inside the tensor."""
    canvas = np.zeros(cut.shape, dtype=np.int64)
    out = []
    for offsets, sizes in cut.chunks:
        canvas[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
        out.append(any(o + s > n for o, s, n in zip(offsets, sizes, cut.shape, strict=True)))
    volume = sum(math.prod(sizes) for _, sizes in cut.chunks)
    return Painted(tuple(out), bool((canvas > 1).any()), bool((canvas == 0).any()), volume != math.prod(cut.shape))


def arrays(cuts: Sequence[Cut]) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Returns padded (counts, shapes, offsets, sizes) of several tensors."""
    width = max([1, *(len(cut.shape) for cut in cuts)])
    chunks = [chunk for cut in cuts for chunk in cut.chunks]

    def matrix(rows: Sequence[Sequence[int]], fill: int) -> Int64Array:
        padded = [[*row, *[fill] * (width - len(row))] for row in rows]
        return np.array(padded, dtype=np.int64).reshape(-1, width)

    return (
        np.array([len(cut.chunks) for cut in cuts], dtype=np.int64),
        matrix([cut.shape for cut in cuts], 1),
        matrix([offsets for offsets, _ in chunks], 0),
        matrix([sizes for _, sizes in chunks], 1),
    )


@st.composite
def shapes(draw: st.DrawFn, *, max_ndim: int = 4) -> tuple[int, ...]:
    """Draws a shape of at most ``max_ndim`` dimensions: 0-dim and empty ones too, few cells in all."""
    ndim = draw(st.integers(0, max_ndim))
    longest = (0, 12, 8, 5, 4)[ndim]
    return tuple(draw(st.lists(st.integers(0, longest), min_size=ndim, max_size=ndim)))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Chunk, ...]:
    """Draws chunks that make the whole of ``shape``: even cuts, cuts that go through, or cuts at any place."""
    form = draw(st.sampled_from(["even", "through", "anywhere"]))
    if form == "anywhere":
        return tuple(_divided(draw, (0,) * len(shape), shape, draw(st.integers(0, 5))))
    axes = []
    for size in shape:
        if form == "even":
            step = draw(st.integers(1, max(size, 1)))
            bounds = [*range(0, size, step), size]
        else:
            bounds = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        axes.append([(low, high - low) for low, high in itertools.pairwise(bounds)] or [(0, 0)])
    chunks: list[Chunk] = [((), ())]
    for axis in axes:
        chunks = [((*o, low), (*s, size)) for o, s in chunks for low, size in axis]
    return tuple(chunks)


def _divided(draw: st.DrawFn, offsets: tuple[int, ...], sizes: tuple[int, ...], depth: int) -> list[Chunk]:
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    if depth == 0 or not dims or not draw(st.booleans()):
        return [(offsets, sizes)]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(1, sizes[dim] - 1))
    high = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
    return [
        *_divided(draw, offsets, (*sizes[:dim], at, *sizes[dim + 1 :]), depth - 1),
        *_divided(draw, high, (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]), depth - 1),
    ]


@st.composite
def cuts(draw: st.DrawFn, *, max_ndim: int = 4) -> Cut:
    """Draws a tensor whose chunks tile it, and as often as not were then damaged once or twice."""
    shape = draw(shapes(max_ndim=max_ndim))
    chunks = list(draw(tilings(shape)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        _damage(draw, shape, chunks)
    return Cut(shape, tuple(draw(st.permutations(chunks))))


def _damage(draw: st.DrawFn, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    kind = draw(st.sampled_from(["drop", "repeat", "resize", "move", "empty", "another"]))
    if kind in {"empty", "another"} or not chunks:
        offsets = tuple(draw(st.integers(0, size)) for size in shape)
        sizes = tuple(draw(st.integers(0, 3)) for _ in shape)
        chunks.append((offsets, (0, *sizes[1:]) if kind == "empty" and sizes else sizes))
        return
    at = draw(st.integers(0, len(chunks) - 1))
    offsets, sizes = chunks[at]
    if kind == "drop":
        del chunks[at]
    elif kind == "repeat" or not shape:
        chunks.append((offsets, sizes))
    else:
        dim, by = draw(st.integers(0, len(shape) - 1)), draw(st.sampled_from([-1, 1]))
        changed = list(sizes if kind == "resize" else offsets)
        changed[dim] = max(changed[dim] + by, 0)
        chunks[at] = (offsets, tuple(changed)) if kind == "resize" else (tuple(changed), sizes)
