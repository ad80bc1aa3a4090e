"""What a query for chunks is and answers, for readers of every kind; no torch.

A reader asks with ``Wanted`` and gets ``CheckpointChunks``: for every tensor what the checkpoint has, and the chunks
that meet the wanted boxes, each with the file and range that holds its bytes. From the service it is one call,
``Client.query_chunks``; from a directory ``shardbook.manifests`` answers the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardbook.core.box import Box
from shardbook.core.found import FoundChunks
from shardbook.core.wanted import Wanted


@dataclass(frozen=True, eq=False)
class CheckpointChunks:
    """Chunks of one committed checkpoint. Immutable, so usable from several threads.

    Attributes:
        found: The entries and chunks, as columns; ``found.paths`` are relative to the checkpoint's directory.
        location: The directory: ``store:relative/path``, a path or URL as the catalogue has it; the path or URL
            itself when it was asked of a directory.
        prefix: Directory of the attempt's files below it, which ``found.paths`` begin with; empty for none.
        metadata_header: Payload of ``shardbook.core.head``: storage meta and version; empty for the defaults.
        head: Likewise: key paths of all entries; empty unless it was asked for.
        others: Further locations, in the order in which readers try them.
        name: Resource name of the attempt, so that further questions are about the same one; empty when it was asked
            of a directory.
    """

    found: FoundChunks
    location: str
    prefix: str = ""
    metadata_header: bytes = b""
    head: bytes = b""
    name: str = ""
    others: tuple[str, ...] = ()

    @property
    def locations(self) -> tuple[str, ...]:
        """Where the checkpoint is, in the order in which readers try them."""
        return self.location, *self.others


__all__ = ["Box", "CheckpointChunks", "FoundChunks", "Wanted"]
