"""What operators watch in the database: staging, and when running parts last committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, and_, func, select

from shardbook_server.storage.tables import (
    IS_RUNNING,
    IS_STAGED,
    checkpoints,
    leases,
    parts,
    plan_submissions,
    projects,
    registrations,
    runs,
    sessions,
)


@dataclass(frozen=True)
class RunningRow:
    """A part whose current session has a running lease; ``latest_time_us`` is when ``latest`` was committed."""

    project: str
    run: str
    part: str
    start_time_us: int
    latest_time_us: int | None


def count_staged(connection: Connection) -> int:
    """Returns how many plans and registrations lie in staging."""
    # By the short index of what is staged: on Postgres a walk would read rows that were deleted long ago as well.
    staged = select(checkpoints.c.id).where(IS_STAGED)
    counts = [
        select(func.count()).select_from(table).where(table.c.checkpoint_id.in_(staged)).scalar_subquery()
        for table in (plan_submissions, registrations)
    ]
    return sum(connection.execute(select(*counts)).one())


def find_running(connection: Connection, limit: int) -> Sequence[RunningRow]:
    """Returns parts with a running lease, those first that were heard of last."""
    # By the end of the lease, which the short index is ordered by: all leases are equally long.
    last = (
        select(leases.c.part_id, leases.c.session, leases.c.expire_time_us)
        .where(IS_RUNNING)
        .order_by(leases.c.expire_time_us.desc())
        .limit(limit)
        .subquery()
    )
    is_its_session = and_(sessions.c.part_id == last.c.part_id, sessions.c.number == last.c.session)
    statement = (
        select(projects.c.name, runs.c.name, parts.c.name, sessions.c.start_time_us, checkpoints.c.commit_time_us)
        .select_from(last)
        .join(sessions, is_its_session)
        .join(parts, parts.c.id == last.c.part_id)
        .join(runs, runs.c.id == parts.c.run_id)
        .join(projects, projects.c.id == runs.c.project_id)
        .outerjoin(checkpoints, checkpoints.c.id == parts.c.latest_id)
        .order_by(last.c.expire_time_us.desc())
    )
    return [RunningRow(*row) for row in connection.execute(statement)]
