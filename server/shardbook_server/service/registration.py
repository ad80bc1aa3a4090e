"""What ranks wrote, and what they failed to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook_server.observer import SILENT, Observer
from shardbook_server.service import staging
from shardbook_server.service.attempts import Ask, Attempt, closed_error, open_attempts, row_key
from shardbook_server.service.batches import Want, WantedBlobs, run_by_run_when_busy
from shardbook_server.service.blobs import NO_BLOBS, BlobService, CheckedBlobs, unknown_refs
from shardbook_server.service.checks import check_rank
from shardbook_server.service.closing import fail_attempt, failure_text
from shardbook_server.service.staging import CheckedShard, ShardChecker
from shardbook_server.service.types import AttemptLocation, FailureReport, Registration
from shardbook_server.service.views import CheckpointState, RegistrationAnswer
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.blobs import BlobRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.registrations import RegistrationRow


@dataclass(frozen=True)
class RegistrationEntry:
    """One RegisterShards call in a batch: the registration and its uploads, checked."""

    registration: Registration
    blobs: CheckedBlobs = NO_BLOBS

    @property
    def ask(self) -> Ask:
        """The attempt it is about."""
        return self.registration.key, self.registration.location

    @property
    def project(self) -> str:
        """The project it is in."""
        return self.registration.key.part_name.run.project


#: What became of an entry inside the transaction: its row, an error, or None when its structure is not stored.
_Outcome = RegistrationRow | ShardbookError | None


class RegistrationService:
    """Takes registrations and failures. Thread-safe."""

    def __init__(
        self, database: Database, blobs: BlobService, *, lease_ttl_s: float, observer: Observer = SILENT
    ) -> None:
        """Keeps no state of its own."""
        self._database = database
        self._blobs = blobs
        self._lease_ttl_s = lease_ttl_s
        self._observer = observer

    def register_batch(self, entries: Sequence[RegistrationEntry]) -> list[RegistrationAnswer | ShardbookError]:
        """Stores registrations in one transaction; one verdict an entry, in order.

        Verdicts: SessionUnknownError, SessionFencedError, CheckpointClosedError, AlreadyExistsError (the rank
        registered other content before), InvalidArgumentError. The same content again is fine, also once the
        attempt is committed. Uploads are stored also when others are still lacking.

        Raises:
            ShardbookError: The whole batch failed (the database cannot be written); nothing was stored.
        """
        return run_by_run_when_busy(entries, lambda entry: entry.registration.key.part_name.run, self._register_batch)

    def _register_batch(self, entries: Sequence[RegistrationEntry]) -> list[RegistrationAnswer | ShardbookError]:
        checker = ShardChecker()
        shards = [_check(checker, entry) for entry in entries]
        sound = {at: shard for at, shard in enumerate(shards) if isinstance(shard, CheckedShard)}
        runs = {entries[at].registration.key.part_name.run for at in sound}
        with self._blobs.doubted(), self._database.write(runs, exclusive=False) as connection:
            now_us = self._database.now_us(connection)
            asks = {entries[at].ask: None for at in sound}
            attempts = open_attempts(connection, asks, now_us, self._lease_ttl_s)
            fine = {at: found for at in sound if isinstance(found := attempts[entries[at].ask], Attempt)}
            wants = [
                Want(entries[at].project, attempt.part.project_id, (sound[at].wanted,), entries[at].blobs)
                for at, attempt in fine.items()
            ]
            known = WantedBlobs(self._blobs, connection, wants, now_us)
            outcomes = self._stage(connection, entries, sound, fine, known)
        known.remember()
        self._observer.registered(sum(isinstance(outcome, RegistrationRow) for outcome in outcomes.values()))
        answers: list[RegistrationAnswer | ShardbookError] = []
        for at, (entry, shard) in enumerate(zip(entries, shards, strict=True)):
            if isinstance(shard, ShardbookError):
                answers.append(shard)
                continue
            attempt = attempts[entry.ask]
            answers.append(_answer(entry, shard, attempt, outcomes.get(at)))
        return answers

    def _stage(
        self,
        connection: Connection,
        entries: Sequence[RegistrationEntry],
        shards: Mapping[int, CheckedShard],
        fine: Mapping[int, Attempt],
        known: WantedBlobs,
    ) -> dict[int, _Outcome]:
        outcomes: dict[int, _Outcome] = {}
        committed = staging.CommittedRegistrations(connection)
        for at, attempt in fine.items():
            blob = known.row(entries[at].project, shards[at].wanted)
            if attempt.state not in (CheckpointState.OPEN, CheckpointState.COMMITTED):
                outcomes[at] = closed_error(attempt.checkpoint)
            elif blob is None:
                unknown = attempt.state is CheckpointState.OPEN
                outcomes[at] = None if unknown else closed_error(attempt.checkpoint)
            else:
                outcomes[at] = _row(attempt, shards[at], blob, committed)
        rows = {
            at: row
            for at, row in outcomes.items()
            if isinstance(row, RegistrationRow) and fine[at].state is CheckpointState.OPEN
        }
        verdicts = staging.insert_rows(connection, list(rows.values()))
        return outcomes | {at: error for at, error in zip(rows, verdicts, strict=True) if error is not None}

    def report_failure(self, report: FailureReport) -> CheckpointState:
        """Fails the attempt because of one rank; the first report counts. Returns where the checkpoint is now.

        Raises:
            SessionUnknownError, SessionFencedError, InvalidArgumentError: As for registrations.
        """
        with self._database.write([report.key.part_name.run]) as connection:
            now_us = self._database.now_us(connection)
            ask = (report.key, self._known_location(connection, report) or report.location)
            attempt = open_attempts(connection, [ask], now_us, self._lease_ttl_s)[ask]
            if isinstance(attempt, ShardbookError):
                raise attempt
            if attempt.state is not CheckpointState.OPEN:
                return attempt.state
            fail_attempt(connection, attempt.checkpoint, failure_text(report.failure), now_us, report.failure)
        self._observer.attempt_failed()
        return CheckpointState.FAILED

    @staticmethod
    def _known_location(connection: Connection, report: FailureReport) -> AttemptLocation | None:
        """Returns where the attempt's files are: a rank may fail because it was told another place."""
        part = run_rows.find_parts(connection, [report.key.part_name]).get(report.key.part_name)
        if part is None:
            return None
        natural = row_key(part.id, report.key)
        row = checkpoint_rows.find_checkpoints(connection, [natural]).get(natural)
        return None if row is None else AttemptLocation(row.location, row.prefix)


