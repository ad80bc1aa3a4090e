"""What a rank wants of a checkpoint: the boxes that its state dict holds, as a question."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor

from shardbook.core.ragged import within_group
from shardbook.core.wanted import Wanted, padded
from shardbook.dcp._torch import ShardedTensor, chunk_list, global_size, has_plain_part


@dataclass(frozen=True, eq=False)
class StateBoxes:
    """A flat state dict as a question.

    Attributes:
        wanted: One tensor for each value, in order, and one for each of ``others``.
        dtypes: The dtype of each value; None for those that are no tensors.
        box_numbers: Number of each wanted box among those of its own tensor, which DCP gives as a hint.
    """

    wanted: Wanted
    dtypes: tuple[torch.dtype | None, ...]
    box_numbers: tuple[int, ...]


def state_boxes(state_dict: Mapping[str, Any], others: Sequence[str] = ()) -> StateBoxes:
    """Returns the boxes that a flat state dict holds here.

    Args:
        state_dict: Tensors of any kind, and other values.
        others: Names of which only the specification is wanted.
    """
    shapes: list[Sequence[int]] = []
    dtypes: list[torch.dtype | None] = []
    boxes: list[Sequence[ChunkStorageMetadata]] = []
    cache: dict[Any, Sequence[ChunkStorageMetadata]] = {}
    for value in state_dict.values():
        shape, dtype, local = _boxes_of(value, cache)
        shapes.append(shape)
        dtypes.append(dtype)
        boxes.append(local)
    more = len(others)
    counts = np.array([*map(len, boxes), *(0,) * more], dtype=np.int64)
    ndims = np.array([*map(len, shapes), *(0,) * more], dtype=np.int64)
    width = max(1, int(ndims.max(initial=0)))
    every = list(itertools.chain.from_iterable(boxes))
    wanted = Wanted(
        fqns=(*state_dict, *others),
        ndims=ndims,
        stated=np.arange(len(ndims)) < len(shapes),
        shapes=padded([*shapes, *((),) * more], width, 1),
        whole=np.zeros(len(ndims), dtype=np.bool_),
        box_counts=counts,
        offsets=padded([box.offsets for box in every], width, 0),
        sizes=padded([box.sizes for box in every], width, 1),
    )
    return StateBoxes(wanted, tuple(dtypes), tuple(within_group(counts).tolist()))


def _boxes_of(
    value: Any, cache: dict[Any, Sequence[ChunkStorageMetadata]]
) -> tuple[Sequence[int], torch.dtype | None, Sequence[ChunkStorageMetadata]]:
    """Returns shape, dtype and local boxes of a value; what is no tensor has none of them."""
    if isinstance(value, DTensor):
        return value.shape, value.dtype, _boxes_of_dtensor(value, cache)
    if isinstance(value, torch.Tensor | ShardedTensor) or hasattr(value, "__create_chunk_list__"):
        return global_size(value), getattr(value, "dtype", None), chunk_list(value)
    return (), None, ()


def _boxes_of_dtensor(
    value: DTensor, cache: dict[Any, Sequence[ChunkStorageMetadata]]
) -> Sequence[ChunkStorageMetadata]:
    if value.device_mesh.get_coordinate() is None:
        return ()  # this rank is not part of its mesh
    if not has_plain_part(value):
        return chunk_list(value)
    # Many tensors of a model are alike, and torch takes long to say which part of one is here.
    key = (value.shape, id(value.device_mesh), value.placements)
    boxes = cache.get(key)
    if boxes is None:
        boxes = cache[key] = chunk_list(value)
    return boxes
