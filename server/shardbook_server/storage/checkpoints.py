"""Checkpoints: one row an attempt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, func, select, tuple_, update

from shardbook_server.storage.dialect import among, insert_ignore, lock_rows
from shardbook_server.storage.lists import slices
from shardbook_server.storage.locations import packed_others, unpacked
from shardbook_server.storage.tables import (
    IS_LIVE,
    IS_STAGED,
    checkpoint_structures,
    checkpoints,
    parts,
    projects,
    runs,
)

#: (part id, session, step, attempt, incarnation): the natural key.
Key = tuple[int, int, int, int, bytes]

#: States by number, as in ``shardbook.v1.CheckpointState``.
OPEN, COMMITTED, FAILED, EXPIRED, DELETED = 1, 2, 3, 4, 5
#: Bits of ``flags``. Data files are known to be lost; their deletion was begun, so that no way leads back; it was
#: ended; and what the catalogue knew of it is gone.
DATA_MISSING, FILES_GOING, FILES_GONE, PURGED = 1, 2, 4, 8


@dataclass(frozen=True)
class CheckpointRow:
    """One attempt as stored; see ``tables.checkpoints``."""

    id: int
    part_id: int
    session: int
    step: int
    attempt: int
    incarnation: bytes
    world_size: int
    registration_count: int
    state: int
    live: bool
    staged: bool
    recovered: bool
    explicit: bool
    location: str
    prefix: str
    create_time_us: int
    commit_time_us: int | None
    write_time_us: int | None
    structure_id: int | None
    size_bytes: int
    metadata_header: bytes
    failure: str
    failed_rank: int | None
    failed_host: str | None
    failed_phase: str | None
    delete_time_us: int | None
    purge_time_us: int | None
    flags: int

    @property
    def key(self) -> Key:
        """The natural key."""
        return self.part_id, self.session, self.step, self.attempt, self.incarnation


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint with its names and what its structure says; the latter is 0 or empty until it is committed."""

    row: CheckpointRow
    project: str
    run: str
    part: str
    structure_digest: bytes
    tensor_count: int
    chunk_count: int
    bytes_entry_count: int
    warnings: str
    latest_id: int | None
    packed_locations: str | None

    @property
    def other_locations(self) -> tuple[str, ...]:
        """Where it is beside its first location, in order."""
        return unpacked(self.packed_locations)


@dataclass(frozen=True)
class NewCheckpoint:
    """What an attempt starts with."""

    key: Key
    world_size: int
    registration_count: int
    location: str
    prefix: str
    recovered: bool = False
    write_time_us: int | None = None
    metadata_header: bytes = b""


def open_checkpoints(connection: Connection, news: Sequence[NewCheckpoint], now_us: int) -> None:
    """Opens attempts; those that exist stay as they are."""
    rows = [
        {
            "part_id": new.key[0],
            "session": new.key[1],
            "step": new.key[2],
            "attempt": new.key[3],
            "incarnation": new.key[4],
            "world_size": new.world_size,
            "registration_count": new.registration_count,
            "state": OPEN,
            "live": 0,
            "staged": 1,
            "recovered": int(new.recovered),
            "explicit": 0,
            "location": new.location,
            "prefix": new.prefix,
            "create_time_us": now_us,
            "write_time_us": new.write_time_us,
            "size_bytes": 0,
            "metadata_header": new.metadata_header,
            "failure": "",
        }
        for new in sorted(news, key=lambda new: new.key)
    ]
    if rows:
        connection.execute(insert_ignore(connection, checkpoints), rows)


def find_checkpoints(connection: Connection, keys: Sequence[Key]) -> dict[Key, CheckpointRow]:
    """Returns the attempts that exist among ``keys``."""
    columns = tuple_(*(checkpoints.c[name] for name in ("part_id", "session", "step", "attempt", "incarnation")))
    found: dict[Key, CheckpointRow] = {}
    for some in slices(keys):
        for row in connection.execute(select(checkpoints).where(columns.in_(list(some)))):
            checkpoint = _checkpoint(row)
            found[checkpoint.key] = checkpoint
    return found


def find_by_id(connection: Connection, checkpoint_id: int) -> CheckpointRow:
    """Returns an attempt that exists."""
    return find_by_ids(connection, [checkpoint_id])[checkpoint_id]


def find_by_ids(connection: Connection, ids: Sequence[int]) -> dict[int, CheckpointRow]:
    """Returns checkpoints by id; unknown ones are left out."""
    found: dict[int, CheckpointRow] = {}
    for some in slices(ids):
        rows = connection.execute(select(checkpoints).where(checkpoints.c.id.in_(some)))
        found.update({row.id: _checkpoint(row) for row in rows})
    return found


def lock_committed(connection: Connection, ids: Sequence[int], *, shared: bool = False) -> set[int]:
    """Locks checkpoints until the transaction ends; returns those that are committed then.

    Who claims one shares its lock, who deletes it has it alone: so neither misses the other. SQLite has one writer.
    """
    found: set[int] = set()
    for statement in _committed(ids):
        found.update(connection.scalars(statement.with_for_update(read=shared, key_share=not shared)))
    return found


