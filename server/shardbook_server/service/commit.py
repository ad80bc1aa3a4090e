"""Commit and abort of an attempt."""

from __future__ import annotations

from shardbook_server.service.blobs import BlobService
from shardbook_server.service.types import AttemptKey
from shardbook_server.service.views import CheckpointInfo
from shardbook_server.storage.database import Database


class CommitService:
    """Commits attempts in which every rank is there. Thread-safe.

    Unknown structures are assembled outside the transaction, one at a time in a process.
    """

    def __init__(self, database: Database, blobs: BlobService, *, lease_ttl_s: float) -> None: ...

    def commit(self, key: AttemptKey) -> CheckpointInfo:
        """Assembles, validates and commits; answers at once, ``RANKS_MISSING`` is for the caller to wait on.

        Committing again returns the same checkpoint.

        Raises:
            NotFoundError: No rank of the attempt has spoken yet.
            RanksMissingError: ``metadata`` has ``missing_count``, and ``ranks`` and ``hosts`` of the first 50.
            RankFailedError: A rank reported failure.
            InvalidGeometryError: The chunks do not make whole tensors; the checkpoint is FAILED now.
            CheckpointClosedError, SessionFencedError, SessionUnknownError, InvalidArgumentError: As for writes.
        """
        raise NotImplementedError

    def abort(self, key: AttemptKey, reason: str) -> CheckpointInfo:
        """Gives the attempt up: the checkpoint is FAILED. Aborting again returns the same checkpoint.

        Raises:
            NotFoundError: No rank of the attempt has spoken yet.
            CheckpointClosedError: It is committed.
            SessionFencedError, SessionUnknownError: As for writes.
        """
        raise NotImplementedError
