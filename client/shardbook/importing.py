"""Records checkpoints in a run that they were not saved into: by plain DCP, or under another catalogue.

What a directory means is recorded, as a load by its path would find it: one checkpoint. One that Shardbook saved into
the very same run, part and step keeps its session and attempt, as ``sync`` has it. Numbers of sessions mean nothing in
another run, so everything else is recorded as an offline save is: session 0, which moves ``latest`` as long as the
run has no session of its own. Decision 0025.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from shardbook._attempts import TreeFiles
from shardbook._described import needs_torch, read_directory, told_as_ours
from shardbook._plain import footprint_of, world_size_of
from shardbook._steps import step_of
from shardbook._trees import open_tree
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.client import Client
from shardbook.core.description import (
    check_labels,
    check_metrics,
    encode_note,
    origins_in,
    pack_said,
    unpack_said,
)
from shardbook.core.directory import DCP_METADATA
from shardbook.core.fold import FoldedAttempt
from shardbook.core.lineage import LineageKind, Origin, check_end
from shardbook.core.names import DEFAULT_PART, CheckpointId, CheckpointName, PartName, RunName
from shardbook.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ShardbookError,
    UnauthenticatedError,
    UnavailableError,
)
from shardbook.recording import RecordedContent, attempt_key, record_content
from shardbook.stores import Stores, check_location, encodable, normalized
from shardbook.v1.types_pb2 import AttemptKey, AttemptLocation

#: What incarnations of directories by plain DCP are made of, with their location.
_NAMESPACE: Final = uuid.UUID("5b0c9d5e-3c1f-4a7d-9a57-0f6f5a4c1d25")
#: Errors after which no further directory needs to be tried.
_STOPS: Final = (UnavailableError, DeadlineExceededError, UnauthenticatedError, PermissionDeniedError)


class ImportOutcome(StrEnum):
    """What became of one directory."""

    #: The catalogue lacked it and has it now.
    RECORDED = "recorded"
    #: The catalogue has it, with the same content.
    PRESENT = "present"
    #: A dry run: the catalogue lacks it.
    PLANNED = "planned"
    #: A session of the run holds the step, and this would change nothing.
    SUPERSEDED = "superseded"
    #: It cannot be recorded; ``reason`` says why.
    REFUSED = "refused"


#: Outcomes that leave nothing to do.
_SETTLED: Final = frozenset({ImportOutcome.RECORDED, ImportOutcome.PRESENT, ImportOutcome.PLANNED})


@dataclass(frozen=True)
class ImportedCheckpoint:
    """One directory, and what became of it.

    Attributes:
        directory: Path or URL.
        outcome: What became of it.
        source: `manifest` for a save by Shardbook, `dcp` for one by plain DCP; empty when neither was read.
        ref: Short form of the checkpoint; None when it was not got that far.
        step: Training step; None like `ref`.
        session: Session that it is recorded under, 0 unless it was saved into this very run; None like `ref`.
        world_size: Ranks that saved it, as far as is known; 0 like `ref`.
        entry_count: Tensors and other entries.
        size_bytes: Bytes that its extents cover.
        reason: UPPER_SNAKE reason of a refusal; empty otherwise.
        field: What a refusal is about, such as `location.location`; empty when it is about no field.
        message: Why, for people; empty when all is well.
    """

    directory: str
    outcome: ImportOutcome
    source: str = ""
    ref: str | None = None
    step: int | None = None
    session: int | None = None
    world_size: int = 0
    entry_count: int = 0
    size_bytes: int = 0
    reason: str = ""
    field: str = ""
    message: str = ""

    @property
    def is_settled(self) -> bool:
        """True when nothing is left to do about it."""
        return self.outcome in _SETTLED

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "outcome": self.outcome.value}


@dataclass(frozen=True)
class ImportInto:
    """Where checkpoints are to be recorded, and how.

    Attributes:
        run: The run.
        part: Its part; None for the one that a save by Shardbook names, ``default`` for others.
        step: Training step; None for the one that a save by Shardbook names, or that the directory's name ends with.
        attempt: Number of the import of a directory by plain DCP: a higher one where it was saved over since.
        trusted: Unpickle a ``.metadata`` that holds more than DCP's metadata, which can run any code in it.
        is_dry: Look only; nothing is recorded.
        stores: Named roots, for locations.
        labels: Added to what the save says of itself, by key.
        metrics: Likewise, by name.
        note: Any JSON value, instead of the one that the save has.
        converted_from: What the checkpoints are another form of: a ref, or the name of something else. What another
            run's job saved by Shardbook comes from that job's checkpoint unless this says otherwise.
    """

    run: RunName
    part: str | None = None
    step: int | None = None
    attempt: int = 1
    trusted: bool = False
    is_dry: bool = False
    stores: Stores = field(default_factory=Stores)
    labels: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: Any = None
    converted_from: str | None = None

    def __post_init__(self) -> None:
        PartName(self.run, DEFAULT_PART if self.part is None else self.part)
        if self.step is not None:
            step_of(self.step, "")
        if self.attempt < 1:
            raise InvalidArgumentError(f"attempt is {self.attempt}, not 1 or more", field="attempt")
        if self.converted_from is not None:
            check_end(self.converted_from, "converted_from")
        self.described(b"")

    def described(self, said: bytes, saved_as: CheckpointName | None = None) -> bytes:
        """Returns what is said of a checkpoint, with what is added here; see ``shardbook.core.description``.

        Args:
            said: By the save.
            saved_as: What it was saved as, when that is not what it is recorded as.

        Raises:
            InvalidArgumentError: It cannot be kept, or is too much.
        """
        labels, metrics, note, writer = unpack_said(said)
        source = str(saved_as or "") if self.converted_from is None else self.converted_from
        return pack_said(
            check_labels({**labels, **self.labels}),
            check_metrics({**metrics, **self.metrics}),
            encode_note(self.note) or note,
            writer,
            [Origin(LineageKind.CONVERTED_FROM, source)] if source else origins_in(said),
        )


def find_directories(directories: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Returns the checkpoint directories, of Shardbook and of plain DCP, at and below the ones given; each once.

    Raises:
        NotFoundError: One of those is not there.
        StorageError, PermissionDeniedError: It cannot be walked.
        InvalidArgumentError: A URL needs a package that is not installed.
    """
    found: dict[str, None] = {}
    for directory in directories:
        with told_as_ours(f"cannot walk {os.fspath(directory)}"):
            found.update(dict.fromkeys(open_tree(directory).checkpoints(plain=True)))
    return list(found)


