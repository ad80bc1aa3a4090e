"""Checkpoints that plain DCP wrote, as the catalogue records them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Final

from torch.distributed.checkpoint.metadata import Metadata

from shardbook.core.extents import encode_volatile
from shardbook.core.manifest import StoredBlob
from shardbook.core.structure import BlobKind, encode_plan, encode_structure
from shardbook.core.table import encode_table
from shardbook.dcp._torch import storage_reader_for
from shardbook.dcp.pickled import read_pickled_metadata
from shardbook.dcp.slices import MetadataSlice, slice_metadata
from shardbook.dcp.submission import extents_as_sent
from shardbook.errors import FailedPreconditionError
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


def content_of(metadata: Metadata) -> RecordedContent:
    """Returns what the catalogue records of a checkpoint: its metadata in slices that stand where ranks would.

    Raises:
        UnsupportedMetadataError: Something has no exact wire form; type and fqn are named.
        InvalidArgumentError: A limit of ``shardbook.core.limits`` is passed.
    """
    sliced = slice_metadata(metadata)
    return encode_slices(sliced.slices, sliced.header)


def encode_slices(slices: Iterable[MetadataSlice], header: bytes = b"") -> RecordedContent:
    """Returns registrations, one a slice, as the catalogue records them; a header for what belongs to the whole."""
    blobs: dict[tuple[BlobKind, bytes], StoredBlob] = {}
    digests, pairs = [], []
    for one in slices:
        table = encode_table(one.structure.plan.table)
        plan = encode_plan(one.structure.plan, table.digest)
        structure = encode_structure(one.structure, plan.digest)
        for kind, encoded in ((BlobKind.TABLE, table), (BlobKind.PLAN, plan), (BlobKind.STRUCTURE, structure)):
            blobs[kind, encoded.digest] = StoredBlob(kind, encoded.digest, encoded.payload)
        digests.append(structure.digest)
        pairs.append((extents_as_sent(one.extents), encode_volatile(one.requires_grad, one.pin_memory)))
    return RecordedContent(tuple(digests), tuple(pairs), tuple(blobs.values()), header)


__all__ = ["content_of", "encode_slices", "read_metadata"]
