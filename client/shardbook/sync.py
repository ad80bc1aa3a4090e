"""Brings the catalogue level with what checkpoint directories hold. Needs neither torch nor the job that saved.

Every save leaves a registration record a rank, or the manifest they were folded into. What the catalogue lacks of it
is recorded as history: a numbered session's attempt keeps its number, and nothing that was committed since is touched.
Running it again changes nothing; running it while a job saves is safe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from shardbook._attempts import FoundAttempt, TreeFiles, find_attempts, newest_of
from shardbook._publishing import export_dcp_metadata, settle
from shardbook._trees import Tree, open_tree
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.client import Client
from shardbook.core import directory as names
from shardbook.core.fold import FoldedAttempt
from shardbook.core.limits import MAX_NAMED_RANKS
from shardbook.core.manifest import AttemptIdentity, Manifest
from shardbook.errors import (
    DeadlineExceededError,
    NotFoundError,
    PermissionDeniedError,
    ShardbookError,
    UnauthenticatedError,
    UnavailableError,
)
from shardbook.recording import record_attempt
from shardbook.stores import Stores, check_location, encodable, normalized

_LOG = logging.getLogger(__name__)

#: Makes the content of DCP's own ``.metadata`` from the directory and what its records were folded into.
Exporter = Callable[[str, FoldedAttempt], bytes | Iterable[bytes]]


class SyncOutcome(StrEnum):
    """What became of one attempt."""

    #: The catalogue lacked it and has it now.
    RECORDED = "recorded"
    #: The catalogue has it.
    PRESENT = "present"
    #: Ranks left no record: nothing to record, the save did not finish.
    INCOMPLETE = "incomplete"
    #: A later session's checkpoint of the step is committed; this one would change nothing.
    SUPERSEDED = "superseded"
    #: It cannot be recorded; ``reason`` says why.
    REFUSED = "refused"


#: Errors after which no further attempt needs to be tried.
_STOPS = (UnavailableError, DeadlineExceededError, UnauthenticatedError, PermissionDeniedError)
#: Outcomes that leave nothing to do.
_SETTLED = frozenset({SyncOutcome.RECORDED, SyncOutcome.PRESENT, SyncOutcome.SUPERSEDED})


@dataclass(frozen=True)
class SyncedAttempt:
    """One attempt that was found in a directory, and what became of it.

    Attributes:
        directory: Path or URL of the checkpoint directory.
        prefix: Directory of the attempt's data files in it; empty when the whole directory could not be looked at.
        outcome: What became of it.
        ref: Short form of the checkpoint; None when the files do not say which it is.
        run: ``project/run``; None like ``ref``.
        part: Part of the run; None like ``ref``.
        step: Training step; None like ``ref``.
        session: Session that wrote it, 0 when it was offline; None like ``ref``.
        attempt: Attempt within the session; None like ``ref``.
        missing_ranks: Ranks that left no record, the first 50.
        missing_count: How many did.
        reason: UPPER_SNAKE reason of a refusal; empty otherwise.
        message: Why, for people; empty when all is well.
    """

    directory: str
    prefix: str
    outcome: SyncOutcome
    ref: str | None = None
    run: str | None = None
    part: str | None = None
    step: int | None = None
    session: int | None = None
    attempt: int | None = None
    missing_ranks: tuple[int, ...] = ()
    missing_count: int = 0
    reason: str = ""
    message: str = ""

    @property
    def is_settled(self) -> bool:
        """True when nothing is left to do about it."""
        return self.outcome in _SETTLED

    @property
    def save(self) -> tuple[str | None, str | None, int | None]:
        """The save that it is an attempt of: run, part, step."""
        return self.run, self.part, self.step

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "outcome": self.outcome.value, "missing_ranks": list(self.missing_ranks)}


def sync_directories(
    client: Client,
    directories: Iterable[str | os.PathLike[str]],
    *,
    stores: Stores | None = None,
    export: Exporter | None = export_dcp_metadata,
) -> Iterator[SyncedAttempt]:
    """Records what the catalogue lacks of all checkpoint directories at and below the ones given.

    Args:
        client: The server.
        directories: Paths, or URLs where fsspec is installed.
        stores: Named roots, for locations; none when None.
        export: Makes DCP's own ``.metadata`` for directories that lack that of their newest attempt; with None they
            get a manifest only, which is enough for ``shardbook.dcp.load``, and the results say so.

    Yields:
        One result an attempt, as it is done.

    Raises:
        NotFoundError: A directory is not there.
        UnavailableError: The server is away; what was yielded is recorded, the rest comes with the next run.
        UnauthenticatedError, PermissionDeniedError: The token does not do.
        DeadlineExceededError: The server fell silent.
    """
    for directory in directories:
        tree = open_tree(directory)
        for checkpoint in tree.checkpoints():
            try:
                yield from sync_directory(client, checkpoint, stores=stores, export=export, tree=tree)
            except ShardbookError as error:
                if _ends_all(error):
                    raise
                yield _unreadable(checkpoint, error)
            except Exception as error:  # noqa: BLE001 - one directory is no reason to give up those after it
                yield _unreadable(checkpoint, error)


def sync_directory(
    client: Client,
    directory: str | os.PathLike[str],
    *,
    stores: Stores | None = None,
    export: Exporter | None = export_dcp_metadata,
    tree: Tree | None = None,
) -> list[SyncedAttempt]:
    """Records what the catalogue lacks of one checkpoint directory; raises as ``sync_directories`` does."""
    tree = open_tree(directory) if tree is None else tree
    path = normalized(directory)
    location = (stores or Stores()).location_of(path)
    files = TreeFiles(tree, path)
    works = [_Sync(client, found, path, location) for found in find_attempts(files)]
    # First what needs no service: the directory is to be enough whatever becomes of the rest.
    for work in works:
        work.fold()
    note = _settled(files, export)
    newest = newest_of(work.found for work in works)
    return [work.run(note if newest is not None and work.found.prefix == newest.prefix else "") for work in works]


def _settled(files: TreeFiles, export: Exporter | None) -> str:
    """Makes the directory mean its newest attempt; returns what could not be written, which undoes nothing."""
    try:
        return "; ".join(settle(files, None if export is None else lambda one: export(files.directory, one)))
    except Exception as error:  # noqa: BLE001 - the manifests and records say the same
        _LOG.warning("manifest or .metadata of %s was not written: %s", encodable(files.directory), error)
        return encodable(f"its manifest or .metadata was not written: {error}")


def _ends_all(error: ShardbookError) -> bool:
    """True for an error after which no further attempt needs to be tried."""
    # The bare class stands for statuses without one of their own, such as UNIMPLEMENTED from an older server.
    return isinstance(error, _STOPS) or type(error) is ShardbookError


def _unreadable(directory: str, error: Exception) -> SyncedAttempt:
    """What became of a directory that could not be looked at."""
    _LOG.warning("%s could not be synced: %s", encodable(directory), error, exc_info=True)
    reason = error.reason if isinstance(error, ShardbookError) else "UNREADABLE"
    message = encodable(str(error) or type(error).__name__)
    return SyncedAttempt(directory, "", SyncOutcome.REFUSED, reason=reason, message=message)


def unsettled(results: Iterable[SyncedAttempt]) -> list[SyncedAttempt]:
    """Returns the attempts that something is left to do about: those of saves that no other attempt settled."""
    listed = list(results)
    settled = {result.save for result in listed if result.is_settled}
    return [result for result in listed if not result.is_settled and result.save not in settled]


class _Sync:
    """Work on one attempt."""

    def __init__(self, client: Client, found: FoundAttempt, directory: str, location: str) -> None:
        self.found = found
        self._client = client
        self._directory = directory
        self._location = location
        self._manifest: Manifest | None = None
        self._failure: OSError | ShardbookError | None = None
        self._note = ""

    def fold(self) -> None:
        """Makes a manifest of a complete set of records that nobody has folded, and leaves it in the directory."""
        if not self.found.is_unfolded:
            return
        try:
            self._manifest, folded = self.found.read()
        except (OSError, ShardbookError) as error:
            self._failure = error
            return
        if folded is None:
            return
        try:
            self.found.files.write(names.manifest_path(self.found.prefix), self._manifest.to_bytes())
        except OSError as error:  # a directory that cannot be written keeps its records, which say the same
            self._note = encodable(f"its manifest was not written: {error}")

    def run(self, note: str) -> SyncedAttempt:
        """Records the attempt, unless the catalogue has it; ``note`` is what else there is to say of it."""
        result = self._outcome()
        notes = dict.fromkeys(filter(None, (result.message, self._note, note)))
        return replace(result, message="; ".join(notes))

    def _outcome(self) -> SyncedAttempt:
        found = self.found
        if found.identity is None:
            return self._result(SyncOutcome.REFUSED, reason="CORRUPT_MANIFEST", message="its files are damaged")
        missing = found.missing_ranks
        if missing:
            return self._result(
                SyncOutcome.INCOMPLETE,
                missing_ranks=tuple(missing[:MAX_NAMED_RANKS]),
                missing_count=len(missing),
                message=f"{len(missing)} of {found.identity.world_size} ranks left no record",
            )
        try:
            if self._failure is not None:
                raise self._failure
            return self._recorded(found.identity)
        except ShardbookError as error:
            if _ends_all(error):
                raise
            outcome = SyncOutcome.SUPERSEDED if error.reason == "STEP_SUPERSEDED" else SyncOutcome.REFUSED
            return self._result(outcome, reason=error.reason, message=error.message)
        except OSError as error:
            return self._result(SyncOutcome.REFUSED, reason="UNREADABLE", message=encodable(str(error)))

    def _recorded(self, identity: AttemptIdentity) -> SyncedAttempt:
        """Records a complete attempt, unless it is there."""
        check_location(self._location)
        known = self._known(identity)
        if known is not None and known.state in (CheckpointState.COMMITTED, CheckpointState.DELETED):
            deleted = "it was deleted from the catalogue" if known.state is CheckpointState.DELETED else ""
            return self._result(SyncOutcome.PRESENT, message=deleted)
        manifest = self.found.read()[0] if self._manifest is None else self._manifest
        record_attempt(self._client, manifest, self._location, recovered=True)
        return self._result(SyncOutcome.RECORDED)

    def _known(self, identity: AttemptIdentity) -> Checkpoint | None:
        """Returns what the catalogue has under the attempt's name; None when it has nothing, or another's."""
        try:
            known = self._client.get_checkpoint(identity.checkpoint_name)
        except NotFoundError:
            return None
        # A number alone is no identity: after a restore the catalogue may have handed it out again.
        return known if known.incarnation == identity.incarnation.hex() else None

    def _result(self, outcome: SyncOutcome, **facts: Any) -> SyncedAttempt:
        identity = self.found.identity
        named: dict[str, Any] = {}
        if identity is not None:
            named = {
                "ref": identity.checkpoint_name.ref,
                "run": identity.run,
                "part": identity.part,
                "step": identity.step,
                "session": identity.session,
                "attempt": identity.attempt,
            }
        return SyncedAttempt(self._directory, self.found.prefix, outcome, **named, **facts)
