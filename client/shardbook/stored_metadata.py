"""The metadata of a checkpoint as the service keeps it. Apart from ``shardbook.catalog``, which needs no numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardbook.core.blocks import decode_blocks
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.extents import decode_segment
from shardbook.core.head import MetadataHeader, decode_head, decode_metadata_header, default_header
from shardbook.core.locate import Located, locate
from shardbook.core.pickled_metadata import pickled_metadata
from shardbook.v1 import types_pb2


@dataclass(frozen=True)
class StoredMetadata:
    """The metadata of a committed checkpoint as the service keeps it; ``shardbook.core`` decodes the payloads.

    Attributes:
        checkpoint: The checkpoint.
        head: Payload of ``shardbook.core.head``: file names by rank, key paths.
        metadata_header: Payload of ``shardbook.core.head``: storage meta and version; empty for the defaults.
        segments: (first rank, payload of ``shardbook.core.extents``), by rank.
        blocks: One payload of ``shardbook.core.blocks`` an entry, in state-dict order.
    """

    checkpoint: types_pb2.Checkpoint
    head: bytes
    metadata_header: bytes
    segments: tuple[tuple[int, bytes], ...]
    blocks: list[bytes]

    @property
    def locations(self) -> tuple[str, ...]:
        """Where the checkpoint is, in the order in which readers try them."""
        return self.checkpoint.location.location, *self.checkpoint.other_locations

    def columns(self) -> tuple[CheckpointStructure, Located]:
        """Returns entries and chunks, and where they lie."""
        head = decode_head(self.head)
        body = decode_blocks(self.blocks, head.rank_files)
        structure = replace(body, key_paths=head.key_paths, warnings=head.warnings)
        registrations = [pair for _, payload in sorted(self.segments) for pair in decode_segment(payload)]
        return structure, locate(structure, registrations)

    def header(self, directory: str) -> MetadataHeader:
        """Returns what belongs to the whole: as it was imported, else that of a save into ``directory``."""
        if self.metadata_header:
            return decode_metadata_header(self.metadata_header)
        return default_header(directory, self.checkpoint.location.prefix)

    def dcp_metadata(self, directory: str | None = None) -> Iterator[bytes]:
        """Returns the content of DCP's own ``.metadata`` in blocks of about a megabyte; needs no torch.

        Written into the checkpoint's directory, it is what plain ``torch.distributed.checkpoint`` loads from there.

        Args:
            directory: Path or URL of the checkpoint's directory; the location as the catalogue has it when None.

        Raises:
            UnsupportedMetadataError: The checkpoint has a memory format that DCP cannot pickle, or a dtype that this
                release does not know; before the first block.
        """
        place = self.checkpoint.location
        structure, located = self.columns()
        header = self.header(place.location if directory is None else directory)
        return pickled_metadata(structure, located, place.prefix, header)