def find_committed(connection: Connection, ids: Sequence[int]) -> set[int]:
    """Returns those of some checkpoints that are committed now."""
    return {one for statement in _committed(ids) for one in connection.scalars(statement)}


def _committed(ids: Sequence[int]) -> Iterator[Select[int]]:
    for some in slices(sorted(ids)):
        where = (checkpoints.c.id.in_(some), checkpoints.c.state == COMMITTED)
        yield select(checkpoints.c.id).where(*where).order_by(checkpoints.c.id)


def read_staged(connection: Connection, part_ids: Sequence[int]) -> list[CheckpointRow]:
    """Returns the attempts of parts that may still be completed: few, whatever the parts hold."""
    found: list[CheckpointRow] = []
    for some in slices(part_ids):
        rows = connection.execute(select(checkpoints).where(checkpoints.c.part_id.in_(some), IS_STAGED))
        found.extend(map(_checkpoint, rows))
    return found


def reopen(connection: Connection, ids: Sequence[int], *, staged: bool = False) -> None:
    """Turns EXPIRED attempts OPEN again: their writers are back.

    ``staged`` is for one that was superseded, so that its staging has been emptied, and is now recorded as history.
    """
    values = {"state": OPEN, "staged": 1, "recovered": 1} if staged else {"state": OPEN}
    for some in slices(lock_rows(connection, checkpoints.c.id, ids)):
        where = and_(checkpoints.c.id.in_(some), checkpoints.c.state == EXPIRED)
        connection.execute(update(checkpoints).where(where).values(**values))


def fail(
    connection: Connection,
    checkpoint_id: int,
    failure: str,
    *,
    rank: int | None = None,
    host: str | None = None,
    phase: str | None = None,
) -> None:
    """Turns an attempt FAILED for good."""
    connection.execute(
        update(checkpoints)
        .where(checkpoints.c.id == checkpoint_id)
        .values(state=FAILED, staged=0, failure=failure, failed_rank=rank, failed_host=host, failed_phase=phase)
    )


def expire_open(connection: Connection, part_id: int) -> list[int]:
    """Turns the OPEN attempts of a part EXPIRED; returns them. Their writers may still come back."""
    where = and_(checkpoints.c.part_id == part_id, IS_STAGED, checkpoints.c.state == OPEN)
    statement = update(checkpoints).where(where).values(state=EXPIRED).returning(checkpoints.c.id)
    return sorted(connection.scalars(statement))


def expire_superseded(connection: Connection, part_id: int) -> tuple[list[int], list[int]]:
    """Closes the staged attempts of a part's numbered sessions for good; returns (all of them, those that were OPEN).

    Attempts of session 0 are history that is being recorded: no session supersedes them.
    """
    # Judged here, not in the statement: a bound on the session would lead the planner away from the short index.
    columns = (checkpoints.c.id, checkpoints.c.state, checkpoints.c.session)
    rows = connection.execute(select(*columns).where(checkpoints.c.part_id == part_id, IS_STAGED))
    staged = sorted((checkpoint_id, state) for checkpoint_id, state, session in rows if session > 0)
    for some in slices([checkpoint_id for checkpoint_id, _ in staged]):
        connection.execute(update(checkpoints).where(checkpoints.c.id.in_(some)).values(state=EXPIRED, staged=0))
    return [checkpoint_id for checkpoint_id, _ in staged], [one for one, state in staged if state == OPEN]


def find_stale_records(connection: Connection, before_us: int, limit: int) -> list[tuple[int, int]]:
    """Returns (id, part id) of recordings, which no lease covers, that were opened before a time."""
    where = and_(IS_STAGED, checkpoints.c.recovered == 1, checkpoints.c.create_time_us < before_us)
    # Not ordered by id: that would be a walk over the whole table.
    statement = (
        select(checkpoints.c.id, checkpoints.c.part_id).where(where).order_by(checkpoints.c.part_id).limit(limit)
    )
    return [(checkpoint_id, part_id) for checkpoint_id, part_id in connection.execute(statement)]


def expire_record(connection: Connection, checkpoint_id: int) -> bool:
    """Turns a recording EXPIRED whose staging is about to be emptied; False when it was finished in between."""
    where = and_(checkpoints.c.id == checkpoint_id, IS_STAGED)
    return connection.execute(update(checkpoints).where(where).values(state=EXPIRED, staged=0)).rowcount == 1


def set_header(connection: Connection, checkpoint_id: int, header: bytes, write_time_us: int | None) -> None:
    """Gives an attempt what only RecordCheckpoint knows."""
    values = {"metadata_header": header, "write_time_us": write_time_us}
    connection.execute(update(checkpoints).where(checkpoints.c.id == checkpoint_id).values(**values))


