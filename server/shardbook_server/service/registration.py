"""What ranks wrote, and what they failed to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardbook.errors import ShardbookError
from shardbook_server.service.blobs import BlobService, CheckedBlobs
from shardbook_server.service.types import FailureReport, Registration
from shardbook_server.service.views import CheckpointState, RegistrationAnswer
from shardbook_server.storage.database import Database


@dataclass(frozen=True)
class RegistrationEntry:
    """One RegisterShards call in a batch: the registration and its uploads, checked."""

    registration: Registration
    blobs: CheckedBlobs = CheckedBlobs()


class RegistrationService:
    """Takes registrations and failures. Thread-safe."""

    def __init__(self, database: Database, blobs: BlobService, *, lease_ttl_s: float) -> None: ...

    def register_batch(self, entries: Sequence[RegistrationEntry]) -> list[RegistrationAnswer | ShardbookError]:
        """Stores registrations in one transaction; one verdict an entry, in order.

        Verdicts: SessionUnknownError, SessionFencedError, CheckpointClosedError, AlreadyExistsError (the rank
        registered other content before), InvalidArgumentError. The same content again is fine, also once the
        attempt is committed.

        Raises:
            ShardbookError: The whole batch failed (the database cannot be written); nothing was stored.
        """
        raise NotImplementedError

    def report_failure(self, report: FailureReport) -> CheckpointState:
        """Fails the attempt because of one rank; the first report counts. Returns where the checkpoint is now.

        Raises:
            SessionUnknownError, SessionFencedError, InvalidArgumentError: As for registrations.
        """
        raise NotImplementedError
