"""``move``: which checkpoints, where they should be, whether they are there, and the switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from shardbook._answers import Answers
from shardbook._described import described_at, told_as_ours
from shardbook._moving import Move
from shardbook._targets import METADATA_S
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.names import CheckpointName, RunName
from shardbook.errors import FailedPreconditionError, NotFoundError, ShardbookError, StorageError
from shardbook.moving.places import Place, relative_to, target_of
from shardbook.stores import Stores
from shardbook.verifying.api import judged
from shardbook.verifying.report import FaultKind, VerifyReport

#: Hears how many of how many checkpoints are done.
Progress = Callable[[int, int, str], None]
#: Checkpoints that one call switches: an interruption loses no more than the looks at so many.
_BATCH: Final = 50


class MoveOutcome(StrEnum):
    """What became of one checkpoint."""

    #: All is at the new place, and the catalogue says so; or would, in a dry run.
    MOVED = "moved"
    #: The catalogue said so already.
    PRESENT = "present"
    #: Files are missing there, or too short: it stays where it was.
    INCOMPLETE = "incomplete"
    #: It does not lie below what was copied.
    OUTSIDE = "outside"
    #: It could not be looked at or switched; the message says why.
    REFUSED = "refused"


@dataclass(frozen=True)
class MovedCheckpoint:
    """One checkpoint and what became of it.

    Attributes:
        ref: Short form of its name.
        name: Full name.
        outcome: `moved`, `present`, `incomplete`, `outside` or `refused`.
        from_location: Where it was first.
        to_location: Where it is to be; empty when that cannot be said.
        directory: The path or URL that this is here; empty likewise.
        file_count: Files that it has.
        faulty_count: Files that are missing there or too short.
        size_bytes: Bytes that its extents cover.
        message: What there is to say of it.
    """

    ref: str
    name: str
    outcome: MoveOutcome
    from_location: str
    to_location: str = ""
    directory: str = ""
    file_count: int = 0
    faulty_count: int = 0
    size_bytes: int = 0
    message: str = ""

    @property
    def is_there(self) -> bool:
        """True when the catalogue says, or in a dry run would say, the new place."""
        return self.outcome in (MoveOutcome.MOVED, MoveOutcome.PRESENT)

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "outcome": self.outcome.value}


def move(
    target: str | RunName | CheckpointName,
    to: str,
    *,
    part: str | None = None,
    source: str | None = None,
    keep: bool = False,
    dry_run: bool = False,
    config: ClientConfig | None = None,
    client: Client | None = None,
    progress: Progress | None = None,
) -> Iterator[MovedCheckpoint]:
    """Switches committed checkpoints to where their files have been copied, once all files are there.

    Sizes are compared with what the extents need; nothing is copied or removed. What is saved meanwhile goes where it
    goes. A move that is interrupted goes on where it was when it is made again. Needs no torch.

    Args:
        target: A run, ``project/run``, for all of its committed checkpoints, superseded ones too; or a ref.
        to: ``STORE`` or ``STORE/PATH``, configured here. Below it everything lies as it did below ``source``.
        part: Of a run: one part; None for all.
        source: What was copied: ``STORE``, ``STORE/PATH``, or a directory or URL; None for the root of the store that
            each checkpoint is in.
        keep: Add the new place behind the others, rather than make it the only one.
        dry_run: Look, and switch nothing.
        config: Settings; those of the environment when None.
        client: The server; by default the one that ``config`` names.
        progress: Hears how far it is.

    Yields:
        One result a checkpoint, newest first; those that are switched once they are, some 50 at a time.

    Raises:
        InvalidArgumentError: A store is not configured here (``UNKNOWN_STORE``); a place carries credentials
            (``CREDENTIALS_IN_URI``) or leads out of its store (``INVALID_LOCATION``).
        NotFoundError: There is no such run or checkpoint.
        FailedPreconditionError: The one checkpoint is not committed.
        ShardbookError: The service could not be asked. What was yielded is switched.
    """
    settings = ClientConfig.from_env() if config is None else config
    place = target_of(to, settings.stores)
    below = None if source is None else Place.parse(source, "from")
    answers = Answers.of(settings, METADATA_S, client)
    listed = _listed(answers.client, target, part)
    mover = _Mover(answers, settings.stores, place, below, keep=keep, dry_run=dry_run)
    return mover.run(listed, progress)


def _listed(client: Client, target: str | RunName | CheckpointName, part: str | None) -> list[Checkpoint]:
    if isinstance(target, CheckpointName) or (isinstance(target, str) and "@" in target):
        one = client.get_checkpoint(target)
        if one.state is not CheckpointState.COMMITTED:
            raise FailedPreconditionError(f"{one.ref} is {one.state}, not COMMITTED", reason="NOT_COMMITTED")
        return [one]
    committed = 'state = "COMMITTED"'
    return list(client.list_checkpoints(target, part=part, show_all=True, filter=committed))


@dataclass(frozen=True)
class _Mover:
    """Looks and switches."""

    answers: Answers
    stores: Stores
    place: Place
    source: Place | None
    keep: bool
    dry_run: bool

    def run(self, listed: list[Checkpoint], progress: Progress | None) -> Iterator[MovedCheckpoint]:
        """Yields what becomes of each."""
        waiting: list[MovedCheckpoint] = []
        for done, one in enumerate(listed, 1):
            looked = self._look(one)
            if looked.outcome is MoveOutcome.MOVED:
                waiting.append(looked)
            else:
                yield looked
            if len(waiting) >= _BATCH or done == len(listed):
                yield from self._switched(waiting)
                waiting = []
            if progress is not None:
                progress(done, len(listed), "checkpoints")

    def _look(self, one: Checkpoint) -> MovedCheckpoint:
        """Says what is to become of a checkpoint."""
        result = MovedCheckpoint(one.ref, one.name, MoveOutcome.OUTSIDE, one.location, size_bytes=one.size_bytes)
        relative = relative_to(one.location, self.source, self.stores)
        if relative is None:
            told = (
                "is in no store: say with --from which directory was copied" if self.source is None else "is not below"
            )
            return replace(result, message=f"{one.location} {told}{'' if self.source is None else ' --from'}")
        location = self.place.location(relative)
        result = replace(result, to_location=location, directory=self.stores.path_of(location))
        if location in one.locations if self.keep else one.locations == (location,):
            return replace(result, outcome=MoveOutcome.PRESENT)
        try:
            stored = self.answers.everything(CheckpointName.parse(one.name))
            with told_as_ours(f"cannot look at {result.directory}"):
                report = judged(described_at(stored, result.directory))
        except (StorageError, NotFoundError, FailedPreconditionError) as error:
            return replace(result, outcome=MoveOutcome.REFUSED, message=error.message)
        return _judgement(result, report)

    def _switched(self, waiting: list[MovedCheckpoint]) -> Iterable[MovedCheckpoint]:
        """Switches what was found whole, in one transaction; one by one where something speaks against one of them."""
        if self.dry_run or not waiting:
            return waiting
        client = self.answers.client
        moves = [Move(one.name, one.from_location, one.to_location, self.keep) for one in waiting]
        try:
            moved = client.move_checkpoints(moves)
        except ShardbookError as error:
            if error.status not in ("FAILED_PRECONDITION", "NOT_FOUND", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"):
                raise
            if len(waiting) > 1:
                return [one for each in waiting for one in self._switched([each])]
            return [replace(waiting[0], outcome=MoveOutcome.REFUSED, message=error.message)]
        for one in moved:
            # What was known to be lost was found whole a moment ago.
            if one.data_missing:
                client.report_missing_data(one.name, missing=False)
        return waiting


def _judgement(result: MovedCheckpoint, report: VerifyReport) -> MovedCheckpoint:
    counts = report.fault_counts
    faulty = counts[FaultKind.MISSING] + counts[FaultKind.TRUNCATED]
    result = replace(result, file_count=report.file_count, faulty_count=faulty, outcome=MoveOutcome.MOVED)
    if not faulty:
        return result
    first = report.faults[0]
    message = f"{faulty} of {report.file_count} files are not there as a whole, the first is {first.file}"
    return replace(result, outcome=MoveOutcome.INCOMPLETE, message=message)


__all__ = ["MoveOutcome", "MovedCheckpoint", "Progress", "move"]