def _check(checker: ShardChecker, entry: RegistrationEntry) -> CheckedShard | ShardbookError:
    try:
        return checker.check(entry.registration.registration)
    except InvalidArgumentError as error:
        return error.within("registration")


def _row(
    attempt: Attempt, shard: CheckedShard, blob: BlobRow, committed: staging.CommittedRegistrations
) -> RegistrationRow | ShardbookError:
    """Judges a registration whose structure is stored."""
    try:
        # Fewer than world_size where RecordCheckpoint opened the attempt with slices.
        check_rank(shard.registration.rank, attempt.checkpoint.registration_count, "rank")
        row = staging.staged_row(attempt.checkpoint.id, shard, blob)
    except InvalidArgumentError as error:
        return error.within("registration")
    if attempt.state is CheckpointState.OPEN:
        return row
    return committed.verdict(attempt.checkpoint, row) or row


def _answer(
    entry: RegistrationEntry, shard: CheckedShard, attempt: Attempt | ShardbookError, outcome: _Outcome
) -> RegistrationAnswer | ShardbookError:
    if isinstance(attempt, ShardbookError):
        return attempt
    if isinstance(outcome, ShardbookError):
        return outcome
    if outcome is None:
        return RegistrationAnswer(unknown_refs(shard.wanted, entry.blobs))
    return RegistrationAnswer(checkpoint_id=attempt.checkpoint.id)
