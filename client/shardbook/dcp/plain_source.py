"""Questions about chunks that torch's own ``Metadata`` answers: of plain DCP checkpoints, and in torch's ``load``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shardbook.core.checkpoint import CheckpointStructure, RankFiles
from shardbook.core.chunk_index import ChunkIndex
from shardbook.core.columns import Int64Array
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.found import FoundChunks, merge
from shardbook.core.query import find, place
from shardbook.core.structure import FileName
from shardbook.core.table import EntryKind
from shardbook.core.wanted import Wanted, padded
from shardbook.dcp._names import dtype_code

#: A stand-in for where bytes lie, which ``Metadata.storage_data`` says.
_NOWHERE = RankFiles(((FileName(ranked=False, name="nowhere"),),), np.zeros(1, dtype=np.int64))


def query_metadata(metadata: Metadata, wanted: Wanted) -> FoundChunks:
    """Returns the chunks that meet the wanted boxes, without their places.

    Only entries that are asked for are looked at.

    Raises:
        UnsupportedMetadataError: An entry has a dtype that Shardbook does not know.
    """
    entries = metadata.state_dict_metadata
    held = [at for at, fqn in enumerate(wanted.fqns) if fqn in entries]
    if not held:
        return merge(wanted, [])
    names = [wanted.fqns[at] for at in held]
    index = ChunkIndex.of(_structure(names, [entries[fqn] for fqn in names]))
    hits = find(index, wanted, np.array(held, dtype=np.int64), np.arange(len(held), dtype=np.int64))
    nothing = encode_extents(Extents(np.zeros(index.firsts[-1], dtype=np.int64)))
    return merge(wanted, [place([hits], _NOWHERE, "", lambda _: [(nothing, b"")])])


def _structure(fqns: Sequence[str], entries: Sequence[Any]) -> CheckpointStructure:
    tensors = [entry if isinstance(entry, TensorStorageMetadata) else None for entry in entries]
    shapes = [() if one is None else tuple(one.size) for one in tensors]
    # What is no tensor has one chunk, of no dimensions.
    counts = np.array([1 if one is None else len(one.chunks) for one in tensors], dtype=np.int64)
    width = max([1, *map(len, shapes)])
    offsets = [((),) if one is None else [chunk.offsets for chunk in one.chunks] for one in tensors]
    sizes = [((),) if one is None else [chunk.sizes for chunk in one.chunks] for one in tensors]
    none = np.zeros(int(counts.sum()), dtype=np.int64)

    dtypes = [
        0 if one is None else dtype_code(one.properties.dtype, fqn) for fqn, one in zip(fqns, tensors, strict=True)
    ]
    unknown = np.zeros(len(fqns), dtype=np.uint8)  # nobody asks for layouts here
    return CheckpointStructure(
        fqns=tuple(fqns),
        kinds=np.array([EntryKind.BYTES if one is None else EntryKind.SHARD for one in tensors], dtype=np.uint8),
        dtypes=np.array(dtypes, dtype=np.uint8),
        layouts=unknown,
        memory_formats=unknown,
        ndims=np.array(list(map(len, shapes)), dtype=np.int64),
        shapes=padded(shapes, width, 1),
        winner_entry=np.zeros(len(fqns), dtype=np.int64),
        chunk_counts=counts,
        offsets=_flat(offsets, width, 0),
        sizes=_flat(sizes, width, 1),
        owner=none,
        position=none,
        file=none,
        base=none,
        var_lo=none,
        var_hi=none,
        length=none,
        key_paths=None,
        rank_files=_NOWHERE,
    )


def _flat(boxes: Sequence[Sequence[Sequence[int]]], width: int, fill: int) -> Int64Array:
    return padded(list(chain.from_iterable(boxes)), width, fill)
