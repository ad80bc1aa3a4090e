"""A checkpoint directory that needs no service: records, manifests and DCP's own ``.metadata``.

Ranks leave records, the coordinator folds them into a manifest, and whoever loads reads the manifest, or folds the
records itself when nobody has yet. See ``shardbook.core.directory`` for the names of the files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from torch.distributed.checkpoint.metadata import StorageMeta

from shardbook import _attempts, _publishing
from shardbook._newest import incomplete_attempts, read_attempt
from shardbook.core import directory as names
from shardbook.core import limits
from shardbook.core.fold import FoldedAttempt
from shardbook.core.manifest import RegistrationRecord
from shardbook.dcp.headers import plain_storage_meta
from shardbook.dcp.writer import CheckpointFiles

_LOG = logging.getLogger(__name__)

#: Makes the content of ``.metadata`` of a folded attempt, in blocks.
MakeMetadata = Callable[[FoldedAttempt], Iterable[bytes]]

#: Pauses between two looks at the directory while records are awaited, seconds.
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0


def write_record(files: CheckpointFiles, record: RegistrationRecord) -> None:
    """Leaves a rank's registration record with the data, durably."""
    files.write(names.record_path(record.identity.prefix, record.rank), record.to_bytes())


def write_failure(files: CheckpointFiles, prefix: str, rank: int, reason: str) -> None:
    """Leaves word that a rank gave up, for a coordinator that waits for its record."""
    files.write(names.failure_path(prefix, rank), reason.encode("utf-8", "backslashreplace"))


def has_records(files: CheckpointFiles, prefix: str) -> bool:
    """Returns True when a rank has left its record already; a storage that cannot say now says no."""
    try:
        return any(names.rank_of_record(name) is not None for name in files.names(names.attempt_path(prefix)))
    except OSError as error:
        _LOG.warning("cannot look for records of other ranks: %s", error)
        return False


def go_alone(files: CheckpointFiles, prefix: str) -> None:
    """Leaves word that the coordinator goes on without the service; a failure to do so is no failure of the save."""
    try:
        files.write(names.alone_path(prefix), b"")
    except OSError as error:
        _LOG.warning("no word was left that the coordinator goes on alone: %s", error)


def is_alone(files: CheckpointFiles, prefix: str) -> bool:
    """Returns True when the coordinator went on without the service; a storage that cannot say now says no."""
    try:
        return files.exists(names.alone_path(prefix))
    except OSError as error:
        _LOG.warning("cannot look whether the coordinator is alone: %s", error)
        return False


def read_record(files: CheckpointFiles, prefix: str, rank: int) -> RegistrationRecord | None:
    """Returns a rank's record, None when it left none; raises CorruptManifestError when it is damaged."""
    content = files.read(names.record_path(prefix, rank))
    return None if content is None else RegistrationRecord.from_bytes(content)


def read_records(files: CheckpointFiles, prefix: str, world_size: int) -> list[RegistrationRecord]:
    """Returns the records that are there, by rank.

    Raises:
        CorruptManifestError: One is damaged.
        OSError: The storage failed.
    """
    return _attempts.read_records(files, prefix, range(world_size))


@dataclass(frozen=True)
class Absence:
    """Ranks without a record.

    Attributes:
        failed: Ranks that left word why they gave up.
        missing: Ranks that left nothing.
    """

    failed: Mapping[int, str]
    missing: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """True when every rank has left its record."""
        return not self.failed and not self.missing

    def __str__(self) -> str:
        told = [f"rank {rank} failed: {reason}" for rank, reason in self.failed.items()]
        if self.missing:
            shown = ", ".join(map(str, self.missing[: limits.MAX_NAMED_RANKS]))
            told.append(f"{len(self.missing)} ranks left no record: {shown}")
        return "; ".join(told)


def await_records(files: CheckpointFiles, prefix: str, world_size: int, timeout_s: float) -> Absence:
    """Waits until every rank has left its record, or one has left word that it gave up, or the time is over.

    A storage that cannot say now is asked again; when the time is over, what was not seen is missing.
    """
    end_s = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    missing, failed = set(range(world_size)), dict[int, str]()
    while True:
        try:
            missing, failed = _look_for_records(files, prefix, missing)
        except OSError as error:
            _LOG.warning("cannot look for records of other ranks, and look again: %s", error)
        if failed or not missing or time.monotonic() + pause_s > end_s:
            return Absence(failed, tuple(sorted(missing - failed.keys())))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _look_for_records(files: CheckpointFiles, prefix: str, missing: set[int]) -> tuple[set[int], dict[int, str]]:
    """Returns which of the ranks still lack a record, and those that left word why they will leave none."""
    there = set(files.names(names.attempt_path(prefix)))
    if there:
        missing = {rank for rank in missing if names.record_path("", rank).rpartition("/")[2] not in there}
    else:  # a filesystem that cannot list
        missing = {rank for rank in missing if not files.exists(names.record_path(prefix, rank))}
    failed = {
        rank: _failure(files, prefix, rank)
        for rank in sorted(missing)
        if names.failure_path("", rank).rpartition("/")[2] in there
    }
    return missing, failed


def _failure(files: CheckpointFiles, prefix: str, rank: int) -> str:
    content = files.read(names.failure_path(prefix, rank)) or b""
    return content.decode("utf-8", "replace")


def exporter(directory: str, prefix: str, storage_meta: Callable[[], StorageMeta | None]) -> MakeMetadata:
    """Returns what makes ``.metadata`` of a directory in which an attempt has just been saved.

    Args:
        directory: Path or URL, as the user gave it.
        prefix: The attempt's.
        storage_meta: Makes what the attempt's storage writer says of itself.
    """

    def export(folded: FoldedAttempt) -> Iterator[bytes]:
        header = folded.header(directory)
        if folded.manifest.identity.prefix == prefix:  # a newer one of somebody else's has its own id
            header = replace(header, storage_meta=plain_storage_meta(storage_meta()))
        return folded.dcp_metadata(header)

    return export


def publish(files: CheckpointFiles, folded: FoldedAttempt, metadata: MakeMetadata | None) -> tuple[str, ...]:
    """Makes a folded attempt what the directory means: manifest, ``.metadata``, and no records any more.

    An older attempt, such as that of a straggler, gets its own manifest, but does not replace a newer one. For one
    coordinator's own attempt, whose records nobody counts any more.

    Args:
        files: The directory.
        folded: The attempt.
        metadata: Makes the content of ``.metadata``; None leaves that file alone, and has others do so.

    Returns:
        What could not be written, for people; the checkpoint is whole without it.

    Raises:
        OSError: A manifest could not be written; the records, which say the same, stay.
    """
    identity = folded.manifest.identity
    if metadata is None:
        files.write(names.unexported_path(identity.prefix), b"")
    problems = _publishing.publish(files, folded, metadata)
    files.remove(names.record_path(identity.prefix, rank) for rank in range(identity.world_size))
    # The note that the coordinator is alone stays: ranks may still be waiting for a commit that it will not make.
    return problems


__all__ = [
    "Absence",
    "MakeMetadata",
    "await_records",
    "exporter",
    "go_alone",
    "has_records",
    "incomplete_attempts",
    "is_alone",
    "publish",
    "read_attempt",
    "read_record",
    "read_records",
    "write_failure",
    "write_record",
]
