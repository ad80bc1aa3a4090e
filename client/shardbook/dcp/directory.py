"""A checkpoint directory that needs no service: records, manifests and DCP's own ``.metadata``.

Ranks leave records, the coordinator folds them into a manifest, and whoever loads reads the manifest, or folds the
records itself when nobody has yet. See ``shardbook.core.directory`` for the names of the files.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from torch.distributed.checkpoint.metadata import Metadata

from shardbook._attempts import is_newer
from shardbook.core import directory as names
from shardbook.core import limits
from shardbook.core.container import read_index, read_section
from shardbook.core.exported import TAIL_BYTES, Fingerprint, foreign_since, is_saved_over
from shardbook.core.fold import FoldedAttempt, fold, missing_ranks, unfold
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import CorruptManifestError, InvalidGeometryError, ShardbookError

_LOG = logging.getLogger(__name__)

#: Makes torch's metadata of a folded attempt.
MakeMetadata = Callable[[FoldedAttempt], Metadata]

#: Enough of a manifest's beginning to hold its index and the identity.
_HEAD_BYTES: Final = 1 << 16
#: Pauses between two looks at the directory while records are awaited, seconds.
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
#: How often a reader looks again when a coordinator folds records under its eyes.
_LOOKS: Final = 3


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
    """
    contents = files.read_many(names.record_path(prefix, rank) for rank in range(world_size))
    return [RegistrationRecord.from_bytes(content) for content in contents if content is not None]


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
    """Waits until every rank has left its record, or one has left word that it gave up, or the time is over."""
    end_s = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    missing = set(range(world_size))
    while True:
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
        if failed or not missing or time.monotonic() + pause_s > end_s:
            return Absence(failed, tuple(sorted(missing - failed.keys())))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _failure(files: CheckpointFiles, prefix: str, rank: int) -> str:
    content = files.read(names.failure_path(prefix, rank)) or b""
    return content.decode("utf-8", "replace")


def publish(
    files: CheckpointFiles, folded: FoldedAttempt, metadata: Callable[[FoldedAttempt], Metadata] | None
) -> tuple[str, ...]:
    """Makes a folded attempt what the directory means: manifest, ``.metadata``, and no records any more.

    An older attempt, such as that of a straggler, gets its own manifest, but does not replace a newer one.

    Args:
        files: The directory.
        folded: The attempt.
        metadata: Makes torch's metadata for ``.metadata``; None leaves that file alone.

    Returns:
        What could not be written, for people; the checkpoint is whole without it.
    """
    identity = folded.manifest.identity
    content = folded.manifest.to_bytes()
    files.write(names.manifest_path(identity.prefix), content)
    problems: list[str] = []
    newest = read_identity(files, names.MANIFEST)
    if newest is None or is_newer(identity, newest):
        files.write(names.MANIFEST, content)
        if metadata is not None:
            problems.extend(_export(files, folded, metadata))
    else:
        problems.append(f"{names.MANIFEST} belongs to a newer attempt, {newest.prefix}, and was left alone")
    files.remove(names.record_path(identity.prefix, rank) for rank in range(identity.world_size))
    # The note that the coordinator is alone stays: ranks may still be waiting for a commit that it will not make.
    return tuple(problems)


def _export(files: CheckpointFiles, folded: FoldedAttempt, metadata: Callable[[FoldedAttempt], Metadata]) -> list[str]:
    """Writes DCP's own file; its loss costs plain DCP the checkpoint, not Shardbook, so it fails no save."""
    try:
        exported = pickle.dumps(metadata(folded))
        files.write(names.EXPORTED, Fingerprint.of(len(exported), exported).to_bytes())
        files.write(names.DCP_METADATA, exported)
    except (OSError, RuntimeError, pickle.PicklingError, ShardbookError) as error:
        _LOG.exception("%s was not written: plain DCP cannot load this checkpoint", names.DCP_METADATA)
        return [f"{names.DCP_METADATA} was not written: {error}"]
    return []


def read_identity(files: CheckpointFiles, path: str) -> AttemptIdentity | None:
    """Returns whose manifest a file is, without reading it whole; None when it is not there or damaged."""
    head = files.read(path, _HEAD_BYTES)
    if head is None:
        return None
    try:
        return AttemptIdentity.from_json(read_section(head, read_index(head, "manifest")["identity"], "identity"))
    except (CorruptManifestError, KeyError):
        _LOG.warning("%s is damaged and is replaced", path)
        return None