def import_directories(
    client: Client,
    directories: Iterable[str],
    into: ImportInto,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[ImportedCheckpoint]:
    """Records checkpoint directories, one by one. Idempotent: the same content again is ``PRESENT``.

    Args:
        client: The server.
        directories: As ``find_directories`` returns them.
        into: Where to.
        progress: Hears how many of how many are done, and of what: ``directories``.

    Yields:
        One result a directory, as it is done.

    Raises:
        InvalidArgumentError: One step for several directories.
        UnavailableError: The server is away; what was yielded is recorded.
        UnauthenticatedError, PermissionDeniedError: The token does not do.
        DeadlineExceededError: The server fell silent.
    """
    wanted = list(directories)
    if into.step is not None and len(wanted) > 1:
        raise InvalidArgumentError(
            f"one step for {len(wanted)} checkpoint directories: import them one by one, or leave the step to their "
            "names",
            field="step",
        )
    for done, directory in enumerate(wanted, 1):
        yield import_directory(client, directory, into)
        if progress is not None:
            progress(done, len(wanted), "directories")


def import_directory(client: Client, directory: str, into: ImportInto) -> ImportedCheckpoint:
    """Records what one directory means; raises as ``import_directories`` does."""
    path = normalized(directory)
    result = ImportedCheckpoint(path, ImportOutcome.REFUSED)
    try:
        with told_as_ours(f"cannot read {directory}"):
            found = _read(directory, path, into)
        result = found.result(path)
        return _recorded(client, found, result, is_dry=into.is_dry)
    except ShardbookError as error:
        # The storage's own refusals are about this directory alone.
        if error.reason != "STORAGE_DENIED" and (isinstance(error, _STOPS) or type(error) is ShardbookError):
            raise
        return _refused(result, error)


# ---------------------------------------------------------------- what there is


@dataclass(frozen=True, eq=False)
class _Found:
    """A checkpoint that can be recorded."""

    source: str
    key: AttemptKey
    place: AttemptLocation
    content: RecordedContent
    entry_count: int
    size_bytes: int
    write_time_s: float

    @property
    def name(self) -> CheckpointName:
        """What it is called for ever."""
        key = self.key
        part = PartName(RunName.parse(key.run), key.part)
        return CheckpointName(part, CheckpointId.full(key.step, key.session, key.attempt, key.incarnation))

    def result(self, directory: str) -> ImportedCheckpoint:
        """Returns what is known before anything is recorded."""
        return ImportedCheckpoint(
            directory,
            ImportOutcome.PLANNED,
            self.source,
            self.name.ref,
            self.key.step,
            self.key.session,
            self.key.world_size,
            self.entry_count,
            self.size_bytes,
        )


def _read(directory: str, path: str, into: ImportInto) -> _Found:
    files = TreeFiles(open_tree(directory), path)
    location = check_location(into.stores.location_of(path))
    found = read_directory(files)
    if isinstance(found, FoldedAttempt):
        return _of_attempt(found, location, into)
    facts = files.facts(DCP_METADATA)
    write_time_s = 0.0 if facts is None or facts.mtime_s is None else facts.mtime_s
    return _of_plain(found, path, location, into, write_time_s)


def _of_attempt(found: FoldedAttempt, location: str, into: ImportInto) -> _Found:
    """An attempt by Shardbook: as it is in its own run, as an offline one in any other."""
    identity = found.manifest.identity
    moved = replace(
        identity,
        run=into.run.ref,
        part=identity.part if into.part is None else into.part,
        step=identity.step if into.step is None else into.step,
    )
    content, saved_as = RecordedContent.of(found.manifest), None
    if moved != identity:
        moved, saved_as = replace(moved, session=0), identity.checkpoint_name
    return _Found(
        "manifest",
        attempt_key(moved),
        AttemptLocation(location=location, prefix=moved.prefix),
        replace(content, said=into.described(_legible(content.said), saved_as)),
        found.structure.entry_count,
        found.unique_bytes,
        moved.write_time_s,
    )


def _legible(said: bytes) -> bytes:
    """Returns what a save says of itself; damaged, it says nothing."""
    try:
        unpack_said(said)
    except InvalidArgumentError:
        return b""
    return said


def _of_plain(content: bytes, path: str, location: str, into: ImportInto, write_time_s: float) -> _Found:
    """A checkpoint by plain DCP. Nothing in it says which save it was, so its place stands for that."""
    step = step_of(into.step, path)
    with needs_torch(path):
        from shardbook.dcp.importing import content_of, read_metadata
    metadata = read_metadata(path, content, trusted=into.trusted)
    footprint = footprint_of(metadata)
    key = AttemptKey(
        run=str(into.run),
        part=DEFAULT_PART if into.part is None else into.part,
        step=step,
        session=0,
        incarnation=uuid.uuid5(_NAMESPACE, location).bytes,
        attempt=into.attempt,
        world_size=world_size_of(footprint),
    )
    return _Found(
        "dcp",
        key,
        AttemptLocation(location=location, prefix=""),
        replace(content_of(metadata), said=into.described(b"")),
        len(metadata.state_dict_metadata),
        footprint.size_bytes,
        write_time_s,
    )


# ---------------------------------------------------------------- what becomes of it


def _recorded(client: Client, found: _Found, result: ImportedCheckpoint, *, is_dry: bool) -> ImportedCheckpoint:
    known = _known(client, found)
    if known is not None and known.state is CheckpointState.DELETED:
        return replace(result, outcome=ImportOutcome.PRESENT, message="it was deleted from the catalogue")
    was_there = known is not None and known.state is CheckpointState.COMMITTED
    if was_there and known is not None and found.place.location not in known.locations:
        raise AlreadyExistsError("the catalogue has it elsewhere", field="location.location")
    if is_dry:
        outcome = ImportOutcome.PRESENT if was_there else ImportOutcome.PLANNED
        return replace(result, outcome=outcome)
    # Also when it is there: only the server can say whether with the same content.
    record_content(client, found.key, found.place, found.content, recovered=True, write_time_s=found.write_time_s)
    return replace(result, outcome=ImportOutcome.PRESENT if was_there else ImportOutcome.RECORDED)


def _known(client: Client, found: _Found) -> Checkpoint | None:
    """Returns what the catalogue has under the name; None when it has nothing, or another's."""
    try:
        known = client.get_checkpoint(found.name)
    except NotFoundError:
        return None
    return known if known.incarnation == found.key.incarnation.hex() else None


def _refused(result: ImportedCheckpoint, error: ShardbookError) -> ImportedCheckpoint:
    """What a refusal says; the catalogue's having it with other content is one reason, whatever differs."""
    outcome = ImportOutcome.SUPERSEDED if error.reason == "STEP_SUPERSEDED" else ImportOutcome.REFUSED
    about = error.violations[0].field if error.violations else ""
    reason, message = error.reason, error.message
    if reason in ("ALREADY_EXISTS", "ATTEMPT_MISMATCH"):
        reason, message = "ALREADY_EXISTS", f"{result.ref} is in the catalogue with other content: {about} differs"
        if result.source == "dcp":
            message += "; when the directory was saved over since then, --attempt 2 records it anew"
    return replace(result, outcome=outcome, reason=reason, field=about, message=encodable(message))


__all__ = [
    "ImportInto",
    "ImportOutcome",
    "ImportedCheckpoint",
    "find_directories",
    "import_directories",
    "import_directory",
]
