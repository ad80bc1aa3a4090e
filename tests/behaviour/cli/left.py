"""What killed saves leave in checkpoint directories, of any age."""

from __future__ import annotations

import os
import time
from pathlib import Path

from shardbook.collecting import Verdict, find_orphans
from shardbook.collecting.known import Known
from shardbook.core.manifest import AttemptIdentity
from tests.behaviour.client.directories import CheckpointDirectory, identity

WHO = b"1" * 16
DAY_S = 86_400.0
OLD_S = 30 * DAY_S
KILLED = identity(10)


def put(path: Path, content: bytes = b"data") -> Path:
    """Writes a file and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def killed(folder: Path, who: AttemptIdentity = KILLED, *, without: tuple[int, ...] = (1, 3)) -> Path:
    """A save whose ranks wrote data, and whose job was killed before some of them left a record."""
    for rank in range(who.world_size):
        put(folder / who.prefix / f"__{rank}_0.distcp")
    CheckpointDirectory(folder).add_records(who, without=without)
    return folder


def aged(folder: Path, age_s: float = OLD_S) -> Path:
    """Makes everything below old."""
    for found in folder.rglob("*"):
        os.utime(found, (time.time() - age_s,) * 2, follow_symlinks=False)
    return folder


def verdicts(folder: Path | str, known: Known | None = None) -> dict[str, Verdict]:
    """What is said of each attempt."""
    return {one.prefix: one.verdict for one in find_orphans([folder], known=known)}


def everything(folder: Path) -> dict[str, bytes]:
    """All files below, with their content."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
