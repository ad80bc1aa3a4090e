"""Which release this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def release() -> str:
    """Returns the version of the installed distribution; ``unknown`` in a tree that nobody installed."""
    try:
        return version("shardbook")
    except PackageNotFoundError:
        return "unknown"


__all__ = ["release"]
