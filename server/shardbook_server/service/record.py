"""Whole attempts from one process: saves by DCP itself, imports, and what was saved while the service was away."""

from __future__ import annotations

from collections.abc import Sequence

from shardbook.core.columns import unframe
from shardbook.core.head import decode_metadata_header
from shardbook.errors import AlreadyExistsError, InvalidArgumentError, ShardbookError
from shardbook_server.service import staging
from shardbook_server.service.attempts import closed_error, disagreement, find_current, renew, row_key
from shardbook_server.service.batches import Want, WantedBlobs
from shardbook_server.service.blobs import NO_BLOBS, BlobService, CheckedBlobs
from shardbook_server.service.closing import check_not_superseded
from shardbook_server.service.commit import CommitService
from shardbook_server.service.staging import CheckedShard, ShardChecker
from shardbook_server.service.types import RecordRequest
from shardbook_server.service.verdicts import about
from shardbook_server.service.views import CheckpointState, RecordAnswer
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import CheckpointRow, NewCheckpoint
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.registrations import RegistrationRow
from shardbook_server.storage.runs import PartRow


class RecordService:
    """Records attempts as a whole. Thread-safe."""

    def __init__(self, database: Database, blobs: BlobService, commits: CommitService, *, lease_ttl_s: float) -> None:
        """Keeps no state of its own."""
        self._database = database
        self._blobs = blobs
        self._commits = commits
        self._lease_ttl_s = lease_ttl_s

    def record(self, request: RecordRequest, blobs: CheckedBlobs = NO_BLOBS) -> RecordAnswer:
        """Stores registrations of an attempt and, with ``complete``, commits it. Idempotent.

        ``recovered`` makes it history: the run's session is not touched, and the fence is passed. It then closes an
        OPEN or EXPIRED attempt of the same key too, as long as what ranks registered there agrees.

        Raises:
            FailedPreconditionError: ``recovered``, and a later session holds a live commit of the step (reason
                ``STEP_SUPERSEDED``).
            AlreadyExistsError: The attempt is there with other content.
            ShardbookError: As for registrations and commits.
        """
        shards = _check(request)
        run = request.key.part_name.run
        with self._blobs.doubted(), self._database.write([run]) as connection:
            now_us = self._database.now_us(connection)
            part = self._part(connection, request, now_us)
            wanted = tuple({shard.wanted: None for shard in shards})
            known = WantedBlobs(self._blobs, connection, [Want(run.project, part.project_id, wanted, blobs)], now_us)
            unknown = {ref for ref in wanted if known.row(run.project, ref) is None}
            if not unknown:
                row = self._attempt(connection, part, request, now_us)
                _stage(connection, row, shards, known, run.project)
        known.remember()
        if unknown:
            return RecordAnswer(tuple(sorted(unknown | set(blobs.lacking))))
        if not request.complete:
            return RecordAnswer()
        return RecordAnswer(
            checkpoint=self._commits.commit(request.key, request.description, recovered=request.recovered)
        )

    def _part(self, connection: Connection, request: RecordRequest, now_us: int) -> PartRow:
        key = request.key
        if request.recovered:
            part = run_rows.ensure_part(connection, key.part_name, now_us)
            # After a restore the attempt may be from a session that the database has forgotten.
            run_rows.raise_last_session(connection, part.id, key.session)
            return part
        found = find_current(connection, [key])[key]
        if isinstance(found, ShardbookError):
            raise found
        renew(connection, [found], now_us, self._lease_ttl_s)
        return found

    def _attempt(self, connection: Connection, part: PartRow, request: RecordRequest, now_us: int) -> CheckpointRow:
        """Finds the attempt or opens it, and makes it writable."""
        natural = row_key(part.id, request.key)
        row = checkpoint_rows.find_checkpoints(connection, [natural]).get(natural)
        if row is None:
            new = NewCheckpoint(
                natural,
                request.key.world_size,
                request.registration_count,
                request.location.location,
                request.location.prefix,
                request.recovered,
                request.write_time_us,
                request.metadata_header,
            )
            checkpoint_rows.open_checkpoints(connection, [new], now_us)
            row = checkpoint_rows.find_checkpoints(connection, [natural])[natural]
        _compare(row, request)
        if row.state == CheckpointState.COMMITTED:
            return row
        if row.state in (CheckpointState.FAILED, CheckpointState.DELETED) or (
            row.state == CheckpointState.EXPIRED and not _revivable(row, request)
        ):
            raise closed_error(row)
        # Early, so that a sync of a superseded step does not send all of it first; decided again at the commit.
        live = checkpoint_rows.find_live(connection, part.id, row.step)
        check_not_superseded(row, live, recovered=request.recovered)
        if row.state == CheckpointState.EXPIRED:
            checkpoint_rows.reopen(connection, [row.id], staged=not row.staged)
        if not row.metadata_header and request.metadata_header:
            checkpoint_rows.set_header(connection, row.id, request.metadata_header, request.write_time_us)
        return checkpoint_rows.find_checkpoints(connection, [natural])[natural]


def _revivable(row: CheckpointRow, request: RecordRequest) -> bool:
    return row.staged or request.recovered


def _check(request: RecordRequest) -> list[CheckedShard]:
    checker = ShardChecker()
    shards = []
    for at, registration in enumerate(request.registrations):
        try:
            shards.append(checker.check(registration))
        except InvalidArgumentError as error:
            raise error.within(f"registrations[{at}]") from error
    if request.metadata_header:
        try:
            decode_metadata_header(request.metadata_header)
        except InvalidArgumentError as error:
            raise about(error, "metadata_header") from error
    return shards


def _same_header(one: bytes, other: bytes) -> bool:
    """Returns True when two headers say the same, however they are compressed."""
    return one == other or bool(one and other and unframe(one) == unframe(other))


def _compare(row: CheckpointRow, request: RecordRequest) -> None:
    """Refuses a call that says other things about the attempt than what is stored."""
    mismatch = disagreement(row, request.key, request.location)
    if mismatch is not None:
        raise mismatch
    if row.registration_count != request.registration_count:
        raise InvalidArgumentError(
            f"the attempt was opened with {row.registration_count} registrations, "
            f"this call says {request.registration_count}",
            reason="ATTEMPT_MISMATCH",
            field="registration_count",
        )
    closed = row.state == CheckpointState.COMMITTED
    if not _same_header(row.metadata_header, request.metadata_header) and (row.metadata_header or closed):
        raise AlreadyExistsError("the attempt has another metadata header", field="metadata_header")


def _stage(
    connection: Connection, row: CheckpointRow, shards: Sequence[CheckedShard], known: WantedBlobs, project: str
) -> None:
    """Stages registrations, or compares them with what is committed; all or none."""
    staged: list[RegistrationRow] = []
    for at, shard in enumerate(shards):
        blob = known.row(project, shard.wanted)
        if blob is None:
            continue
        try:
            staged.append(staging.staged_row(row.id, shard, blob))
        except InvalidArgumentError as error:
            raise error.within(f"registrations[{at}]") from error
    if row.state == CheckpointState.COMMITTED:
        committed = staging.CommittedRegistrations(connection)
        verdicts = [committed.verdict(row, one) for one in staged]
    else:
        verdicts = staging.insert_rows(connection, staged)
    for at, verdict in enumerate(verdicts):
        if verdict is not None:
            raise AlreadyExistsError(verdict.message, field=f"registrations[{at}]")
