"""Where the bytes of a checkpoint by plain DCP are. Takes torch's own metadata and stand-ins for it alike; no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from shardbook.core.footprint import Footprint, rank_of_file
from shardbook.core.structure import FileName
from shardbook.core.table import printable
from shardbook.errors import FailedPreconditionError, InvalidArgumentError


def footprint_of(metadata: Any) -> Footprint:
    """Returns where the bytes of a checkpoint are.

    Args:
        metadata: DCP's ``Metadata``, or what has its attributes.

    Raises:
        FailedPreconditionError: Some of what it describes is nowhere (reason ``NO_STORAGE_DATA``), or in a file
            that is not below the checkpoint (``UNSAFE_METADATA``).
    """
    storage = {
        (index.fqn, getattr(index, "offset", None)): info
        for index, info in (getattr(metadata, "storage_data", None) or {}).items()
    }
    fqns = tuple(metadata.state_dict_metadata)
    _check_whole(metadata.state_dict_metadata, storage)
    entries = {fqn: at for at, fqn in enumerate(fqns)}
    names: dict[str, int] = {}
    infos = list(storage.values())
    count = len(infos)
    try:
        number = np.fromiter((names.setdefault(info.relative_path, len(names)) for info in infos), np.int64, count)
        start = np.fromiter((info.offset for info in infos), np.int64, count)
        length = np.fromiter((info.length for info in infos), np.int64, count)
        entry = np.fromiter((entries[fqn] for fqn, _ in storage), np.int64, count)
        for name in names:
            FileName(False, name)
    except (InvalidArgumentError, KeyError, OverflowError, TypeError, ValueError, AttributeError) as error:
        raise FailedPreconditionError(
            f".metadata names what cannot be in its storage data: {error!r:.200}", reason="UNSAFE_METADATA"
        ) from error
    return Footprint.of(list(names), list(map(rank_of_file, names)), number, start, length, entry, fqns)


def _check_whole(entries: Any, storage: dict[tuple[str, Any], Any]) -> None:
    """Refuses metadata that does not say where every chunk is."""
    wanted = [
        (fqn, offset)
        for fqn, entry in entries.items()
        for offset in ([chunk.offsets for chunk in entry.chunks] if hasattr(entry, "chunks") else [None])
    ]
    nowhere = [key for key in wanted if key not in storage]
    if nowhere:
        raise FailedPreconditionError(
            f".metadata does not say where {len(nowhere)} of {len(wanted)} chunks are, the first one of "
            f"{printable(nowhere[0][0])}",
            reason="NO_STORAGE_DATA",
        )


def world_size_of(footprint: Footprint) -> int:
    """Returns how many ranks saved, as far as the names of their files tell; 1 when they tell nothing."""
    return 1 + max(0, int(footprint.ranks.max(initial=0)))


__all__ = ["footprint_of", "world_size_of"]
