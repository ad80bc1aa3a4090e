"""What batched writes share: storing the uploads of many calls, and finding the blobs that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from shardbook.core.names import RunName
from shardbook.errors import ShardbookError, UnavailableError
from shardbook_server.service.blobs import BlobService, CheckedBlob, CheckedBlobs
from shardbook_server.service.types import BlobRef
from shardbook_server.storage import blobs as blob_rows
from shardbook_server.storage.blobs import DAY_US, BlobRow
from shardbook_server.storage.database import Connection

E = TypeVar("E")
V = TypeVar("V")


def run_by_run_when_busy(
    entries: Sequence[E], run_of: Callable[[E], RunName], write: Callable[[Sequence[E]], list[V | ShardbookError]]
) -> list[V | ShardbookError]:
    """Writes a batch; where one of its runs is held for long, each run by itself, so that this one fails alone.

    Raises:
        ShardbookError: The whole batch failed for another reason.
    """
    runs = dict.fromkeys(run_of(entry) for entry in entries)
    try:
        return write(entries)
    except UnavailableError as error:
        if error.reason != "DATABASE_BUSY" or len(runs) < 2:
            raise
    verdicts: dict[int, V | ShardbookError] = {}
    for run in runs:
        places = [at for at, entry in enumerate(entries) if run_of(entry) == run]
        try:
            verdicts |= dict(zip(places, write([entries[at] for at in places]), strict=True))
        except UnavailableError as error:
            verdicts |= dict.fromkeys(places, error)
    return [verdicts[at] for at in range(len(entries))]


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
        self._touch(connection, now_us // DAY_US)

    def _touch(self, connection: Connection, today: int) -> None:
        """Remembers that blobs are in use, once a day: what is kept in memory of each says when that was last done."""
        stale = {key: row for key, row in self._rows.items() if row.last_used_day < today}
        if stale:
            blob_rows.touch(connection, [row.id for row in stale.values()], today * DAY_US)
            self._rows |= {key: replace(row, last_used_day=today) for key, row in stale.items()}

    def row(self, project: str, ref: BlobRef) -> BlobRow | None:
        """Returns a stored blob; None when its sender has to send it."""
        return self._rows.get((project, ref))

    def remember(self) -> None:
        """Keeps what was found and stored in memory; only after the transaction has committed."""
        for (project, _), row in self._rows.items():
            self._blobs.remember(project, [row])
