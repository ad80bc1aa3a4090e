"""Every private name of torch that Shardbook uses, in one place, so that a new torch release is checked here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

#: What a process group is taken to allow when it does not say, seconds.
_USUAL_GROUP_TIMEOUT_S: Final = 600.0

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


__all__ = [
    "CURRENT_DCP_VERSION",
    "FileSystem",
    "StorageInfo",
    "StoragePrefix",
    "group_timeout_s",
    "highest",
    "set_element",
    "silent_overwrite",
    "storage_reader_for",
    "storage_writer_for",
]
