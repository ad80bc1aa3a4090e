"""What people pass as a checkpoint: the name of one in the catalogue, or a directory or URL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from shardbook.core.names import CheckpointName, RunName, is_ref
from shardbook.errors import InvalidArgumentError, NotFoundError

#: What fetching the metadata of a whole checkpoint may take, seconds.
METADATA_S: Final = 300.0


def checkpoint_named(target: str | os.PathLike[str] | CheckpointName | None) -> CheckpointName | None:
    """Returns the checkpoint of the catalogue that ``target`` names; None for a path. What exists as a path is a path.

    Raises:
        NotFoundError: It names a run, and there is no such directory.
    """
    if isinstance(target, CheckpointName):
        return target
    if not isinstance(target, str) or target.startswith("/") or "://" in target:
        return None
    if is_ref(target) and not Path(target).exists():
        return CheckpointName.parse(target)
    if target.startswith("projects/") and "/checkpoints/" in target:
        return CheckpointName.parse(target)
    if not Path(target).exists() and _is_run(target):
        raise NotFoundError(
            f"{target} is no directory here; if it is a run, say which of its checkpoints: {target}@latest",
            field="checkpoint_id",
        )
    return None


def resource_name(checkpoint: CheckpointName | str) -> str:
    """Returns the name that the API has for a checkpoint, which may be given as a ref."""
    return str(checkpoint if isinstance(checkpoint, CheckpointName) else CheckpointName.parse(checkpoint))


def etag_of(etag: str | None) -> str:
    """Returns the etag that a request carries, which is empty for None: whatever it is like by now.

    Raises:
        InvalidArgumentError: It is empty, as listings have it, and would guard nothing.
    """
    if etag == "":
        raise InvalidArgumentError(
            "an empty etag guards nothing: listings leave it out, what is asked for by itself has one", field="etag"
        )
    return etag or ""


def _is_run(text: str) -> bool:
    try:
        return RunName.parse(text).ref == text
    except InvalidArgumentError:
        return False


__all__ = ["METADATA_S", "checkpoint_named", "etag_of", "resource_name"]
