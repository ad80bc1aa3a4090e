"""Rows made answers, and names made rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from shardbook.core.names import LATEST, CheckpointId, CheckpointName, PartName, RunName
from shardbook.errors import FailedPreconditionError, NotFoundError
from shardbook_server.service.types import AttemptLocation
from shardbook_server.service.views import CheckpointInfo, CheckpointState, FileDeletion
from shardbook_server.storage import aliases as alias_rows
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import named as named_rows
from shardbook_server.storage import retention as retention_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import CheckpointRow, ListedCheckpoint
from shardbook_server.storage.database import Connection
from shardbook_server.storage.descriptions import NOTHING_SAID, Said
from shardbook_server.storage.runs import PartRow


def utc(time_us: int) -> str:
    """Returns a time as messages have it."""
    return datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def checkpoint_info(connection: Connection, checkpoint_id: int) -> CheckpointInfo:
    """Returns a checkpoint as it is answered; raises NotFoundError."""
    return checkpoint_of(listed_by_id(connection, checkpoint_id))


#: As most rows have them: a page need not parse each.
_NO_WARNINGS: Final = "[]"
#: Names of parts that are kept.
_PART_NAMES: Final = 4_096


def listed_by_id(connection: Connection, checkpoint_id: int) -> ListedCheckpoint:
    """Returns a checkpoint with its names and what its structure says; raises NotFoundError."""
    listed = checkpoint_rows.find_listed(connection, [checkpoint_id]).get(checkpoint_id)
    if listed is None:
        raise NotFoundError("there is no such checkpoint")
    return listed


@lru_cache(maxsize=_PART_NAMES)
def _part_name(project: str, run: str, part: str) -> PartName:
    """Returns a part's name, which is judged once and not for each of its checkpoints."""
    return PartName(RunName(project, run), part)


def checkpoint_of(listed: ListedCheckpoint, said: Said = NOTHING_SAID) -> CheckpointInfo:
    """Returns a checkpoint as it is answered, with what is said of it."""
    row = listed.row
    part = _part_name(listed.project, listed.run, listed.part)
    full = CheckpointId.full(row.step, row.session, row.attempt, row.incarnation)
    # The short form names the step alone while that means this attempt.
    short = CheckpointId(step=row.step) if row.live else full
    return CheckpointInfo(
        checkpoint_id=row.id,
        name=str(CheckpointName(part, full)),
        ref=CheckpointName(part, short).ref,
        step=row.step,
        session=row.session,
        attempt=row.attempt,
        incarnation=row.incarnation,
        world_size=row.world_size,
        state=CheckpointState(row.state),
        live=row.live,
        location=AttemptLocation(row.location, row.prefix),
        other_locations=listed.other_locations,
        tensor_count=listed.tensor_count,
        chunk_count=listed.chunk_count,
        bytes_entry_count=listed.bytes_entry_count,
        size_bytes=row.size_bytes,
        # What was recorded afterwards has two times: people want to know when it was saved.
        create_time_us=row.create_time_us if row.write_time_us is None else row.write_time_us,
        commit_time_us=row.commit_time_us,
        warnings=() if listed.warnings == _NO_WARNINGS else tuple(json.loads(listed.warnings)),
        failure=row.failure,
        structure_digest=listed.structure_digest,
        recovered=row.recovered,
        labels=said.labels,
        metrics=said.metrics,
        aliases=tuple(sorted(said.aliases)),
        delete_time_us=row.delete_time_us,
        purge_time_us=row.purge_time_us,
        data_missing=bool(row.flags & checkpoint_rows.DATA_MISSING),
        file_deletion=file_deletion(row),
    )


def file_deletion(row: CheckpointRow) -> FileDeletion:
    """Returns how far the deletion of a checkpoint's data files is."""
    if row.flags & checkpoint_rows.FILES_GONE:
        return FileDeletion.DONE
    return FileDeletion.BEGUN if row.flags & checkpoint_rows.FILES_GOING else FileDeletion.NONE


def existing_part(connection: Connection, name: PartName) -> PartRow:
    """Returns a part; raises NotFoundError."""
    part = run_rows.find_parts(connection, [name]).get(name)
    if part is None:
        raise NotFoundError(f"{name.ref} does not exist: nothing was ever saved to it")
    return part


def resolve(connection: Connection, name: CheckpointName) -> int:
    """Returns the checkpoint that a name means.

    ``latest`` is what the server keeps, another alias what it was set to or follows; a step alone is the live one; a
    step and session the newest committed attempt of it; a full id one attempt, whatever became of it.

    Raises:
        NotFoundError: It means none.
    """
    part = existing_part(connection, name.part)
    found = _resolve(connection, part, name.id)
    if found is None:
        deleted = resolve_deleted(connection, part.id, name.id)
        if deleted is not None:
            raise deleted_error(name, checkpoint_rows.find_by_id(connection, deleted))
        raise NotFoundError(_why_absent(connection, part, name), metadata={"name": str(name)})
    return found


