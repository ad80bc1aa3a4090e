"""How far attempts have come: numbers for pollers, names for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardbook_server.service.types import AttemptKey
from shardbook_server.service.views import AttemptCounts, Progress
from shardbook_server.storage.database import Database


class ProgressService:
    """Reads only. Thread-safe."""

    def __init__(self, database: Database) -> None: ...

    def counts(self, checkpoint_ids: Sequence[int]) -> Mapping[int, AttemptCounts]:
        """Returns the numbers of many attempts by two or three grouped statements; unknown ids are left out."""
        raise NotImplementedError

    def progress(self, key: AttemptKey) -> Progress:
        """Returns how far one attempt has come, with the ranks that are missing.

        Raises:
            NotFoundError: No rank of the attempt has spoken yet.
        """
        raise NotImplementedError
