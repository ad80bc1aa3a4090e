"""Content-addressed blobs as they come in: decoded, checked, their digests computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardbook_server.service.types import BlobRef, BlobUpload
from shardbook_server.storage.database import Database


@dataclass(frozen=True)
class CheckedBlobs:
    """Uploads of one call that were verified, made by ``BlobService.check`` only.

    Attributes:
        refs: What may be stored.
        lacking: What a sender has to send besides: references that are neither here nor stored, and the uploads
            that refer to them (they could not be checked, so they have to come again).
    """

    refs: tuple[BlobRef, ...] = ()
    lacking: tuple[BlobRef, ...] = ()


class BlobService:
    """Checks and stores blobs, and keeps decoded ones in a bounded cache. Thread-safe."""

    def __init__(self, database: Database, *, cache_bytes: int) -> None: ...

    def check(self, project: str, uploads: Sequence[BlobUpload]) -> CheckedBlobs:
        """Decodes uploads, proves that they are canonical, computes their digests. CPU work, at most one short read.

        Done outside the writers' batches. A call without uploads needs no check: give ``CheckedBlobs()``.

        Raises:
            InvalidArgumentError: A payload is damaged, not canonical or beyond a limit; the field is
                ``blobs[i].payload``.
        """
        raise NotImplementedError
