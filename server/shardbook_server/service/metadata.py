"""What committed checkpoints hold, for loaders and for people."""

from __future__ import annotations

from collections.abc import Iterator

from shardbook_server.service.views import MetadataView, Page, TensorView
from shardbook_server.storage.database import Database


class MetadataService:
    """Reads committed checkpoints. Thread-safe."""

    def __init__(self, database: Database) -> None: ...

    def get_metadata(self, name: str, fqn_prefix: bytes = b"") -> Iterator[MetadataView]:
        """Yields the header, then extent segments by rank, then blocks in state-dict order.

        Items are at most about 1 MiB. Every step reads in a transaction of its own; none is open across a yield.
        Each ``next`` blocks on the database.

        Raises:
            NotFoundError: Nothing committed has this name.
            InvalidArgumentError: ``name`` is none.
        """
        raise NotImplementedError

    def list_tensors(
        self, parent: str, *, page_size: int = 0, page_token: str = "", fqn_prefix: bytes = b""
    ) -> Page[TensorView]:
        """Returns one page of entries in state-dict order, with the number of entries in all.

        Raises:
            NotFoundError: Nothing committed has this name.
            InvalidArgumentError: A page size or token is not valid.
        """
        raise NotImplementedError
