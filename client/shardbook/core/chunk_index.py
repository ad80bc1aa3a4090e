"""The chunks of some entries, decoded and indexed, so that a box finds the chunks it meets without looking at all.

Two indexes, both made once for all entries together:

- Chunks that are the cells of an even grid, as sharding makes them, need no search: the box says which cells it meets.
- Others are sorted by where they begin along the dimension that parts them most, in classes of like size, so that few
  of those that begin before the box can reach into it.

Columns are kept as narrow as their values allow, constant ones as a single value.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shardbook.core.checkpoint import BOX_COLUMNS, CHUNK_COLUMNS, ENTRY_COLUMNS, CheckpointStructure, chosen
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.grid import prove_even
from shardbook.core.ragged import firsts_of, group_reduce, rows_of, within_group
from shardbook.core.table import EntryKind
from shardbook.core.wanted import widened

Column = npt.NDArray[np.integer[Any]]
_WIDTHS = (np.uint8, np.uint16, np.uint32)
#: What rows of geometry are padded with.
_PADDING = {"shapes": 1, "offsets": 0, "sizes": 1}


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """Entries and their chunks. Immutable, so usable from several threads.

    Attributes:
        spec: The entries, and no chunk.
        counts: (T,) chunks of each entry.
        firsts: (T + 1,) first chunk of each entry, and N.
        offsets: D narrow columns of N, elements.
        sizes: D narrow columns of N, elements.
        columns: CHUNK_COLUMNS, narrow, as ``shardbook.core.checkpoint`` has them.
        cells: Entries whose chunks are the cells of a grid.
        slabs: The other ones.
        nbytes: Memory, about.
    """

    spec: CheckpointStructure
    counts: Int64Array
    firsts: Int64Array
    offsets: tuple[Column, ...]
    sizes: tuple[Column, ...]
    columns: dict[str, Column]
    cells: Cells
    slabs: Slabs
    nbytes: int

    @classmethod
    def of(cls, structure: CheckpointStructure) -> ChunkIndex:
        """Indexes the chunks of ``structure``; its memory is not kept."""
        counts = structure.chunk_counts
        cells = Cells.of(counts, structure.shapes, structure.offsets, structure.sizes)
        slabs = Slabs.of(~cells.tiled & (structure.kinds != EntryKind.BYTES), structure)
        offsets = tuple(narrow(column) for column in structure.offsets.T)
        sizes = tuple(narrow(column) for column in structure.sizes.T)
        columns = {name: narrow(getattr(structure, name)) for name in CHUNK_COLUMNS}
        kept = (*offsets, *sizes, *columns.values(), cells.rows, slabs.rows, slabs.keys, slabs.starts)
        entry_bytes = sum(len(fqn) + 200 + 24 * structure.shapes.shape[1] for fqn in structure.fqns)
        nbytes = entry_bytes + sum(column.nbytes for column in kept if column.strides != (0,))
        spec = without_chunks_of(np.ones(structure.entry_count, dtype=np.bool_), structure)
        return cls(spec, counts, structure.firsts, offsets, sizes, columns, cells, slabs, nbytes)

    def meet(self, entry: Int64Array, low: Int64Array, high: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Finds the chunks that share an element with each of M boxes.

        Args:
            entry: (M,) entry of each box, a tensor.
            low: (M, D) first element, padded with 0.
            high: (M, D) first element beyond, padded with 1.

        Returns:
            (K,) numbers of boxes, which climb, and (K,) chunks, which climb within a box.
        """
        width = len(self.offsets)
        low, high = widened(low, width, 0), widened(high, width, 1)
        held = (low < high).all(axis=1)
        tiled = self.cells.tiled[entry]
        in_cells = np.flatnonzero(held & tiled)
        in_slabs = np.flatnonzero(held & ~tiled)
        found = [np.zeros((2, 0), dtype=np.int64)]
        if len(in_cells):
            at, rows = self.cells.meet(entry[in_cells], low[in_cells], high[in_cells])
            found.append(np.stack([in_cells[at], rows + self.firsts[entry[in_cells][at]]]))
        if len(in_slabs):
            at, rows = self.slabs.meet(entry[in_slabs], low[in_slabs], high[in_slabs])
            meets = self._meets(rows, low[in_slabs][at], high[in_slabs][at])
            found.append(np.stack([in_slabs[at[meets]], rows[meets]]))
        box, row = np.concatenate(found, axis=1)
        if not ((np.diff(box) > 0) | ((np.diff(box) == 0) & (np.diff(row) > 0))).all():
            order = np.lexsort((row, box))
            box, row = box[order], row[order]
        return box, row

    def _meets(self, rows: Int64Array, low: Int64Array, high: Int64Array) -> BoolArray:
        meets = np.ones(len(rows), dtype=np.bool_)
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            begin = offset[rows].astype(np.int64)
            length = size[rows].astype(np.int64)
            meets &= (begin < high[:, dim]) & (begin + length > low[:, dim]) & (length > 0)
        return meets

    def structure_of(self, entry: Int64Array, at: Int64Array, rows: Int64Array) -> CheckpointStructure:
        """Returns some entries with some of their chunks, without names.

        Args:
            entry: (P,) entries.
            at: (K,) which of them each chunk is of; climbs.
            rows: (K,) chunks.
        """
        spec = self.spec

        def column(name: str) -> Int64Array:
            return self.columns[name][rows].astype(np.int64)

        return CheckpointStructure(
            fqns=("",) * len(entry),
            kinds=spec.kinds[entry],
            dtypes=spec.dtypes[entry],
            layouts=spec.layouts[entry],
            memory_formats=spec.memory_formats[entry],
            ndims=spec.ndims[entry],
            shapes=spec.shapes[entry],
            winner_entry=spec.winner_entry[entry],
            chunk_counts=np.bincount(at, minlength=len(entry)).astype(np.int64),
            offsets=_matrix(self.offsets, rows),
            sizes=_matrix(self.sizes, rows),
            owner=column("owner"),
            position=column("position"),
            file=column("file"),
            base=column("base"),
            var_lo=column("var_lo"),
            var_hi=column("var_hi"),
            length=column("length"),
            key_paths=None,
            rank_files=spec.rank_files,
        )


