"""Checkpoints that plain DCP wrote, as columns: where their bytes are, and what the catalogue records of them."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from shardbook.core.extents import encode_extents, encode_volatile
from shardbook.core.footprint import Footprint, rank_of_file
from shardbook.core.manifest import StoredBlob
from shardbook.core.structure import BlobKind, FileName, encode_plan, encode_structure
from shardbook.core.table import encode_table, printable
from shardbook.dcp._torch import storage_reader_for
from shardbook.dcp.pickled import read_pickled_metadata
from shardbook.dcp.slices import slice_metadata
from shardbook.errors import FailedPreconditionError, InvalidArgumentError
from shardbook.recording import RecordedContent

#: What DCP's loader says to do with metadata that is not DCP's alone; a command has an option for it.
_LOADING: Final = "load with weights_only=False"


def read_metadata(directory: str, content: bytes, *, trusted: bool) -> Metadata:
    """Returns the metadata in the ``.metadata`` of a directory.

    Args:
        directory: Path or URL.
        content: The file.
        trusted: Let torch unpickle it, whatever it runs.

    Raises:
        FailedPreconditionError: It holds something else than DCP's metadata (reason ``UNSAFE_METADATA``).
    """
    if trusted:
        metadata: Metadata = storage_reader_for(None, directory).read_metadata()
        return metadata
    try:
        return read_pickled_metadata(io.BytesIO(content))
    except FailedPreconditionError as error:
        raise FailedPreconditionError(error.message.replace(_LOADING, "pass --trusted"), reason=error.reason) from error


def footprint_of(metadata: Metadata) -> Footprint:
    """Returns where the bytes of a checkpoint are.

    Raises:
        FailedPreconditionError: Some of what it describes is nowhere (reason ``NO_STORAGE_DATA``), or in a file
            that is not below the checkpoint (``UNSAFE_METADATA``).
    """
    storage = _storage_of(metadata)
    fqns = tuple(metadata.state_dict_metadata)
    entries = {fqn: at for at, fqn in enumerate(fqns)}
    names: dict[str, int] = {}
    infos = list(storage.values())
    count = len(infos)
    number = np.fromiter((names.setdefault(info.relative_path, len(names)) for info in infos), np.int64, count)
    try:
        start = np.fromiter((info.offset for info in infos), np.int64, count)
        length = np.fromiter((info.length for info in infos), np.int64, count)
        entry = np.fromiter((entries[index.fqn] for index in storage), np.int64, count)
        for name in names:
            FileName(False, name)
    except (InvalidArgumentError, KeyError, OverflowError, TypeError, ValueError, AttributeError) as error:
        raise FailedPreconditionError(
            f".metadata names what cannot be in its storage data: {error!r}", reason="UNSAFE_METADATA"
        ) from error
    return Footprint.of(list(names), list(map(rank_of_file, names)), number, start, length, entry, fqns)


def _storage_of(metadata: Metadata) -> dict[MetadataIndex, Any]:
    """Returns the storage data, which has a place for every chunk."""
    storage: dict[MetadataIndex, Any] = getattr(metadata, "storage_data", None) or {}
    wanted = [
        MetadataIndex(fqn, chunk.offsets)
        for fqn, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    ]
    wanted += [
        MetadataIndex(fqn)
        for fqn, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata)
    ]
    nowhere = [index for index in wanted if index not in storage]
    if nowhere:
        raise FailedPreconditionError(
            f".metadata does not say where {len(nowhere)} of {len(wanted)} chunks are, the first one of "
            f"{printable(nowhere[0].fqn)}",
            reason="NO_STORAGE_DATA",
        )
    return storage


def world_size_of(metadata: Metadata) -> int:
    """Returns how many ranks saved, as far as the names of their files tell; 1 when they tell nothing."""
    storage: dict[MetadataIndex, Any] = getattr(metadata, "storage_data", None) or {}
    paths = {str(info.relative_path) for info in storage.values()}
    return 1 + max((rank for rank in map(rank_of_file, paths) if rank is not None), default=0)


def content_of(metadata: Metadata) -> RecordedContent:
    """Returns what the catalogue records of a checkpoint: its metadata in slices that stand where ranks would.

    Raises:
        UnsupportedMetadataError: Something has no exact wire form; type and fqn are named.
        InvalidArgumentError: A limit of ``shardbook.core.limits`` is passed.
    """
    sliced = slice_metadata(metadata)
    blobs: dict[tuple[BlobKind, bytes], StoredBlob] = {}
    digests, pairs = [], []
    for one in sliced.slices:
        table = encode_table(one.structure.plan.table)
        plan = encode_plan(one.structure.plan, table.digest)
        structure = encode_structure(one.structure, plan.digest)
        for kind, encoded in ((BlobKind.TABLE, table), (BlobKind.PLAN, plan), (BlobKind.STRUCTURE, structure)):
            blobs[kind, encoded.digest] = StoredBlob(kind, encoded.digest, encoded.payload)
        digests.append(structure.digest)
        pairs.append((encode_extents(one.extents), encode_volatile(one.requires_grad, one.pin_memory)))
    return RecordedContent(tuple(digests), tuple(pairs), tuple(blobs.values()), sliced.header)


__all__ = ["content_of", "footprint_of", "read_metadata", "world_size_of"]
