"""Which of the chunks that several ranks wrote count.

DCP keeps one storage entry for each (fqn, offsets). So of equal chunks the lowest rank's counts, and an empty chunk
does not count where another chunk of its tensor begins at the same place. Two chunks with elements that begin at the
same place and are not equal both stay: they overlap, and are refused as that.
"""

from __future__ import annotations

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.geometry import is_empty
from shardbook.core.mixing import mix_rows


def counted(tensor: Int64Array, offsets: Int64Array, sizes: Int64Array) -> BoolArray:
    """Returns (N,) True for the chunks that count; all of them where no two of a tensor begin at the same place.

    Args:
        tensor: (N,) number of the tensor each chunk belongs to.
        offsets: (N, D) elements, padded.
        sizes: (N, D) elements, padded. Of chunks alike, the first row is the lowest rank's.
    """
    hashes = mix_rows(tensor, offsets)
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    out = np.ones(len(tensor), dtype=np.bool_)
    if len(repeated):
        suspects = np.flatnonzero(np.isin(hashes, repeated))
        out[suspects] = _counted_exactly(tensor[suspects], offsets[suspects], sizes[suspects])
    return out


def _counted_exactly(tensor: Int64Array, offsets: Int64Array, sizes: Int64Array) -> BoolArray:
    empty = is_empty(sizes)
    # Empty chunks are alike wherever they begin at the same place; they come after those with elements.
    sizes = np.where(empty[:, None], 0, sizes)
    order = np.lexsort((*sizes.T[::-1], empty, *offsets.T[::-1], tensor))
    tensor, offsets, sizes, empty = tensor[order], offsets[order], sizes[order], empty[order]
    same_place = (tensor[1:] == tensor[:-1]) & (offsets[1:] == offsets[:-1]).all(axis=1)
    out = np.ones(len(tensor), dtype=np.bool_)
    out[order[1:]] = ~(same_place & (empty[1:] | (sizes[1:] == sizes[:-1]).all(axis=1)))
    return out
