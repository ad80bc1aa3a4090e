"""Every private name of torch that Shardbook uses, in one place, so that a new torch release is checked here."""

from __future__ import annotations

import contextlib
import logging
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensorBase
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.distributed.tensor import DTensor

#: What a process group is taken to allow when it does not say, seconds.
_USUAL_GROUP_TIMEOUT_S: Final = 600.0

#: What marks a local tensor as parts of a larger one; None before torch 2.14.
_CHECKPOINTABLE: Final[Any] = getattr(checkpoint, "CheckpointableTensor", None)

#: Returns the mesh and the placements of a DTensor, in one call.
mesh_and_placements: Final = operator.attrgetter("_spec.mesh", "_spec.placements")
StorageInfo = _StorageInfo
StoragePrefix = _StoragePrefix


def group_timeout_s(process_group: dist.ProcessGroup | None) -> float:
    """Returns how long ranks wait for each other in a collective of the group, seconds."""
    group = dist.distributed_c10d._get_default_group() if process_group is None else process_group  # noqa: SLF001
    for device in ("cpu", "cuda"):
        try:
            options: Any = group._get_backend(torch.device(device)).options  # noqa: SLF001
            return float(options._timeout.total_seconds())  # noqa: SLF001
        except (RuntimeError, AttributeError):
            continue
    return _USUAL_GROUP_TIMEOUT_S


def highest(value: int, process_group: dist.ProcessGroup | None) -> int:
    """Returns the highest of all ranks' values: a collective of one number, on the device that the group uses."""
    device = dist.distributed_c10d._get_object_coll_device(process_group)  # noqa: SLF001
    one = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(one, op=dist.ReduceOp.MAX, group=process_group)
    return int(one.item())


@contextlib.contextmanager
def silent_overwrite(storage_writer: Any) -> Iterator[None]:
    """Keeps a writer that may overwrite from warning that it will: an attempt's own directory overwrites nothing."""
    if getattr(storage_writer, "overwrite", False) and hasattr(storage_writer, "_metadata_exists"):
        storage_writer._metadata_exists = lambda: False  # noqa: SLF001 - shadows the method for this call
        try:
            yield
        finally:
            del storage_writer._metadata_exists  # noqa: SLF001
    else:
        yield


def storage_writer_for(storage_writer: StorageWriter | None, checkpoint_id: Any) -> Any:
    """Returns the writer, reset to ``checkpoint_id``; without one, the writer that DCP takes for the id."""
    return _storage_setup(storage_writer, checkpoint_id, reader=False)


def storage_reader_for(storage_reader: StorageReader | None, checkpoint_id: Any) -> Any:
    """Returns the reader, reset to ``checkpoint_id``; without one, the reader that DCP takes for the id."""
    return _storage_setup(storage_reader, checkpoint_id, reader=True)


def plain_fsspec(filesystem: Any) -> Any | None:
    """Returns the fsspec filesystem behind torch's own adapter; None where something else opens its files."""
    adapters = sys.modules.get("torch.distributed.checkpoint._fsspec_filesystem")  # who has one has imported it
    if adapters is None or "create_stream" in vars(filesystem):
        return None
    adapter = adapters.FileSystem
    is_plain = isinstance(filesystem, adapter) and type(filesystem).create_stream is adapter.create_stream
    return filesystem.fs if is_plain else None


def flat_names(state_dict: dict[str, Any]) -> set[str]:
    """Returns every name under which a planner may look for a value of a state dict: flat, as 2.3 had it, or plain."""
    names = set(state_dict)
    with contextlib.suppress(ValueError):  # two values of one flat name: the planner says so where it matters
        names |= flatten_state_dict(state_dict)[0].keys() | flattened_as_2_3(state_dict)[0].keys()
    return names


def has_plain_part(tensor: DTensor) -> bool:
    """Returns True when the part that this rank holds follows from shape, mesh and placements alone."""
    return type(tensor._local_tensor) is torch.Tensor  # noqa: SLF001


