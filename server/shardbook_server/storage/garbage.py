"""What nobody refers to any more: walks that find it, and deletions that cannot meet a new reference.

Whoever refers to a row of ``rank_structures`` or ``checkpoint_structures`` by a foreign key holds it FOR KEY SHARE from
that moment (Postgres does so for every foreign key), so a row that could be locked here, and has no reference then,
gets none any more: a writer that wanted it waits, and is told that it is gone. Rows that others hold are left for the
next time, so nothing here ever waits for a writer. Packed lists of ids are no foreign keys: they are written under the
project's lock ``structures/{id}``, and so are these deletions. On SQLite the one writer's transaction is all that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Connection, Table, and_, delete, exists, func, select

from shardbook.core.structure import BlobKind
from shardbook_server.storage.checkpoints import EXPIRED
from shardbook_server.storage.lists import IN_LIST, slices
from shardbook_server.storage.tables import (
    IS_STAGED,
    checkpoint_structures,
    checkpoints,
    leases,
    plan_submissions,
    projects,
    rank_structures,
    registrations,
    save_plans,
    structure_tensors,
)

#: Rows without payloads, and packed lists, that are read at a time.
_PAGE: Final = 5000
_LISTS: Final = 50


@dataclass(frozen=True)
class ListsRow:
    """What a checkpoint structure refers to, packed; ``is_garbage`` when no checkpoint has it and it is old."""

    id: int
    digest: bytes
    is_garbage: bool
    size_bytes: int
    rank_structure_ids: bytes
    tensor_ids: bytes


@dataclass(frozen=True)
class WalkedBlob:
    """A blob of ranks without its payload."""

    id: int
    kind: int
    reference_id: int | None
    last_used_day: int
    size_bytes: int


def read_projects(connection: Connection) -> list[int]:
    """Returns the keys of all projects."""
    return list(connection.scalars(select(projects.c.id).order_by(projects.c.id)))


def walk_lists(connection: Connection, project_id: int, last_day: int) -> Iterator[ListsRow]:
    """Yields the checkpoint structures of a project; old are those not used after ``last_day``."""
    after = b""
    while True:
        where = (checkpoint_structures.c.project_id == project_id, checkpoint_structures.c.digest > after)
        statement = _LISTS_OF.add_columns(_is_unused_structure(last_day))
        page = connection.execute(statement.where(*where).order_by(checkpoint_structures.c.digest).limit(_LISTS)).all()
        for row in page:
            size_bytes = row.head_bytes + len(row.rank_structure_ids) + len(row.tensor_ids)
            yield ListsRow(row.id, row.digest, bool(row[-1]), size_bytes, row.rank_structure_ids, row.tensor_ids)
        if len(page) < _LISTS:
            return
        after = page[-1].digest


def read_lists_behind(connection: Connection, project_id: int, structure_id: int) -> list[tuple[int, bytes, bytes]]:
    """Returns (id, rank structures, tensors) of a project's checkpoint structures that are younger than one."""
    where = (checkpoint_structures.c.project_id == project_id, checkpoint_structures.c.id > structure_id)
    columns = (
        checkpoint_structures.c.id,
        checkpoint_structures.c.rank_structure_ids,
        checkpoint_structures.c.tensor_ids,
    )
    rows = connection.execute(select(*columns).where(*where).order_by(checkpoint_structures.c.id))
    return [(key, rank_ids, tensor_ids) for key, rank_ids, tensor_ids in rows]


def walk_tensors(connection: Connection, project_id: int) -> Iterator[list[tuple[int, int]]]:
    """Yields pages of (id, bytes) of a project's tensors."""
    after = b""
    columns = (structure_tensors.c.digest, structure_tensors.c.id, func.length(structure_tensors.c.payload))
    while True:
        where = (structure_tensors.c.project_id == project_id, structure_tensors.c.digest > after)
        statement = select(*columns).where(*where).order_by(structure_tensors.c.digest).limit(_PAGE)
        page = connection.execute(statement).all()
        yield [(key, size_bytes) for _, key, size_bytes in page]
        if len(page) < _PAGE:
            return
        after = page[-1][0]


def walk_blobs(connection: Connection, project_id: int) -> Iterator[list[WalkedBlob]]:
    """Yields pages of a project's blobs; what refers to others comes before them."""
    for kind in sorted(BlobKind, reverse=True):
        after = b""
        while True:
            where = (
                rank_structures.c.project_id == project_id,
                rank_structures.c.kind == int(kind),
                rank_structures.c.digest > after,
            )
            statement = select(*_WALKED).where(*where).order_by(rank_structures.c.digest).limit(_PAGE)
            page = connection.execute(statement).all()
            yield [WalkedBlob(*row[1:]) for row in page]
            if len(page) < _PAGE:
                break
            after = page[-1][0]


def read_staged_blobs(connection: Connection) -> set[int]:
    """Returns the blobs that staging refers to: distinct ones are few, however many ranks there are."""
    found: set[int] = set()
    for column in (registrations.c.structure_id, plan_submissions.c.plan_id):
        found.update(connection.scalars(select(column).distinct()))
    return found


