"""The database: engines, transactions, and the driver's errors made ours."""

from __future__ import annotations


class Database:
    """One database, shared by every service of a process. Thread-safe."""

    def __init__(self, url: str, *, readers: int = 4) -> None: ...

    def close(self) -> None:
        """Closes every connection."""
