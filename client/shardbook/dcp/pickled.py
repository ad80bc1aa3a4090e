"""Reading DCP's own ``.metadata``: a pickle, read so that nothing in it can run.

Only the classes that DCP's metadata is made of are built. Whoever can write to a checkpoint directory could
otherwise run any program in every process that loads from it.
"""

from __future__ import annotations

import pickle
from typing import IO, Any, Final

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from shardbook.errors import FailedPreconditionError

_METADATA_CLASSES: Final = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
#: What may be named, besides torch's dtypes: classes that hold data, and a look-up of layouts by name.
_ALLOWED: Final = frozenset(
    {
        *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
        # Where releases before 2.3 kept it.
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
    }
)


class _MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's metadata and refuses everything else before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns an allowed class; called for every name in the pickle."""
        if module == "pathlib._local":  # where Python 3.13 says that paths are; others know no such module
            module = "pathlib"
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _unsafe(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Refuses objects that are said to be stored elsewhere: metadata has none."""
        raise _unsafe(f"it refers to {pid!r}")


def read_pickled_metadata(stream: IO[bytes]) -> Metadata:
    """Returns the metadata in a ``.metadata`` file.

    Raises:
        FailedPreconditionError: Reason ``UNSAFE_METADATA``: it holds something else than DCP's metadata.
    """
    try:
        metadata = _MetadataUnpickler(stream).load()
    except FailedPreconditionError:
        raise
    except Exception as error:  # what damaged pickles raise has no bound
        raise _unsafe(f"it is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise _unsafe(f"it holds a {type(metadata).__name__}")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def _unsafe(why: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f".metadata is not DCP's metadata alone: {why}. If you trust whoever wrote it as you trust your own programs, "
        "load with weights_only=False",
        reason="UNSAFE_METADATA",
    )
