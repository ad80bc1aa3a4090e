"""How many clients are connected to a listening address: gRPC does not say, the kernel does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ESTABLISHED: Final = "01"
_UNIX_CONNECTED: Final = "03"
_TABLES: Final = ("tcp", "tcp6")


def count_connections(address: str, folder: Path = Path("/proc/self/net")) -> int | None:
    """Returns how many connections this machine's end of ``address`` has; None where the kernel does not tell.

    Args:
        address: ``host:port`` or ``unix:/path`` that a server of this process listens on.
        folder: The kernel's tables.
    """
    try:
        if address.startswith("unix:"):
            path = address.removeprefix("unix:")
            return sum(_is_connected(row, path) for row in _rows(folder / "unix"))
        port = f":{int(address.rpartition(':')[2]):04X}"
        tables = [folder / name for name in _TABLES if (folder / name).exists()]
        if not tables:
            return None
        return sum(row[1].endswith(port) and row[3] == _ESTABLISHED for table in tables for row in _rows(table))
    except OSError:
        return None


def _rows(table: Path) -> Iterator[list[str]]:
    """Yields the fields of each row below the heading."""
    with table.open(encoding="utf-8", errors="replace") as lines:
        next(lines, None)
        for line in lines:
            yield line.split()


def _is_connected(row: list[str], path: str) -> bool:
    return len(row) >= 8 and row[5] == _UNIX_CONNECTED and row[7] == path
