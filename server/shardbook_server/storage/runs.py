"""Projects, runs and parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, func, select, tuple_, update

from shardbook.core.names import PartName, RunName
from shardbook_server.storage.dialect import insert_ignore
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import IS_LIVE, checkpoints, leases, parts, projects, runs, sessions


@dataclass(frozen=True)
class PartRow:
    """A part with its current session.

    Attributes:
        id: Key.
        run_id: Key of its run.
        project_id: Key of its project.
        name: Run and part.
        session: Number of the current session; 0 when there is none yet.
        last_session: Highest number ever seen.
        latest_id: Key of the checkpoint that ``latest`` means.
        incarnation: Of the current session; None without one.
    """

    id: int
    run_id: int
    project_id: int
    name: PartName
    session: int
    last_session: int
    latest_id: int | None
    incarnation: bytes | None


@dataclass(frozen=True)
class RunRow:
    """A run."""

    id: int
    name: RunName
    create_time_us: int


@dataclass(frozen=True)
class PartStatusRow:
    """Where a part stands: its session, its lease, and what it holds; columns of absent ones are None."""

    run_id: int
    part_id: int
    part: str
    session: int
    latest_id: int | None
    host: str | None
    user: str | None
    job_id: str | None
    seen_time_us: int | None
    expire_time_us: int | None
    checkpoint_count: int


def find_parts(connection: Connection, names: Sequence[PartName]) -> dict[PartName, PartRow]:
    """Returns the parts that exist among ``names``."""
    found: dict[PartName, PartRow] = {}
    for some in slices(names):
        wanted = [(name.run.project, name.run.run, name.part) for name in some]
        where = tuple_(projects.c.name, runs.c.name, parts.c.name).in_(wanted)
        for row in connection.execute(_PARTS.where(where)):
            part = _part(row)
            found[part.name] = part
    return found


def part_by_id(connection: Connection, part_id: int) -> PartRow:
    """Returns one part."""
    return _part(connection.execute(_PARTS.where(parts.c.id == part_id)).one())


def names_of_parts(connection: Connection, part_ids: Sequence[int]) -> dict[int, PartName]:
    """Returns the names of parts by their keys."""
    found: dict[int, PartName] = {}
    columns = (parts.c.id, projects.c.name, runs.c.name, parts.c.name)
    joined = select(*columns).join(runs, runs.c.id == parts.c.run_id).join(projects, projects.c.id == runs.c.project_id)
    for some in slices(part_ids):
        for part_id, project, run, part in connection.execute(joined.where(parts.c.id.in_(some))):
            found[part_id] = PartName(RunName(project, run), part)
    return found


def ensure_part(connection: Connection, name: PartName, now_us: int) -> PartRow:
    """Returns a part; makes it, its run and its project when they are new."""
    found = find_parts(connection, [name])
    if name not in found:
        connection.execute(insert_ignore(connection, projects).values(name=name.run.project))
        project_id = connection.scalar(select(projects.c.id).where(projects.c.name == name.run.project))
        run = {"project_id": project_id, "name": name.run.run}
        connection.execute(insert_ignore(connection, runs).values(**run, create_time_us=now_us))
        run_id = connection.scalar(
            select(runs.c.id).where(runs.c.project_id == project_id, runs.c.name == name.run.run)
        )
        part = {"run_id": run_id, "name": name.part, "session": 0, "last_session": 0}
        connection.execute(insert_ignore(connection, parts).values(**part))
        found = find_parts(connection, [name])
    return found[name]


def set_session(connection: Connection, part_id: int, number: int) -> None:
    """Makes ``number`` the current session of a part."""
    connection.execute(update(parts).where(parts.c.id == part_id).values(session=number, last_session=number))


def raise_last_session(connection: Connection, part_id: int, number: int) -> None:
    """Keeps session numbers growing beyond ``number``, which a recovered attempt has."""
    where = and_(parts.c.id == part_id, parts.c.last_session < number)
    connection.execute(update(parts).where(where).values(last_session=number))


def set_latest(connection: Connection, part_id: int, checkpoint_id: int | None) -> None:
    """Makes ``latest`` of a part mean a checkpoint, or none."""
    connection.execute(update(parts).where(parts.c.id == part_id).values(latest_id=checkpoint_id))


def latest_of(connection: Connection, part_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (part id, checkpoint id) of the parts whose ``latest`` means a checkpoint."""
    found: list[tuple[int, int]] = []
    for some in slices(part_ids):
        statement = select(parts.c.id, parts.c.latest_id).where(parts.c.id.in_(some), parts.c.latest_id.is_not(None))
        found += [(part_id, latest_id) for part_id, latest_id in connection.execute(statement)]
    return found


