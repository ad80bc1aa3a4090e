"""Whole attempts from one process: saves by DCP itself, imports, and what was saved while the service was away."""

from __future__ import annotations

from shardbook_server.service.blobs import BlobService, CheckedBlobs
from shardbook_server.service.commit import CommitService
from shardbook_server.service.types import RecordRequest
from shardbook_server.service.views import RecordAnswer
from shardbook_server.storage.database import Database


class RecordService:
    """Records attempts as a whole. Thread-safe."""

    def __init__(
        self, database: Database, blobs: BlobService, commits: CommitService, *, lease_ttl_s: float
    ) -> None: ...

    def record(self, request: RecordRequest, blobs: CheckedBlobs | None = None) -> RecordAnswer:
        """Stores registrations of an attempt and, with ``complete``, commits it. Idempotent.

        Raises:
            FailedPreconditionError: ``recovered``, and a later session holds a live commit of the step (reason
                ``STEP_SUPERSEDED``).
            AlreadyExistsError: The attempt is there with other content.
            ShardbookError: As for registrations and commits.
        """
        raise NotImplementedError