def find_live(connection: Connection, part_id: int, step: int) -> CheckpointRow | None:
    """Returns the one live committed checkpoint of a step; None when there is none."""
    where = and_(checkpoints.c.part_id == part_id, checkpoints.c.step == step, IS_LIVE)
    row = connection.execute(select(checkpoints).where(where)).one_or_none()
    return None if row is None else _checkpoint(row)


def supersede(connection: Connection, checkpoint_id: int) -> None:
    """Makes a live checkpoint one that ``@step`` does not mean any more."""
    connection.execute(update(checkpoints).where(checkpoints.c.id == checkpoint_id).values(live=0))


def commit(
    connection: Connection,
    checkpoint_id: int,
    *,
    live: bool,
    recovered: bool,
    explicit: bool,
    structure_id: int,
    size_bytes: int,
    now_us: int,
) -> None:
    """Turns an attempt COMMITTED."""
    connection.execute(
        update(checkpoints)
        .where(checkpoints.c.id == checkpoint_id)
        .values(
            state=COMMITTED,
            live=int(live),
            staged=0,
            recovered=int(recovered),
            explicit=int(explicit),
            structure_id=structure_id,
            size_bytes=size_bytes,
            commit_time_us=now_us,
        )
    )


def find_listed(connection: Connection, ids: Sequence[int]) -> dict[int, ListedCheckpoint]:
    """Returns checkpoints with their names and structures, by id; unknown ones are left out."""
    found: dict[int, ListedCheckpoint] = {}
    statement = _listed_by_ids(connection.dialect.name)
    for some in slices(ids):
        rows = [listed_of(row) for row in connection.execute(statement, {"ids": list(some)}).all()]
        found.update({listed.row.id: listed for listed in rows})
    return found


def has_attempts(connection: Connection, part_id: int, step: int, *, session: int | None = None) -> bool:
    """Returns True when anybody, or one session, ever began to save a step."""
    statement = select(checkpoints.c.id).where(checkpoints.c.part_id == part_id, checkpoints.c.step == step).limit(1)
    if session is not None:
        statement = statement.where(checkpoints.c.session == session)
    return connection.scalar(statement) is not None


def newest_attempt(
    connection: Connection,
    part_id: int,
    step: int,
    *,
    session: int,
    attempt: int | None = None,
    incarnation_prefix: str | None = None,
    committed_only: bool = True,
) -> int | None:
    """Returns the newest attempt of a step and session, by attempt and then by time; None when there is none."""
    statement = (
        select(checkpoints.c.id)
        .where(checkpoints.c.part_id == part_id, checkpoints.c.session == session, checkpoints.c.step == step)
        .order_by(checkpoints.c.attempt.desc(), checkpoints.c.id.desc())
        .limit(1)
    )
    if committed_only:
        statement = statement.where(checkpoints.c.state == COMMITTED)
    if attempt is not None:
        statement = statement.where(checkpoints.c.attempt == attempt)
    if incarnation_prefix is not None:
        # Lower-case hex sorts as the bytes do, so a prefix is a range of the key.
        low = bytes.fromhex(incarnation_prefix)
        statement = statement.where(checkpoints.c.incarnation.between(low, low + b"\xff" * (16 - len(low))))
    return connection.scalar(statement)


_STRUCTURE = (
    func.coalesce(checkpoint_structures.c.digest, b""),
    func.coalesce(checkpoint_structures.c.tensor_count, 0),
    func.coalesce(checkpoint_structures.c.chunk_count, 0),
    func.coalesce(checkpoint_structures.c.bytes_entry_count, 0),
    func.coalesce(checkpoint_structures.c.warnings, "[]"),
)
_SHOWN = (projects.c.name, runs.c.name, parts.c.name, *_STRUCTURE, parts.c.latest_id, packed_others())
#: Checkpoints with their names and structures.
LISTED: Select[*tuple[Any, ...]] = (
    select(checkpoints, *_SHOWN)
    .select_from(checkpoints)
    .join(parts, parts.c.id == checkpoints.c.part_id)
    .join(runs, runs.c.id == parts.c.run_id)
    .join(projects, projects.c.id == runs.c.project_id)
    .outerjoin(checkpoint_structures, checkpoint_structures.c.id == checkpoints.c.structure_id)
)


@cache
def _listed_by_ids(dialect: str) -> Select[*tuple[Any, ...]]:
    return LISTED.where(among(dialect, checkpoints.c.id))


_WIDTH = len(checkpoints.c)
_FLAGS = [list(checkpoints.c.keys()).index(name) for name in ("live", "staged", "recovered", "explicit")]


def _checkpoint(row: Row[*tuple[Any, ...]]) -> CheckpointRow:
    values = list(row)[:_WIDTH]
    for at in _FLAGS:
        values[at] = bool(values[at])
    return CheckpointRow(*values)


def listed_of(row: Row[*tuple[Any, ...]]) -> ListedCheckpoint:
    """Returns a row of ``LISTED``."""
    return ListedCheckpoint(_checkpoint(row), *list(row)[_WIDTH:])
