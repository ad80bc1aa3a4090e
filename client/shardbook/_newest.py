"""Which attempt of a checkpoint directory counts, for whoever reads the directory; no torch, no service."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from shardbook._attempts import (
    DirectoryFiles,
    FoundAttempt,
    find_attempts,
    list_attempts,
    newest_first,
    read_exported,
    read_identity,
)
from shardbook.core import directory as names
from shardbook.core.fold import FoldedAttempt
from shardbook.errors import CorruptManifestError, InvalidGeometryError

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)

#: How often a reader looks again when a coordinator folds records under its eyes, or the storage fails.
_LOOKS: Final = 3
_PAUSE_S: Final = 0.05


def read_attempt(files: DirectoryFiles) -> FoldedAttempt | None:
    """Returns the newest whole attempt of a directory as columns, see ``read_newest``."""
    return read_newest(files, FoundAttempt.whole)


def read_newest(files: DirectoryFiles, read: Callable[[FoundAttempt], _T | None]) -> _T | None:
    """Reads the newest whole attempt of a directory; None when Shardbook left none here, or DCP a newer save.

    That may be one whose complete set of records nobody has folded yet, or whose coordinator was killed before it
    made its manifest the directory's. Where another attempt can be loaded, one that is damaged does not stand in its
    way, unless it is the one that the directory says it means.

    Args:
        files: The directory.
        read: What to read of an attempt; None when it is not whole.

    Raises:
        CorruptManifestError: What is there is damaged.
        OSError: The storage failed, also when it was asked again.
    """
    for look in range(1, _LOOKS + 1):
        try:
            found, attempt_count = _newest_whole(files, read, is_last=look == _LOOKS)
        except (CorruptManifestError, OSError) as error:
            if look == _LOOKS:
                raise
            _LOG.info("cannot read what is in %s, and look again: %s", files.place, error)
            time.sleep(_PAUSE_S)
            continue
        if found is not None or not attempt_count:
            return found
        # A coordinator may have folded the records between two looks: then its manifest is there by now.
    return None


def _newest_whole(
    files: DirectoryFiles, read: Callable[[FoundAttempt], _T | None], *, is_last: bool
) -> tuple[_T | None, int]:
    """Looks once; returns the newest whole attempt, and how many there are, whole or not."""
    listed = list_attempts(files)
    foreign_s = read_exported(files, listed).foreign_s
    attempts = [one for one in find_attempts(files, listed) if foreign_s is None or not one.is_older_than(foreign_s)]
    top = read_identity(files, names.MANIFEST)
    failures: list[tuple[FoundAttempt, CorruptManifestError | OSError]] = []
    for one in newest_first(attempts):
        try:
            whole = read(one)
        except InvalidGeometryError as error:
            _LOG.warning("attempt %s is whole, but its chunks do not make whole tensors: %s", one.prefix, error)
        except (CorruptManifestError, OSError) as error:
            is_top = top is not None and top.prefix == one.prefix
            if is_top or (isinstance(error, OSError) and not is_last):
                raise
            failures.append((one, error))
        else:
            if whole is not None:
                for failed, why in failures:
                    _LOG.warning("attempt %s is damaged and passed over: %s", failed.prefix, why)
                return whole, len(attempts)
    if failures:
        raise failures[0][1]
    return None, len(attempts)


def incomplete_attempts(files: DirectoryFiles) -> Mapping[str, int]:
    """Returns how many records each attempt without a manifest has left, for messages to people."""
    return {
        prefix: sum(names.rank_of_record(name) is not None for name in listed)
        for prefix, listed in list_attempts(files).items()
        if not listed & {names.MANIFEST_NAME, names.DELETED_NAME}
    }


__all__ = ["incomplete_attempts", "read_attempt", "read_newest"]