def drop_structures(connection: Connection, ids: Sequence[int], last_day: int) -> list[int]:
    """Deletes those checkpoint structures that no checkpoint has and nobody used after ``last_day``; returns them.

    Under the lock of their project.
    """
    return _drop(connection, checkpoint_structures, ids, _is_unused_structure(last_day))


def drop_blobs(connection: Connection, ids: Sequence[int], last_day: int) -> list[int]:
    """Deletes those blobs that neither staging nor another blob refers to; returns them.

    Under the lock of their project, and without those that packed lists refer to.
    """
    other = rank_structures.alias()
    unused = and_(
        rank_structures.c.last_used_day <= last_day,
        ~exists().where(registrations.c.structure_id == rank_structures.c.id),
        ~exists().where(plan_submissions.c.plan_id == rank_structures.c.id),
        ~exists().where(other.c.reference_id == rank_structures.c.id),
    )
    return _drop(connection, rank_structures, ids, unused)


def drop_tensors(connection: Connection, ids: Sequence[int]) -> list[int]:
    """Deletes tensors; returns those that were there. Under the lock of their project, as above."""
    dropped: list[int] = []
    key = structure_tensors.c.id
    for some in slices(ids):
        dropped.extend(connection.scalars(delete(structure_tensors).where(key.in_(some)).returning(key)))
    return dropped


def count_decisions(connection: Connection, project_id: int, last_day: int) -> tuple[int, int]:
    """Returns how many decisions of a project were not used after ``last_day``, and their bytes."""
    where = (save_plans.c.project_id == project_id, save_plans.c.last_used_day <= last_day)
    count = func.count(save_plans.c.digest.distinct())
    size_bytes = func.coalesce(func.sum(func.length(save_plans.c.payload)), 0)
    found, total = connection.execute(select(count, size_bytes).where(*where)).one()
    return int(found), int(total)


def drop_decisions(connection: Connection, project_id: int, last_day: int, limit: int) -> tuple[int, int]:
    """Deletes some decisions of a project that were not used after ``last_day``; returns their number and bytes.

    Under the lock of the project's decisions. Nobody refers to one: whoever lacks it decides the same anew.
    """
    old = (save_plans.c.project_id == project_id, save_plans.c.last_used_day <= last_day)
    statement = select(save_plans.c.digest).where(*old).distinct().order_by(save_plans.c.digest).limit(limit)
    digests = list(connection.scalars(statement))
    size_bytes = 0
    for some in slices(digests):
        gone = delete(save_plans).where(*old, save_plans.c.digest.in_(some))
        size_bytes += sum(connection.scalars(gone.returning(func.length(save_plans.c.payload))))
    return len(digests), size_bytes


def find_abandoned(connection: Connection, before_us: int, after_id: int, limit: int) -> list[tuple[int, int]]:
    """Returns (id, part id) of EXPIRED attempts that nobody superseded and whose lease ended before a time."""
    where = and_(
        IS_STAGED, checkpoints.c.state == EXPIRED, checkpoints.c.id > after_id, leases.c.expire_time_us < before_us
    )
    statement = (
        select(checkpoints.c.id, checkpoints.c.part_id)
        .join(leases, leases.c.part_id == checkpoints.c.part_id)
        .where(where)
        .order_by(checkpoints.c.id)
        .limit(limit)
    )
    return [(checkpoint_id, part_id) for checkpoint_id, part_id in connection.execute(statement)]


def staged_bytes(connection: Connection, checkpoint_id: int) -> int:
    """Returns the bytes that an attempt's registrations take in staging, about."""
    size = func.length(registrations.c.extents) + func.length(registrations.c.volatile)
    where = registrations.c.checkpoint_id == checkpoint_id
    return int(connection.scalar(select(func.coalesce(func.sum(size), 0)).where(where)) or 0)


def _is_unused_structure(last_day: int) -> ColumnElement[bool]:
    is_old = checkpoint_structures.c.last_used_day <= last_day
    return and_(is_old, ~exists().where(checkpoints.c.structure_id == checkpoint_structures.c.id))


def _drop(connection: Connection, table: Table, ids: Sequence[int], unused: ColumnElement[bool]) -> list[int]:
    dropped: list[int] = []
    key: Column[Any] = table.c.id
    for some in slices(sorted(ids), IN_LIST):
        mine: Sequence[int] = some
        if connection.dialect.name == "postgresql":
            # Against whoever is about to refer to one: FOR UPDATE and FOR KEY SHARE keep each other off.
            locked = select(key).where(key.in_(some)).order_by(key).with_for_update(skip_locked=True)
            mine = list(connection.scalars(locked))
        # A statement of its own: it sees what those committed that held a row until it was locked here.
        dropped.extend(connection.scalars(delete(table).where(key.in_(mine), unused).returning(key)))
    return dropped


_LISTS_OF = select(
    checkpoint_structures.c.id,
    checkpoint_structures.c.digest,
    func.length(checkpoint_structures.c.head).label("head_bytes"),
    checkpoint_structures.c.rank_structure_ids,
    checkpoint_structures.c.tensor_ids,
)
_WALKED = (
    rank_structures.c.digest,
    rank_structures.c.id,
    rank_structures.c.kind,
    rank_structures.c.reference_id,
    rank_structures.c.last_used_day,
    func.length(rank_structures.c.payload),
)
