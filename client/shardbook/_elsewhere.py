"""What readers do when a file is missing where they look first: they look where else the checkpoint is; no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shardbook.errors import NotFoundError
from shardbook.stores import encodable

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


@contextmanager
def suppress_absent() -> Iterator[None]:
    """Lets pass that a file is not there, and nothing else."""
    try:
        yield
    except Exception as error:
        if not is_absent(error):
            raise


def tell_elsewhere(ref: str, missing_in: str, now_in: str) -> None:
    """Says where a reader goes on, once it has missed a file."""
    _LOG.warning(
        "%s lacks a data file in %s: reading from %s; `shardbook verify` looks at all of them",
        encodable(ref),
        encodable(missing_in),
        encodable(now_in),
    )


__all__ = ["is_absent", "suppress_absent", "tell_elsewhere"]
