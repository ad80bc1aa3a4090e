"""Finds runs and checkpoints."""

from __future__ import annotations

from shardbook_server.service.views import CheckpointInfo, Page, RunInfo
from shardbook_server.storage.database import Database


class CatalogService:
    """Reads only. Thread-safe."""

    def __init__(self, database: Database) -> None: ...

    def get_run(self, name: str) -> RunInfo:
        """Returns one run; raises NotFoundError."""
        raise NotImplementedError

    def list_runs(self, parent: str, *, page_size: int = 0, page_token: str = "") -> Page[RunInfo]:
        """Returns one page of the runs of ``projects/{project}`` or ``projects/-``, by name."""
        raise NotImplementedError

    def get_checkpoint(self, name: str) -> CheckpointInfo:
        """Returns the checkpoint that a resource name or ref names; raises NotFoundError."""
        raise NotImplementedError

    def get_attempt(self, checkpoint_id: int) -> CheckpointInfo:
        """Returns the checkpoint with a key that another answer gave; raises NotFoundError."""
        raise NotImplementedError

    def list_checkpoints(
        self, parent: str, *, page_size: int = 0, page_token: str = "", show_all: bool = False
    ) -> Page[CheckpointInfo]:
        """Returns one page of a part's checkpoints, newest session and step first; ``parts/-`` means all parts.

        Args:
            parent: ``projects/{project}/runs/{run}/parts/{part}``.
            page_size: 50 when 0, at most 1,000.
            page_token: From the page before.
            show_all: List attempts that are open, failed, expired or superseded too.
        """
        raise NotImplementedError
