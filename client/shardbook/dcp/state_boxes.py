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

from shardbook.core.ragged import firsts_of, rows_of, within_group
from shardbook.core.wanted import Wanted, padded
from shardbook.dcp._torch import ShardedTensor, chunk_list, global_size, has_plain_part, mesh_and_placements


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
    forms = _Forms()
    numbers = np.array([*map(forms.number_of, state_dict.values()), *(0,) * len(others)], dtype=np.int64)
    width = max(1, *map(len, forms.shapes))
    ndims = np.fromiter(map(len, forms.shapes), np.int64, len(forms.shapes))
    counts = np.fromiter(map(len, forms.boxes), np.int64, len(forms.boxes))
    every = list(itertools.chain.from_iterable(forms.boxes))
    box_counts = counts[numbers]
    rows = rows_of(firsts_of(counts)[numbers], box_counts)
    wanted = Wanted(
        fqns=(*state_dict, *others),
        ndims=ndims[numbers],
        stated=np.arange(len(numbers)) < len(state_dict),
        shapes=padded(forms.shapes, width, 1)[numbers],
        whole=np.zeros(len(numbers), dtype=np.bool_),
        box_counts=box_counts,
        offsets=padded([box.offsets for box in every], width, 0)[rows],
        sizes=padded([box.sizes for box in every], width, 1)[rows],
    )
    return StateBoxes(wanted, tuple(map(_dtype_of, state_dict.values())), tuple(within_group(box_counts).tolist()))


class _Forms:
    """Distinct pairs of shape and local boxes: many tensors of a model are alike. Number 0 is of what is no tensor.

    Attributes:
        shapes: Of each.
        boxes: Of each.
    """

    def __init__(self) -> None:
        self.shapes: list[Sequence[int]] = [()]
        self.boxes: list[Sequence[ChunkStorageMetadata]] = [()]
        self._of_dtensors: dict[Any, int] = {}

    def number_of(self, value: Any) -> int:
        """Returns the form of a value, which lives as long as this does."""
        if isinstance(value, DTensor):
            mesh, placements = mesh_and_placements(value)
            # torch takes long to say which part of one is here.
            key = value.shape, id(mesh), placements
            number = self._of_dtensors.get(key)
            if number is None or not has_plain_part(value):
                # No box where this rank is not part of its mesh.
                boxes = chunk_list(value) if mesh.get_coordinate() is not None else ()
                number = self._add(value.shape, boxes)
                if has_plain_part(value):
                    self._of_dtensors[key] = number
            return number
        if _is_tensor(value):
            return self._add(global_size(value), chunk_list(value))
        return 0

    def _add(self, shape: Sequence[int], boxes: Sequence[ChunkStorageMetadata]) -> int:
        self.shapes.append(shape)
        self.boxes.append(boxes)
        return len(self.boxes) - 1


def _dtype_of(value: Any) -> torch.dtype | None:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return getattr(value, "dtype", None) if _is_tensor(value) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor | ShardedTensor) or hasattr(value, "__create_chunk_list__")
