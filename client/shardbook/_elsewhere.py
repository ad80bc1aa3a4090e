"""What readers do when a file is missing where they look first: they look where else the checkpoint is; no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, TypeVar

from shardbook.errors import NotFoundError
from shardbook.stores import encodable

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

#: How far down the causes of an error are looked at.
_CAUSES: Final = 10


def is_absent(error: BaseException | None) -> bool:
    """Returns True when a file that is not there is behind an error, whatever a reader made of it."""
    for _ in range(_CAUSES):
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return True
        if isinstance(error, NotFoundError) and error.reason == "NO_DATA_FILE":
            return True
        if error is None:
            return False
        error = error.__cause__ or error.__context__
    return False


def read_elsewhere(
    error: Exception,
    ref: str,
    places: Sequence[str],
    read: Callable[[str], T],
    *,
    tell_lost: Callable[[], object] = lambda: None,
    is_missed: Callable[[Exception], bool] = is_absent,
) -> T:
    """Returns what is read at the first of the other places of a checkpoint that has it.

    Args:
        error: What the first place lacks; raised when none has it: others may be stale copies.
        ref: The checkpoint, for people.
        places: Where it is, the place that failed first.
        read: Reads all that is wanted at a place.
        tell_lost: Called when no place has it.
        is_missed: Which errors of ``read`` mean that a file is not there.
    """
    for missing_in, place in pairwise(places):
        _LOG.warning(
            "%s lacks a data file in %s: reading from %s; `shardbook verify` looks at all of them",
            encodable(ref),
            encodable(missing_in),
            encodable(place),
        )
        try:
            return read(place)
        except Exception as another:
            if not is_missed(another):
                raise
    tell_lost()
    raise error


__all__ = ["is_absent", "read_elsewhere"]
