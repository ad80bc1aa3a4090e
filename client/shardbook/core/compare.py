"""How the tensors of two checkpoints differ: dtype, shape, and the boxes they are cut into. No I/O.

Free functions over columns: the cost of a comparison is a sort of the boxes that are not equal as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.ragged import firsts_of, rows_of
from shardbook.core.table import EntryKind, UInt8Array


@dataclass(frozen=True, eq=False)
class Geometry:
    """What entries are: T of them, N chunks, padded to D dimensions as in ``shardbook.core.checkpoint``.

    Attributes:
        fqns: (T,) names.
        is_tensor: (T,) False for bytes entries.
        dtypes: (T,) codes, 0 for bytes entries.
        ndims: (T,) dimensions.
        shapes: (T, D) elements.
        chunk_counts: (T,) chunks of each entry.
        offsets: (N, D) elements, entry by entry.
        sizes: (N, D) elements.
    """

    fqns: tuple[str, ...]
    is_tensor: BoolArray
    dtypes: UInt8Array
    ndims: Int64Array
    shapes: Int64Array
    chunk_counts: Int64Array
    offsets: Int64Array
    sizes: Int64Array

    @classmethod
    def of(cls, structure: CheckpointStructure) -> Geometry:
        """Returns what the entries of a checkpoint are."""
        return cls(
            fqns=structure.fqns,
            is_tensor=structure.kinds != EntryKind.BYTES,
            dtypes=structure.dtypes,
            ndims=structure.ndims,
            shapes=structure.shapes,
            chunk_counts=structure.chunk_counts,
            offsets=structure.offsets,
            sizes=structure.sizes,
        )

    def padded(self, width: int) -> Geometry:
        """Returns it with at least ``width`` dimensions of padding."""
        more = width - self.shapes.shape[1]
        if more <= 0:
            return self
        pad = ((0, 0), (0, more))
        return Geometry(
            fqns=self.fqns,
            is_tensor=self.is_tensor,
            dtypes=self.dtypes,
            ndims=self.ndims,
            shapes=np.pad(self.shapes, pad, constant_values=1),
            chunk_counts=self.chunk_counts,
            offsets=np.pad(self.offsets, pad, constant_values=0),
            sizes=np.pad(self.sizes, pad, constant_values=1),
        )


@dataclass(frozen=True, eq=False)
class Differences:
    """What differs, of P pairs of entries.

    Attributes:
        kind: (P,) one is a tensor and the other is not.
        dtype: (P,) both are tensors, of unlike dtypes.
        shape: (P,) both are tensors, of unlike shapes.
        sharding: (P,) both are tensors of one shape, cut into other boxes.
    """

    kind: BoolArray
    dtype: BoolArray
    shape: BoolArray
    sharding: BoolArray

    @property
    def any(self) -> BoolArray:
        """(P,) something does."""
        return self.kind | self.dtype | self.shape | self.sharding


def differences(one: Geometry, other: Geometry, ones: Int64Array, others: Int64Array) -> Differences:
    """Returns what differs between entries ``ones`` of one checkpoint and ``others`` of another, pair by pair.

    Who wrote a box, in which file and where, is no difference; nor is the order of boxes.
    """
    width = max(one.shapes.shape[1], other.shapes.shape[1])
    one, other = one.padded(width), other.padded(width)
    kind = one.is_tensor[ones] != other.is_tensor[others]
    tensors = one.is_tensor[ones] & other.is_tensor[others]
    dtype = tensors & (one.dtypes[ones] != other.dtypes[others])
    shape = tensors & (
        (one.ndims[ones] != other.ndims[others]) | (one.shapes[ones] != other.shapes[others]).any(axis=1)
    )
    counts = one.chunk_counts[ones]
    sharding = tensors & ~shape & (counts != other.chunk_counts[others])
    alike = np.flatnonzero(tensors & ~shape & ~sharding)
    sharding[alike[_boxes_differ(one, other, ones[alike], others[alike])]] = True
    return Differences(kind, dtype, shape, sharding)


def _boxes_differ(one: Geometry, other: Geometry, ones: Int64Array, others: Int64Array) -> BoolArray:
    """(P,) whether entries that have equal counts of boxes have other boxes."""
    counts = one.chunk_counts[ones]
    pair = np.repeat(np.arange(len(ones)), counts)
    left, right = _boxes(one, ones), _boxes(other, others)
    unlike = np.zeros(len(ones), dtype=np.bool_)
    unlike[pair[(left != right).any(axis=1)]] = True
    # Ranks may have come in another order: then the boxes are the same once they are sorted.
    rows = np.flatnonzero(unlike[pair])
    left, right, pair = left[rows], right[rows], pair[rows]
    moved = (left[_order(left, pair)] != right[_order(right, pair)]).any(axis=1)
    differ = np.zeros(len(ones), dtype=np.bool_)
    differ[pair[moved]] = True
    return differ


def _boxes(geometry: Geometry, entries: Int64Array) -> Int64Array:
    """(M, 2 D) offsets and sizes of the entries' chunks."""
    firsts = firsts_of(geometry.chunk_counts)[:-1]
    rows = rows_of(firsts[entries], geometry.chunk_counts[entries])
    return np.concatenate([geometry.offsets[rows], geometry.sizes[rows]], axis=1)


def _order(boxes: Int64Array, pair: Int64Array) -> Int64Array:
    """(M,) rows by pair, and within one by box; the pairs climb already."""
    order: Int64Array = np.lexsort((*boxes.T[::-1], pair))
    return order


__all__ = ["Differences", "Geometry", "differences"]
