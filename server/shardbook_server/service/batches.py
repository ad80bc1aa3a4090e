"""What batched writes share: storing the uploads of many calls, and finding the blobs that they name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardbook_server.service.blobs import BlobService, CheckedBlob, CheckedBlobs
from shardbook_server.service.types import BlobRef
from shardbook_server.storage.blobs import BlobRow
from shardbook_server.storage.database import Connection


@dataclass(frozen=True)
class Want:
    """What one call of a batch needs.

    Attributes:
        project: Name of its project.
        project_id: Key of its project.
        refs: Blobs that it names.
        checked: Its uploads.
    """

    project: str
    project_id: int
    refs: tuple[BlobRef, ...]
    checked: CheckedBlobs


class WantedBlobs:
    """Blobs that a batch named, as far as they are stored. For one transaction and what follows it."""

    def __init__(self, blobs: BlobService, connection: Connection, wants: Iterable[Want], now_us: int) -> None:
        """Stores all uploads, then looks up all names: two or three statements for a project."""
        self._blobs = blobs
        self._rows: dict[tuple[str, BlobRef], BlobRow] = {}
        uploads: dict[str, dict[BlobRef, CheckedBlob]] = {}
        refs: dict[str, dict[BlobRef, None]] = {}
        ids: dict[str, int] = {}
        for want in wants:
            ids[want.project] = want.project_id
            uploads.setdefault(want.project, {}).update({blob.ref: blob for blob in want.checked.blobs})
            refs.setdefault(want.project, {}).update(dict.fromkeys(want.refs))
        # In one order, whatever the batch: two replicas that store the same blobs must not deadlock.
        for project, project_id in sorted(ids.items(), key=lambda item: item[1]):
            blobs.store(connection, project, project_id, uploads[project].values(), now_us)
            found = blobs.find(connection, project, project_id, refs[project] | dict.fromkeys(uploads[project]))
            self._rows |= {(project, ref): row for ref, row in found.items()}

    def row(self, project: str, ref: BlobRef) -> BlobRow | None:
        """Returns a stored blob; None when its sender has to send it."""
        return self._rows.get((project, ref))

    def remember(self) -> None:
        """Keeps what was found and stored in memory; only after the transaction has committed."""
        for (project, _), row in self._rows.items():
            self._blobs.remember(project, [row])
