"""Names of the files that Shardbook keeps in a checkpoint directory, relative to it.

::

    .metadata                               DCP's own, for whoever knows only DCP
    .shardbook/manifest                     the newest attempt's manifest
    .shardbook/{prefix}/manifest            manifest of one attempt
    .shardbook/{prefix}/exported-{...}      mark by which its export is known again, see shardbook.core.exported
    .shardbook/{prefix}/unexported          the attempt wants no .metadata
    .shardbook/{prefix}/deleted             the attempt is being deleted: it counts no more, and these are its files
    .shardbook/{prefix}/rank-{rank}.record  registration record, until the manifest takes its place
    .shardbook/{prefix}/rank-{rank}.failed  why a rank gave up, for whoever waits for its record
    .shardbook/{prefix}/alone               the coordinator goes on without the service: nobody waits for a commit
    {prefix}/__{rank}_{n}.distcp            data files

A prefix is ``{incarnation[:12]}-a{attempt}``, see ``shardbook.core.names.prefix_of``.
"""

from __future__ import annotations

import re
from typing import Final

#: Directory of everything but the data and DCP's own file.
ROOT: Final = ".shardbook"
#: File that says which manifest counts.
MANIFEST: Final = f"{ROOT}/manifest"
#: Where earlier versions kept by what they knew their ``.metadata`` again; read, never written.
EXPORTED: Final = f"{ROOT}/exported"
#: Last component of the path of an attempt's manifest.
MANIFEST_NAME: Final = "manifest"
#: The same of the note that an attempt wants no ``.metadata``.
UNEXPORTED_NAME: Final = "unexported"
#: The same of the note that an attempt is being deleted.
DELETED_NAME: Final = "deleted"
#: DCP's own metadata file.
DCP_METADATA: Final = ".metadata"

_PREFIX = re.compile(r"[0-9a-f]{12}-a[1-9][0-9]{0,9}")
_RECORD = re.compile(r"rank-(0|[1-9][0-9]{0,9})\.record")


def attempt_path(prefix: str) -> str:
    """Returns the directory of an attempt's manifest and records."""
    return f"{ROOT}/{prefix}"


def manifest_path(prefix: str) -> str:
    """Returns the path of an attempt's manifest."""
    return f"{ROOT}/{prefix}/{MANIFEST_NAME}"


def mark_path(prefix: str, mark: str) -> str:
    """Returns the path of the mark of an attempt's export, see ``Fingerprint.mark``."""
    return f"{ROOT}/{prefix}/{mark}"


def unexported_path(prefix: str) -> str:
    """Returns the path of the note that an attempt wants no ``.metadata``."""
    return f"{ROOT}/{prefix}/{UNEXPORTED_NAME}"


def deleted_path(prefix: str) -> str:
    """Returns the path of the note that an attempt is being deleted."""
    return f"{ROOT}/{prefix}/{DELETED_NAME}"


def record_path(prefix: str, rank: int) -> str:
    """Returns the path of a rank's registration record."""
    return f"{ROOT}/{prefix}/rank-{rank}.record"


def failure_path(prefix: str, rank: int) -> str:
    """Returns the path of a rank's note that it gave up."""
    return f"{ROOT}/{prefix}/rank-{rank}.failed"


def alone_path(prefix: str) -> str:
    """Returns the path of the coordinator's note that it goes on without the service."""
    return f"{ROOT}/{prefix}/alone"


def is_prefix(name: str) -> bool:
    """Returns True when ``name`` may be an attempt's prefix."""
    return _PREFIX.fullmatch(name) is not None


def rank_of_record(name: str) -> int | None:
    """Returns the rank whose record a file is, by its last path component; None when it is no record."""
    match = _RECORD.fullmatch(name)
    return None if match is None else int(match[1])
