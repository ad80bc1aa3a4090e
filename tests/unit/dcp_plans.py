"""The same items as torch's own save plans, so that DCP's planner can be asked what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from shardbook.core.table import EntryKind
from tests.unit.ranks import Item

_TYPES = {
    EntryKind.TENSOR: WriteItemType.TENSOR,
    EntryKind.SHARD: WriteItemType.SHARD,
    EntryKind.BYTES: WriteItemType.BYTE_IO,
}


def save_plan(items: Sequence[Item]) -> SavePlan:
    """Returns the plan that DCP's planner would make of a rank with ``items``."""
    return SavePlan([_write_item(item) for item in items if item.offsets is not None])


def _write_item(item: Item) -> WriteItem:
    if item.kind is EntryKind.BYTES:
        return WriteItem(MetadataIndex(item.fqn), WriteItemType.BYTE_IO)
    offsets, sizes = torch.Size(item.offsets or ()), torch.Size(item.sizes)
    properties = TensorProperties(dtype=getattr(torch, item.dtype))
    return WriteItem(
        MetadataIndex(item.fqn, offsets),
        _TYPES[item.kind],
        tensor_data=TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, torch.Size(item.shape)),
    )