def _why_absent(connection: Connection, part: PartRow, name: CheckpointName) -> str:
    listing = f"`shardbook ls {name.part.ref}"
    if name.id.alias == LATEST:
        return f"{name.ref} does not exist: nothing of it is committed; {listing} --all` lists every attempt"
    if name.id.alias is not None:
        return f"{name.ref} does not exist; `shardbook alias {name.part.ref}` lists what there is"
    step = name.id.step
    if step is not None and checkpoint_rows.has_attempts(connection, part.id, step, session=name.id.session):
        return f"{name.ref} was never committed, there are only attempts: {listing} --all` lists them"
    return f"{name.ref} does not exist; {listing}` lists what there is"


def resolve_deleted(connection: Connection, part_id: int, name: CheckpointId) -> int | None:
    """Returns the deleted checkpoint that a step, a step and session, or a full id means; None when none was."""
    if name.step is None:
        return None
    if name.attempt is None:
        return retention_rows.newest_deleted(connection, part_id, name.step, name.session)
    found = _exactly(connection, part_id, name.step, name)
    if found is None or checkpoint_rows.find_by_id(connection, found).state != CheckpointState.DELETED:
        return None
    return found


def deleted_error(name: CheckpointName, row: CheckpointRow) -> NotFoundError:
    """Returns the error for a checkpoint that was deleted."""
    full = CheckpointName(name.part, CheckpointId.full(row.step, row.session, row.attempt, row.incarnation))
    if row.flags & (checkpoint_rows.FILES_GOING | checkpoint_rows.PURGED):
        gone = "and its data files too" if row.flags & checkpoint_rows.FILES_GOING else "for good"
        told = f"{name.ref} was deleted, {gone}; `shardbook ls {name.part.ref}` lists what there is"
    else:
        told = f"{name.ref} was deleted; `shardbook undelete {full.ref}` brings it back"
    return NotFoundError(told, reason="CHECKPOINT_DELETED", metadata={"name": str(full)})


def resolve_committed(connection: Connection, name: CheckpointName) -> CheckpointRow:
    """Returns the committed checkpoint that a name means.

    Raises:
        NotFoundError: It means none, or one that was deleted (``CHECKPOINT_DELETED``).
        FailedPreconditionError: It means one that is not committed; reason ``NOT_COMMITTED``.
    """
    checkpoint_id = resolve(connection, name)
    row = checkpoint_rows.find_by_id(connection, checkpoint_id)
    _check_committed(row, name)
    return row


def committed_info(
    connection: Connection, name: CheckpointName, *, show_deleted: bool = False
) -> tuple[CheckpointRow, CheckpointInfo]:
    """Returns the committed checkpoint that a name means, as a row and as it is answered; raises as above.

    With ``show_deleted`` also one that was deleted and not purged yet.
    """
    listed = _find_at_once(connection, name)
    if listed is None:
        listed = listed_by_id(connection, resolve(connection, name))
    is_kept = listed.row.state == CheckpointState.DELETED and not listed.row.flags & checkpoint_rows.PURGED
    if not (show_deleted and is_kept):
        _check_committed(listed.row, name)
    return listed.row, checkpoint_of(listed)


def _find_at_once(connection: Connection, name: CheckpointName) -> ListedCheckpoint | None:
    """Returns what the names mean that loaders use, by one statement; None for other names and what is not there."""
    if name.id.alias == LATEST:
        return named_rows.find_latest(connection, name.part)
    if name.id.step is None or name.id.session is not None:
        return None
    return named_rows.find_live(connection, name.part, name.id.step)


def _check_committed(row: CheckpointRow, name: CheckpointName) -> None:
    if row.state == CheckpointState.DELETED:
        raise deleted_error(name, row)
    if row.state != CheckpointState.COMMITTED:
        state = CheckpointState(row.state).name
        raise FailedPreconditionError(f"{name.ref} is {state}, not COMMITTED", reason="NOT_COMMITTED")


def committed_by_id(connection: Connection, checkpoint_id: int) -> CheckpointRow:
    """Returns a checkpoint that was committed when another answer named it; raises NotFoundError when it is gone."""
    row = checkpoint_rows.find_by_ids(connection, [checkpoint_id]).get(checkpoint_id)
    if row is None or row.state != CheckpointState.COMMITTED:
        raise NotFoundError("the checkpoint does not exist any more")
    return row


def _resolve(connection: Connection, part: PartRow, name: CheckpointId) -> int | None:
    if name.alias is not None:
        if name.alias == LATEST:
            return part.latest_id
        held = alias_rows.find_alias(connection, part.id, name.alias)
        return None if held is None else held.checkpoint_id
    if name.step is None:
        return None
    if name.session is None:
        live = checkpoint_rows.find_live(connection, part.id, name.step)
        return None if live is None else live.id
    return _exactly(connection, part.id, name.step, name)


def _exactly(connection: Connection, part_id: int, step: int, name: CheckpointId) -> int | None:
    return checkpoint_rows.newest_attempt(
        connection,
        part_id,
        step,
        session=name.session or 0,
        attempt=name.attempt,
        incarnation_prefix=name.incarnation,
        committed_only=name.attempt is None,
    )
