"""Staging of plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, select, tuple_

from shardbook_server.storage.dialect import insert_ignore
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import plan_submissions, rank_structures


@dataclass(frozen=True, order=True)
class PlanRow:
    """A rank's plan while its attempt is open."""

    checkpoint_id: int
    rank: int
    plan_id: int
    lowest_rank: int
    host: str


def find_plans(connection: Connection, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], PlanRow]:
    """Returns the plans that exist among (checkpoint id, rank)."""
    found: dict[tuple[int, int], PlanRow] = {}
    for some in slices(keys):
        where = tuple_(plan_submissions.c.checkpoint_id, plan_submissions.c.rank).in_(list(some))
        for row in connection.execute(select(plan_submissions).where(where)):
            found[row.checkpoint_id, row.rank] = PlanRow(*row)
    return found


def insert_plans(connection: Connection, rows: Sequence[PlanRow]) -> set[tuple[int, int]]:
    """Adds plans, by (checkpoint, rank); returns the keys of those that are new. The others stay as they were."""
    if not rows:
        return set()
    statement = insert_ignore(connection, plan_submissions)
    returning = statement.returning(plan_submissions.c.checkpoint_id, plan_submissions.c.rank)
    return {
        (checkpoint_id, rank)
        for checkpoint_id, rank in connection.execute(returning, [vars(row) for row in sorted(rows)])
    }


def count_plans(connection: Connection, checkpoint_ids: Sequence[int]) -> dict[int, int]:
    """Returns how many ranks planned, by checkpoint; checkpoints without any are left out."""
    counts: dict[int, int] = {}
    column = plan_submissions.c.checkpoint_id
    for some in slices(checkpoint_ids):
        statement = select(column, func.count()).where(column.in_(some)).group_by(column)
        counts.update(connection.execute(statement).all())
    return counts


def read_digests(connection: Connection, checkpoint_id: int) -> list[tuple[bytes, int]]:
    """Returns digest and ``lowest_rank`` of the plans of an attempt, by rank."""
    statement = (
        select(rank_structures.c.digest, plan_submissions.c.lowest_rank)
        .join(rank_structures, rank_structures.c.id == plan_submissions.c.plan_id)
        .where(plan_submissions.c.checkpoint_id == checkpoint_id)
        .order_by(plan_submissions.c.rank)
    )
    return [(digest, lowest_rank) for digest, lowest_rank in connection.execute(statement)]


def read_planned(connection: Connection, checkpoint_id: int) -> dict[int, str]:
    """Returns the hosts of the ranks of an attempt that planned, by rank, in order."""
    columns = (plan_submissions.c.rank, plan_submissions.c.host)
    statement = select(*columns).where(plan_submissions.c.checkpoint_id == checkpoint_id)
    return dict(connection.execute(statement.order_by(plan_submissions.c.rank)).all())


def read_hosts(connection: Connection, checkpoint_id: int, ranks: Sequence[int]) -> dict[int, str]:
    """Returns the hosts of ranks that planned."""
    where = (plan_submissions.c.checkpoint_id == checkpoint_id, plan_submissions.c.rank.in_(ranks))
    rows = connection.execute(select(plan_submissions.c.rank, plan_submissions.c.host).where(*where))
    return dict(rows.all())


def delete_plans(connection: Connection, checkpoint_ids: Sequence[int]) -> None:
    """Empties the staging of attempts that are closed."""
    for some in slices(sorted(checkpoint_ids)):
        connection.execute(delete(plan_submissions).where(plan_submissions.c.checkpoint_id.in_(some)))