def _matrix(columns: tuple[Column, ...], rows: Int64Array) -> Int64Array:
    return np.stack([column[rows].astype(np.int64) for column in columns], axis=1)


@dataclass(frozen=True, eq=False)
class Cells:
    """Entries whose chunks are all the cells of an even grid, each once.

    Attributes:
        tiled: (T,) True for such entries.
        steps: (T, D) elements of a cell in each dimension; the last one may have fewer.
        parts: (T, D) cells in each dimension.
        rows: (N,) narrow: of such an entry, the number within the entry of the chunk that is cell 0, 1, ...
        firsts: (T + 1,) where the cells of each entry begin in ``rows``.
    """

    tiled: BoolArray
    steps: Int64Array
    parts: Int64Array
    rows: Column
    firsts: Int64Array

    @classmethod
    def of(cls, counts: Int64Array, shapes: Int64Array, offsets: Int64Array, sizes: Int64Array) -> Cells:
        """Finds the entries that are grids; arguments as for ``prove_even``."""
        tiled = prove_even(counts, shapes, offsets, sizes).tiled
        steps, parts = np.ones_like(shapes), np.ones_like(shapes)
        cell = np.zeros(len(offsets), dtype=np.int64)
        for dim in range(shapes.shape[1]):
            steps[:, dim] = np.where(tiled, np.maximum(group_reduce(np.maximum, sizes[:, dim], counts), 1), 1)
            parts[:, dim] = np.where(tiled, -(-shapes[:, dim] // steps[:, dim]), 1)
            cell *= np.repeat(parts[:, dim], counts)
            cell += offsets[:, dim] // np.repeat(steps[:, dim], counts)
        firsts = firsts_of(np.where(tiled, counts, 0))
        of_tiled = np.repeat(tiled, counts)
        rows = np.zeros(firsts[-1], dtype=np.int64)
        rows[(cell + np.repeat(firsts[:-1], counts))[of_tiled]] = within_group(counts)[of_tiled]
        return cls(tiled, steps, parts, narrow(rows), firsts)

    def meet(self, entry: Int64Array, low: Int64Array, high: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Returns (K,) numbers of boxes and (K,) numbers of chunks within their entries; boxes climb, none is empty."""
        steps, parts = self.steps[entry], self.parts[entry]
        first = low // steps
        spans = np.minimum(-(-high // steps), parts) - first
        totals = np.maximum(spans, 0).prod(axis=1)
        box = np.repeat(np.arange(len(entry), dtype=np.int64), totals)
        rest = within_group(totals)
        cell = np.zeros(len(box), dtype=np.int64)
        stride = np.ones(len(entry), dtype=np.int64)
        for dim in reversed(range(steps.shape[1])):
            if (parts[:, dim] > 1).any():
                rest, digit = np.divmod(rest, spans[box, dim])
                cell += (first[box, dim] + digit) * stride[box]
                stride *= parts[:, dim]
        return box, self.rows[self.firsts[entry][box] + cell].astype(np.int64)


@dataclass(frozen=True, eq=False)
class Slabs:
    """Chunks in any place, sorted by where they begin along one dimension of their entry.

    The chunks of an entry are in groups by the power of 2 that their size along it lies below: in a group a chunk that
    meets a box begins at most the group's largest size before it.

    Attributes:
        dims: (T,) the dimension of each entry.
        groups: (T + 1,) first group of each entry, and G.
        longest: (G,) largest size of a group's chunks along the dimension, elements.
        rows: (S,) narrow: chunks by (group, begin).
        keys: (S,) group * U + number of the begin among all begins; sorted.
        starts: (U,) distinct begins, sorted.
    """

    dims: Int64Array
    groups: Int64Array
    longest: Int64Array
    rows: Column
    keys: Column
    starts: Int64Array

    @classmethod
    def of(cls, included: BoolArray, structure: CheckpointStructure) -> Slabs:
        """Sorts the chunks of entries that are included; chunks without elements meet nothing and are left out."""
        counts, offsets, sizes = structure.chunk_counts, structure.offsets, structure.sizes
        entry = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        rows = np.flatnonzero(included[entry] & (sizes > 0).all(axis=1))
        dims = _parting_dims(structure)
        entry, dim = entry[rows], dims[entry[rows]]
        begin, size = offsets[rows, dim], sizes[rows, dim]
        level = np.frexp(size.astype(np.float64))[1].astype(np.int64)
        order = np.lexsort((begin, level, entry))
        rows, entry, begin, size, level = rows[order], entry[order], begin[order], size[order], level[order]
        is_first = np.ones(len(rows), dtype=np.bool_)
        is_first[1:] = (entry[1:] != entry[:-1]) | (level[1:] != level[:-1])
        group = np.cumsum(is_first) - 1
        firsts = np.flatnonzero(is_first)
        longest = np.maximum.reduceat(size, firsts) if len(firsts) else np.zeros(0, dtype=np.int64)
        groups = np.searchsorted(entry[firsts], np.arange(len(counts) + 1)).astype(np.int64)
        starts, number = np.unique(begin, return_inverse=True)
        keys = group * (len(starts) + 1) + number
        return cls(dims, groups, longest, narrow(rows), keys, starts)

    def meet(self, entry: Int64Array, low: Int64Array, high: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Returns (K,) numbers of boxes and (K,) chunks that may meet them: all that do, and few others."""
        group_counts = self.groups[entry + 1] - self.groups[entry]
        box = np.repeat(np.arange(len(entry), dtype=np.int64), group_counts)
        group = rows_of(self.groups[entry], group_counts)
        dim = self.dims[entry[box]]
        first = np.searchsorted(self.starts, low[box, dim] - self.longest[group], side="right")
        end = np.searchsorted(self.starts, high[box, dim], side="left")
        base = group * (len(self.starts) + 1)
        low_at, high_at = np.searchsorted(self.keys, base + first), np.searchsorted(self.keys, base + end)
        counts = np.maximum(high_at - low_at, 0)
        return np.repeat(box, counts), self.rows[rows_of(low_at, counts)].astype(np.int64)


def _parting_dims(structure: CheckpointStructure) -> Int64Array:
    """(T,) the dimension along which an entry is longest in terms of its chunks' mean size."""
    counts = structure.chunk_counts
    parting = np.zeros(structure.shapes.shape, dtype=np.float64)
    for dim in range(structure.shapes.shape[1]):
        total = group_reduce(np.add, structure.sizes[:, dim].astype(np.float64), counts)
        parting[:, dim] = structure.shapes[:, dim] * counts / np.maximum(total, 1.0)
    dims: Int64Array = np.argmax(parting, axis=1).astype(np.int64)
    return dims


def narrow(column: Int64Array) -> Column:
    """Returns a column with the same values in as little memory as they allow; read only.

    Values that are negative or beyond 32 bits stay as they are; one value throughout takes no memory at all.
    """
    if len(column) == 0:
        return column
    low, high = int(column.min()), int(column.max())
    if low == high:
        return np.broadcast_to(np.int64(low), column.shape)
    if low < 0:
        return column.copy()
    fits = (np.dtype(width) for width in _WIDTHS if high <= np.iinfo(width).max)
    return column.astype(next(iter(fits), np.dtype(np.int64)))


def without_chunks_of(entries: BoolArray, structure: CheckpointStructure) -> CheckpointStructure:
    """Returns the same structure without the chunks of the entries that are flagged, (T,)."""
    kept = np.repeat(~entries, structure.chunk_counts)
    return replace(
        structure,
        chunk_counts=np.where(entries, 0, structure.chunk_counts),
        **chosen(structure, (*BOX_COLUMNS, *CHUNK_COLUMNS), kept),
        key_paths=None,
    )


def joined(structures: Sequence[CheckpointStructure]) -> CheckpointStructure:
    """Returns the entries of several structures of one checkpoint, one after the other; there is at least one."""
    if len(structures) == 1:
        return structures[0]
    width = max(one.shapes.shape[1] for one in structures)

    def column(name: str) -> Any:
        columns = [getattr(one, name) for one in structures]
        if name in _PADDING:
            columns = [widened(one, width, _PADDING[name]) for one in columns]
        return np.concatenate(columns)

    return replace(
        structures[0],
        **{name: column(name) for name in (*ENTRY_COLUMNS, *BOX_COLUMNS, *CHUNK_COLUMNS)},
        fqns=tuple(itertools.chain.from_iterable(one.fqns for one in structures)),
    )