def global_size(tensor: Any) -> Sequence[int]:
    """Returns the shape that a tensor of any kind has in a checkpoint, elements."""
    # The protocol is looked up last: to ask it takes microseconds a tensor.
    if _CHECKPOINTABLE is not None and hasattr(tensor, "global_shape") and isinstance(tensor, _CHECKPOINTABLE):
        return tuple(cast("Any", tensor).global_shape)
    size: torch.Size = tensor.size()
    return size


def chunk_list(tensor: Any) -> list[ChunkStorageMetadata]:
    """Returns the parts of any kind of tensor that this rank holds."""
    chunks: list[ChunkStorageMetadata] = _create_chunk_list(tensor)
    return chunks


def flattened_as_2_3(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a state dict flattened as torch 2.3 and before did, and where each value is in it.

    Dicts and lists without a tensor were entries then, and are taken apart since.
    """
    _version._derived_version = "2_3"  # noqa: SLF001
    try:
        return flatten_state_dict(state_dict)
    finally:
        _version._derived_version = None  # noqa: SLF001


def dtensor_parts(tensor: DTensor) -> tuple[torch.Tensor, Any, bool]:
    """Returns what ``rebuild_dtensor`` makes a DTensor of again: its local tensor, its specification, requires_grad."""
    local: Any = tensor._local_tensor  # noqa: SLF001
    if isinstance(local, AsyncCollectiveTensor):
        local = local.trigger_wait()
    return local, tensor._spec, tensor.requires_grad  # noqa: SLF001


def rebuild_dtensor(local: torch.Tensor, spec: Any, requires_grad: bool) -> DTensor:
    """Returns a DTensor of its parts, in a process that needs no process group, on the device of its local tensor."""
    return DTensor(local, spec, requires_grad=requires_grad)


def rebuild_sharded_tensor(
    local_shards: list[Shard], metadata: ShardedTensorMetadata, sharding_spec: Any
) -> ShardedTensorBase:
    """Returns a ShardedTensor that can be saved but not computed with, for it has no process group."""
    return ShardedTensorBase._init_from_local_shards_and_global_metadata(  # noqa: SLF001
        local_shards, metadata, sharding_spec
    )


def storage_of(value: object) -> tuple[torch.UntypedStorage, torch.dtype] | None:
    """Returns the memory that a storage names, and as what; bytes where it has no type, as ``torch.save`` has it."""
    if isinstance(value, torch.storage.TypedStorage):
        return value._untyped_storage, value.dtype  # noqa: SLF001
    return (value, torch.uint8) if isinstance(value, torch.UntypedStorage) else None


def typed_storage(memory: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    """Returns what ``storage_of`` took apart."""
    return torch.storage.TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True)


def identity_of(memory: torch.UntypedStorage) -> int:
    """Returns what two names of one memory have in common while it lives."""
    return int(memory._cdata)  # noqa: SLF001


class UnresolvedMesh(logging.Filter):
    """Drops what a DeviceMesh says when it is unpickled where there is no process group, and nothing else."""

    #: Which logger says it.
    LOGGER: Final = "torch.distributed.device_mesh"

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns False for it."""
        return "unpickling of the DeviceMesh" not in str(record.msg)


__all__ = [
    "CURRENT_DCP_VERSION",
    "DTensor",
    "FileSystem",
    "ShardedTensor",
    "StorageInfo",
    "StoragePrefix",
    "UnresolvedMesh",
    "chunk_list",
    "dtensor_parts",
    "flat_names",
    "flattened_as_2_3",
    "global_size",
    "group_timeout_s",
    "has_plain_part",
    "highest",
    "identity_of",
    "mesh_and_placements",
    "plain_fsspec",
    "rebuild_dtensor",
    "rebuild_sharded_tensor",
    "set_element",
    "silent_overwrite",
    "storage_of",
    "storage_reader_for",
    "storage_writer_for",
    "typed_storage",
]
