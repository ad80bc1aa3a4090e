"""DCP's read items and places of what a query found: made by C loops over columns, as in ``shardbook.dcp.metadata``."""

from __future__ import annotations

from itertools import repeat
from typing import Final

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from shardbook.core.columns import Int64Array
from shardbook.core.found import FoundChunks
from shardbook.core.wanted import widened
from shardbook.dcp._torch import StorageInfo
from shardbook.dcp.metadata import paused_gc, run, set_transforms, sizes_of
from shardbook.dcp.state_boxes import StateBoxes

_ZERO = torch.Size((0,))
#: As in ``shardbook.dcp.metadata``, so that items share the names of their attributes.
_FIRST: Final = ReadItem(LoadItemType.TENSOR, MetadataIndex(""), _ZERO, MetadataIndex(""), _ZERO, _ZERO)


def read_items(found: FoundChunks, boxes: StateBoxes) -> tuple[list[ReadItem], list[MetadataIndex]]:
    """Returns an item for each chunk that was found, and the key of its place: what DCP's planner would have made.

    Args:
        found: The answer to ``boxes.wanted``.
        boxes: The question.
    """
    fqns = list(map(found.wanted.fqns.__getitem__, found.tensor.tolist()))
    is_tensor = found.box >= 0
    with paused_gc():
        ndims = found.ndims[found.tensor]
        storage = _indexes(fqns, sizes_of(found.offsets, ndims), found.index.tolist())
        items = list(map(ReadItem.__new__, repeat(ReadItem, len(fqns))))
        put = object.__setattr__  # the class is frozen
        low, high, begin = _overlaps(found)
        run(map(put, items, repeat("type"), repeat(LoadItemType.TENSOR)))
        run(map(put, items, repeat("dest_index"), _destinations(found, boxes, fqns)))
        run(map(put, items, repeat("dest_offsets"), sizes_of(low - begin, ndims)))
        run(map(put, items, repeat("storage_index"), storage))
        run(map(put, items, repeat("storage_offsets"), sizes_of(low - found.offsets, ndims)))
        run(map(put, items, repeat("lengths"), sizes_of(high - low, ndims)))
        for row in np.flatnonzero(~is_tensor).tolist():
            index = storage[row] = MetadataIndex(fqns[row])
            items[row] = ReadItem(LoadItemType.BYTE_IO, MetadataIndex(fqns[row]), _ZERO, index, _ZERO, _ZERO)
    return items, storage


def places(found: FoundChunks, keys: list[MetadataIndex]) -> dict[MetadataIndex, StorageInfo]:
    """Returns where each chunk that was found lies."""
    with paused_gc():
        infos = list(map(StorageInfo.__new__, repeat(StorageInfo, len(keys))))
        run(map(setattr, infos, repeat("relative_path"), map(found.paths.__getitem__, found.file.tolist())))
        run(map(setattr, infos, repeat("offset"), found.start.tolist()))
        run(map(setattr, infos, repeat("length"), found.length.tolist()))
        set_transforms(infos, found)
        return dict(zip(keys, infos, strict=True))


def _overlaps(found: FoundChunks) -> tuple[Int64Array, Int64Array, Int64Array]:
    """(N, D) first and first-beyond element that chunk and box share, and where the box begins."""
    width = found.offsets.shape[1]
    if len(found.wanted.offsets):
        box = np.maximum(found.box, 0)
        begin = widened(found.wanted.offsets, width, 0)[box]
        end = begin + widened(found.wanted.sizes, width, 1)[box]
    else:
        begin, end = found.offsets, found.offsets + found.sizes
    return np.maximum(found.offsets, begin), np.minimum(found.offsets + found.sizes, end), begin


def _destinations(found: FoundChunks, boxes: StateBoxes, fqns: list[str]) -> list[MetadataIndex]:
    """(N,) where in the state dict each chunk belongs: one object for all chunks of a box."""
    is_boxed = found.box >= 0
    if is_boxed.all() and (np.diff(found.box) > 0).all():
        return _of_boxes(found, boxes, found.box, fqns)  # every box lies in one chunk, as where nothing is resharded
    used, which = np.unique(found.box[is_boxed], return_inverse=True)
    names = list(map(found.wanted.fqns.__getitem__, found.wanted.tensor_of_box[used].tolist()))
    made = iter(map(_of_boxes(found, boxes, used, names).__getitem__, which.tolist()))
    return [next(made) if boxed else MetadataIndex(fqn) for boxed, fqn in zip(is_boxed.tolist(), fqns, strict=True)]


def _of_boxes(found: FoundChunks, boxes: StateBoxes, box: Int64Array, fqns: list[str]) -> list[MetadataIndex]:
    """(M,) where in the state dict some wanted boxes are."""
    wanted = found.wanted
    offsets = sizes_of(wanted.offsets[box], wanted.ndims[wanted.tensor_of_box[box]])
    return _indexes(fqns, offsets, list(map(boxes.box_numbers.__getitem__, box.tolist())))


def _indexes(fqns: list[str], offsets: list[torch.Size], numbers: list[int]) -> list[MetadataIndex]:
    made = list(map(MetadataIndex.__new__, repeat(MetadataIndex, len(fqns))))
    put = object.__setattr__  # the class is frozen
    run(map(put, made, repeat("fqn"), fqns))
    run(map(put, made, repeat("index"), numbers))
    run(map(put, made, repeat("offset"), offsets))
    return made