def page_of_projects(connection: Connection, after: str | None, count: int) -> list[tuple[str, int]]:
    """Returns (name, number of runs) of projects behind ``after``, by name."""
    run_count = select(func.count()).where(runs.c.project_id == projects.c.id).correlate(projects).scalar_subquery()
    statement = select(projects.c.name, run_count).order_by(projects.c.name).limit(count)
    if after is not None:
        statement = statement.where(projects.c.name > after)
    return [(name, number) for name, number in connection.execute(statement)]


def find_project(connection: Connection, name: str) -> int | None:
    """Returns the key of a project; None when nothing has been saved in it."""
    return connection.scalar(select(projects.c.id).where(projects.c.name == name))


def project_name(connection: Connection, project_id: int) -> str:
    """Returns the name of a project."""
    name: str = connection.execute(select(projects.c.name).where(projects.c.id == project_id)).scalar_one()
    return name


def find_run(connection: Connection, name: RunName) -> RunRow | None:
    """Returns a run; None when there is none."""
    where = and_(projects.c.name == name.project, runs.c.name == name.run)
    row = connection.execute(_RUNS.where(where)).one_or_none()
    return None if row is None else _run(row)


def page_of_runs(
    connection: Connection, project: str | None, after: tuple[str, str] | None, count: int
) -> list[RunRow]:
    """Returns runs ordered by (project, run) behind ``after``, of one project or of all."""
    statement = _RUNS.order_by(projects.c.name, runs.c.name).limit(count)
    if project is not None:
        statement = statement.where(projects.c.name == project)
    if after is not None:
        statement = statement.where(tuple_(projects.c.name, runs.c.name) > tuple_(*after))
    return [_run(row) for row in connection.execute(statement)]


def list_parts(connection: Connection, run: RunName) -> list[tuple[int, str]]:
    """Returns (id, name) of the parts of a run, by name; none when there is no such run."""
    statement = (
        select(parts.c.id, parts.c.name)
        .join(runs, runs.c.id == parts.c.run_id)
        .join(projects, projects.c.id == runs.c.project_id)
        .where(projects.c.name == run.project, runs.c.name == run.run)
        .order_by(parts.c.name)
    )
    return [(part_id, name) for part_id, name in connection.execute(statement)]


def part_statuses(connection: Connection, run_ids: Sequence[int]) -> list[PartStatusRow]:
    """Returns where the parts of runs stand, by run and name of part."""
    count = select(func.count()).where(checkpoints.c.part_id == parts.c.id, IS_LIVE).correlate(parts).scalar_subquery()
    statement = (
        select(
            parts.c.run_id,
            parts.c.id,
            parts.c.name,
            parts.c.session,
            parts.c.latest_id,
            sessions.c.host,
            sessions.c.user,
            sessions.c.job_id,
            leases.c.seen_time_us,
            leases.c.expire_time_us,
            count,
        )
        .select_from(parts)
        .outerjoin(sessions, and_(sessions.c.part_id == parts.c.id, sessions.c.number == parts.c.session))
        .outerjoin(leases, leases.c.part_id == parts.c.id)
        .order_by(parts.c.run_id, parts.c.name)
    )
    rows: list[PartStatusRow] = []
    for some in slices(run_ids):
        rows += [PartStatusRow(*row) for row in connection.execute(statement.where(parts.c.run_id.in_(some)))]
    return rows


_PARTS: Select[*tuple[Any, ...]] = (
    select(
        parts.c.id,
        parts.c.run_id,
        runs.c.project_id,
        projects.c.name,
        runs.c.name,
        parts.c.name,
        parts.c.session,
        parts.c.last_session,
        parts.c.latest_id,
        sessions.c.incarnation,
    )
    .select_from(parts)
    .join(runs, runs.c.id == parts.c.run_id)
    .join(projects, projects.c.id == runs.c.project_id)
    .outerjoin(sessions, and_(sessions.c.part_id == parts.c.id, sessions.c.number == parts.c.session))
)
_RUNS: Select[*tuple[Any, ...]] = select(runs.c.id, projects.c.name, runs.c.name, runs.c.create_time_us).join(
    projects, projects.c.id == runs.c.project_id
)


def _part(row: Row[*tuple[Any, ...]]) -> PartRow:
    part_id, run_id, project_id, project, run, part, session, last_session, latest_id, incarnation = row
    return PartRow(
        part_id,
        run_id,
        project_id,
        PartName(RunName(project, run), part),
        session,
        last_session,
        latest_id,
        incarnation,
    )


def _run(row: Row[*tuple[Any, ...]]) -> RunRow:
    run_id, project, run, create_time_us = row
    return RunRow(run_id, RunName(project, run), create_time_us)
