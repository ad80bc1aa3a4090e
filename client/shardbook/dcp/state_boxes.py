"""What a rank wants of a checkpoint: the boxes that its state dict holds, as a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from shardbook.core.wanted import Wanted, padded
from shardbook.dcp._torch import ShardedTensor, chunk_list, has_plain_part

Box = tuple[Sequence[int], Sequence[int]]


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
    boxes: list[Sequence[Box]] = []
    cache: dict[Any, Sequence[Box]] = {}
    for value in state_dict.values():
        shape, dtype, local = _boxes_of(value, cache)
        shapes.append(shape)
        dtypes.append(dtype)
        boxes.append(local)
    counts = np.array([len(some) for some in boxes] + [0] * len(others), dtype=np.int64)
    ndims = np.array([len(shape) for shape in shapes] + [0] * len(others), dtype=np.int64)
    width = max(1, int(ndims.max(initial=0)))
    every = [box for some in boxes for box in some]
    wanted = Wanted(
        fqns=(*state_dict, *others),
        ndims=ndims,
        stated=np.arange(len(ndims)) < len(shapes),
        shapes=padded([*shapes, *((),) * len(others)], width, 1),
        whole=np.zeros(len(ndims), dtype=np.bool_),
        box_counts=counts,
        offsets=padded([offsets for offsets, _ in every], width, 0),
        sizes=padded([sizes for _, sizes in every], width, 1),
    )
    return StateBoxes(wanted, tuple(dtypes), tuple(number for some in boxes for number in range(len(some))))


def _boxes_of(value: Any, cache: dict[Any, Sequence[Box]]) -> tuple[Sequence[int], torch.dtype | None, Sequence[Box]]:
    """Returns shape, dtype and local boxes of a value; what is no tensor has none of them."""
    if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
        return value.shape, value.dtype, (((0,) * value.dim(), value.shape),)
    if isinstance(value, DTensor):
        return value.shape, value.dtype, _boxes_of_dtensor(value, cache)
    if isinstance(value, torch.Tensor | ShardedTensor) or hasattr(value, "__create_chunk_list__"):
        return tuple(value.size()), getattr(value, "dtype", None), _local_boxes(value)
    return (), None, ()


def _boxes_of_dtensor(value: DTensor, cache: dict[Any, Sequence[Box]]) -> Sequence[Box]:
    if value.device_mesh.get_coordinate() is None:
        return ()  # this rank is not part of its mesh
    if not has_plain_part(value):
        return _local_boxes(value)
    # Many tensors of a model are alike, and torch takes long to say which part of one is here.
    key = (value.shape, id(value.device_mesh), value.placements)
    boxes = cache.get(key)
    if boxes is None:
        boxes = cache[key] = _local_boxes(value)
    return boxes


def _local_boxes(value: Any) -> Sequence[Box]:
    return tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunk_list(value))
