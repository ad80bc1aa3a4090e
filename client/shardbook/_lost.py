"""Telling the catalogue that data files of a checkpoint are lost, by whoever missed them; no torch."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from typing import Final

from shardbook._trees import open_tree
from shardbook.client import Client
from shardbook.core.names import CheckpointName
from shardbook.errors import NotFoundError
from shardbook.stores import Stores, normalized

_LOG = logging.getLogger(__name__)

#: What a reader that fails anyway spends on telling so, seconds.
_TELL_S: Final = 5.0


def tell_lost(client: Client, name: CheckpointName | str, locations: Sequence[str], stores: Stores) -> None:
    """Flags a checkpoint of which a reader found a file not to be there; best effort, and never raises.

    Nothing is told where the checkpoint's directory is not there either: on a host that lacks the volume nothing would
    be, and a flag turns ``latest`` away from the checkpoint for everybody. One that is in several places is flagged
    only by who could look at all of them.
    """
    try:
        directories = [stores.path_of(one) for one in locations]
        if any(map(_is_there, directories)) and all(map(is_within_reach, directories)):
            client.report_missing_data(name, missing=True, deadline_s=_TELL_S)
            _LOG.warning("%s lacks data files: flagged, `shardbook verify` looks at all of them", name)
    except Exception as error:  # noqa: BLE001 - the reader's own error counts
        _LOG.info("the catalogue was not told that %s lacks data files: %s", name, error)


def _is_there(directory: str) -> bool:
    try:
        return bool(open_tree(directory).names(directory))
    except NotFoundError:
        return False


def is_within_reach(directory: str) -> bool:
    """Returns True when the storage of a directory is there, whether or not the directory itself is.

    An empty mount point is what a volume looks like that is not mounted: so what lies beside the directory counts.
    """
    try:
        open_tree(directory)
    except NotFoundError:
        beside = posixpath.dirname(normalized(directory))
        try:
            return bool(open_tree(beside).names(beside))
        except NotFoundError:
            return False
    return True


__all__ = ["is_within_reach", "tell_lost"]
