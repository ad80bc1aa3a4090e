"""Where a session's checkpoints come from: told once, said with every save until one of them is committed.

It travels in the save's record and with its commit, so that neither an outage nor a save that never commits loses it;
the server records an origin once a session, whichever saves say it. Decision 0033.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable

from torch.distributed.checkpoint.metadata import Metadata

from shardbook.core import limits
from shardbook.core.lineage import LineageKind, Origin
from shardbook.core.names import CheckpointName
from shardbook.dcp.lazy import LazyMetadata
from shardbook.errors import InvalidArgumentError
from shardbook.sources import ManifestSource, ServiceSource
from shardbook.stores import encodable, normalized

_LOG = logging.getLogger(__name__)


class ToldOrigins:
    """What is still to be said. Thread-safe.

    Args:
        origins: What ``init`` was told.
    """

    def __init__(self, origins: Iterable[Origin] = ()) -> None:
        self._lock = threading.Lock()
        self._waiting = dict.fromkeys(origins)
        self._recorded: set[Origin] = set()

    @property
    def waiting(self) -> tuple[Origin, ...]:
        """What no committed checkpoint has said yet."""
        with self._lock:
            return tuple(self._waiting)

    def tell(self, origins: Iterable[Origin]) -> None:
        """Has the next saves say it; what is recorded already is not said again."""
        with self._lock:
            for origin in origins:
                if origin in self._recorded:
                    continue
                if len(self._waiting) >= limits.MAX_ORIGINS and origin not in self._waiting:
                    _LOG.warning("%s %s is not recorded: too many origins", origin.kind.words, origin.source)
                    continue
                self._waiting[origin] = None

    def name_resumed(self, told: str, name: str) -> None:
        """Says which checkpoint a ref meant that the job resumed from, once the server has said so."""
        if not told or not name:
            return
        before = Origin(LineageKind.RESUMED_FROM, told)
        with self._lock:
            if before in self._waiting:
                del self._waiting[before]
                self._waiting[Origin(LineageKind.RESUMED_FROM, name)] = None

    def note_recorded(self, origins: Iterable[Origin]) -> None:
        """Notes what a committed checkpoint has said."""
        with self._lock:
            for origin in origins:
                self._waiting.pop(origin, None)
                self._recorded.add(origin)


def origin_kind(text: str) -> LineageKind:
    """Returns the kind of origin that an argument names.

    Raises:
        InvalidArgumentError: It names none.
    """
    kind = LineageKind.parse(text, "lineage")
    if kind is LineageKind.EVALUATED_BY:
        raise InvalidArgumentError(
            "a job is resumed, fine-tuned or converted from what it loads; `shardbook lineage` records evaluations",
            field="lineage",
        )
    return kind


def tell_loaded(
    told: ToldOrigins, kind: LineageKind, metadata: Metadata, target: str | os.PathLike[str] | CheckpointName | None
) -> None:
    """Tells what was loaded as the origin of the saves to come. Never raises: the load is done."""
    try:
        told.tell([Origin(kind, _source(metadata, target))])
    except Exception as error:  # noqa: BLE001 - whatever it is, what was loaded is right
        _LOG.warning("what was loaded is not recorded as %s: %s", kind.words, encodable(str(error)))


def _source(metadata: Metadata, target: str | os.PathLike[str] | CheckpointName | None) -> str:
    """Returns the name of what was loaded: in the catalogue where it has one, else its path or URL."""
    if isinstance(metadata, LazyMetadata):
        if isinstance(metadata.source, ServiceSource):
            return metadata.source.found_name
        if isinstance(metadata.source, ManifestSource):
            return str(metadata.source.manifest.identity.checkpoint_name)
    if target is None or isinstance(target, CheckpointName):
        raise InvalidArgumentError("the reader does not say what it read", field="storage_reader")
    return normalized(target)


__all__ = ["ToldOrigins", "origin_kind", "tell_loaded"]