def read_attempt(files: CheckpointFiles) -> FoldedAttempt | None:
    """Returns the newest whole attempt of a directory; None when Shardbook left none here, or DCP a newer save.

    That of the manifest, unless a newer one has left a complete set of records that nobody has folded yet.

    Raises:
        CorruptManifestError: What is there is damaged.
    """
    foreign_s = _foreign_since(files)
    for _ in range(_LOOKS):
        top = None if is_saved_over(foreign_s, files.facts(names.MANIFEST)) else files.read(names.MANIFEST)
        best = None if top is None else unfold(Manifest.from_bytes(top))
        prefixes = [one for one in _prefixes(files) if foreign_s is None or not _is_older(files, one, foreign_s)]
        for prefix in prefixes:
            one = _read_other(files, prefix, best)
            if one is not None and (best is None or is_newer(one.manifest.identity, best.manifest.identity)):
                best = one
        if best is not None or not prefixes:
            return best
        # A coordinator may have folded the records between two looks: then its manifest is there by now.
    return None


def _prefixes(files: CheckpointFiles) -> list[str]:
    return list(filter(names.is_prefix, files.names(names.ROOT)))


def _foreign_since(files: CheckpointFiles) -> float | None:
    """Returns when plain DCP saved into the directory, seconds since the epoch; None when it did not."""
    facts = files.facts(names.DCP_METADATA)
    if facts is None:
        return None
    size_bytes = facts.size_bytes
    return foreign_since(
        facts, lambda: files.tail(names.DCP_METADATA, size_bytes, TAIL_BYTES), files.read(names.EXPORTED)
    )


def _is_older(files: CheckpointFiles, prefix: str, foreign_s: float) -> bool:
    """Returns True when an attempt was written before plain DCP saved over it.

    A sync may have made its manifest long afterwards, so one older file is enough.
    """
    folder = names.attempt_path(prefix)
    records = [name for name in files.names(folder) if names.rank_of_record(name) is not None]
    paths = [names.manifest_path(prefix), prefix, *(f"{folder}/{name}" for name in records[:1])]
    return any(is_saved_over(foreign_s, files.facts(path)) for path in paths)


def _read_other(files: CheckpointFiles, prefix: str, best: FoldedAttempt | None) -> FoldedAttempt | None:
    """Reads an attempt that may be newer than the best one so far; None when it is not, or is not whole.

    A coordinator that was killed may have left its own manifest and not made it the directory's. Where there is
    another attempt that can be loaded, one that is damaged does not stand in its way.
    """
    if best is not None:
        if best.manifest.identity.prefix == prefix:
            return None
        identity = read_identity(files, names.manifest_path(prefix))
        if identity is not None and not is_newer(identity, best.manifest.identity):
            return None
    try:
        return _read_one(files, prefix)
    except CorruptManifestError as error:
        if best is None:
            raise
        _LOG.warning("attempt %s is damaged and passed over: %s", prefix, error)
        return None


def _read_one(files: CheckpointFiles, prefix: str) -> FoldedAttempt | None:
    """Reads one attempt, by its manifest or its records; None when it is not whole."""
    listed = files.names(names.attempt_path(prefix))
    content = files.read(names.manifest_path(prefix))
    if content is not None:
        return unfold(Manifest.from_bytes(content))
    ranks = [rank for rank in map(names.rank_of_record, listed) if rank is not None]
    if not ranks or names.manifest_path("").rpartition("/")[2] in listed:
        return None
    first = read_record(files, prefix, ranks[0])
    if first is None or len(ranks) < first.identity.world_size:
        return None
    records = read_records(files, prefix, first.identity.world_size)
    try:
        # Fewer than were listed: a coordinator folds them at this moment.
        return None if len(records) < len(ranks) or missing_ranks(records) else fold(records)
    except InvalidGeometryError as error:
        _LOG.warning("attempt %s is whole, but its chunks do not make whole tensors: %s", prefix, error)
        return None


def incomplete_attempts(files: CheckpointFiles) -> Mapping[str, int]:
    """Returns how many records each attempt without a manifest has left, for messages to people."""
    counts = {}
    for prefix in _prefixes(files):
        listed = files.names(names.attempt_path(prefix))
        if "manifest" not in listed:
            counts[prefix] = sum(names.rank_of_record(name) is not None for name in listed)
    return counts
