"""Sessions of parts, and the lease of the current one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, and_, case, delete, insert, select, tuple_, update

from shardbook_server.storage.dialect import lock_rows
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import IS_RUNNING, leases, parts, sessions

#: A lease that was renewed less than this ago is not written again.
RENEW_AFTER_US: Final = 1_000_000


@dataclass(frozen=True)
class SessionRow:
    """A session of a part; ``start_time_us`` is when its incarnation began, by the database's clock."""

    part_id: int
    number: int
    incarnation: bytes
    job_id: str
    host: str
    user: str
    start_time_us: int


@dataclass(frozen=True)
class LeaseRow:
    """The lease of a part's current session."""

    part_id: int
    session: int
    seen_time_us: int
    expire_time_us: int


def insert_session(connection: Connection, row: SessionRow) -> None:
    """Adds a session; its number must be new."""
    connection.execute(
        insert(sessions).values(
            part_id=row.part_id,
            number=row.number,
            incarnation=row.incarnation,
            job_id=row.job_id,
            host=row.host,
            user=row.user,
            start_time_us=row.start_time_us,
        )
    )


def find_session(
    connection: Connection, part_id: int, *, number: int | None = None, incarnation: bytes | None = None
) -> SessionRow | None:
    """Returns the session with a number or an incarnation; None when there is none."""
    where = sessions.c.number == number if incarnation is None else sessions.c.incarnation == incarnation
    row = connection.execute(select(sessions).where(sessions.c.part_id == part_id, where)).one_or_none()
    return None if row is None else SessionRow(*row)


def find_incarnations(connection: Connection, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    """Returns the incarnations of sessions given as (part id, number); unknown ones are left out."""
    found: dict[tuple[int, int], bytes] = {}
    for some in slices(keys):
        where = tuple_(sessions.c.part_id, sessions.c.number).in_(list(some))
        statement = select(sessions.c.part_id, sessions.c.number, sessions.c.incarnation).where(where)
        found.update({(part_id, number): incarnation for part_id, number, incarnation in connection.execute(statement)})
    return found


def find_lease(connection: Connection, part_id: int) -> LeaseRow | None:
    """Returns the lease of a part's current session; None before its first session."""
    columns = (leases.c.part_id, leases.c.session, leases.c.seen_time_us, leases.c.expire_time_us)
    row = connection.execute(select(*columns).where(leases.c.part_id == part_id)).one_or_none()
    return None if row is None else LeaseRow(*row)


def start_lease(connection: Connection, part_id: int, session: int, now_us: int, expire_time_us: int) -> None:
    """Gives the lease of a part to its new session."""
    connection.execute(delete(leases).where(leases.c.part_id == part_id))
    connection.execute(
        insert(leases).values(
            part_id=part_id, session=session, seen_time_us=now_us, expire_time_us=expire_time_us, ended=0
        )
    )


def renew_leases(connection: Connection, part_ids: Sequence[int], now_us: int, expire_time_us: int) -> None:
    """Renews the leases of parts, except those renewed a moment ago: the row would only be fought over."""
    stale: list[int] = []
    for some in slices(part_ids):
        due = (leases.c.seen_time_us <= now_us - RENEW_AFTER_US) | (leases.c.expire_time_us <= now_us)
        stale.extend(connection.scalars(select(leases.c.part_id).where(leases.c.part_id.in_(some), due)))
    # One that another transaction holds is being renewed by it: only such writers touch it beside this one.
    for some in slices(lock_rows(connection, leases.c.part_id, stale, skip_locked=True)):
        values = {"seen_time_us": now_us, "expire_time_us": expire_time_us, "ended": 0}
        connection.execute(update(leases).where(leases.c.part_id.in_(some)).values(**values))


def end_lease(connection: Connection, part_id: int, now_us: int) -> None:
    """Ends a lease now; the reaper deals with what its session left open."""
    connection.execute(
        update(leases).where(leases.c.part_id == part_id).values(seen_time_us=now_us, expire_time_us=now_us)
    )


def extend_leases(connection: Connection, alive_at_us: int, by_us: int, limit_us: int) -> None:
    """Extends every lease that was alive at a time by ``by_us``, though not beyond ``limit_us``."""
    alive = connection.scalars(select(leases.c.part_id).where(IS_RUNNING, leases.c.expire_time_us > alive_at_us))
    extended = leases.c.expire_time_us + by_us
    for some in slices(lock_rows(connection, leases.c.part_id, list(alive))):
        where = and_(leases.c.part_id.in_(some), IS_RUNNING, leases.c.expire_time_us < limit_us)
        later = case((extended < limit_us, extended), else_=limit_us)
        connection.execute(update(leases).where(where).values(expire_time_us=later))


def ended_leases(connection: Connection, now_us: int, limit: int) -> list[int]:
    """Returns the parts whose lease has ended and was not dealt with yet."""
    where = and_(IS_RUNNING, leases.c.expire_time_us <= now_us)
    statement = select(leases.c.part_id).where(where).order_by(leases.c.expire_time_us).limit(limit)
    return list(connection.scalars(statement))


def mark_ended(connection: Connection, part_id: int, now_us: int) -> bool:
    """Marks a lease as dealt with; False when it was renewed in between."""
    where = and_(leases.c.part_id == part_id, IS_RUNNING, leases.c.expire_time_us <= now_us)
    return connection.execute(update(leases).where(where).values(ended=1)).rowcount == 1


def current_lease(connection: Connection, part_id: int) -> tuple[SessionRow, LeaseRow] | None:
    """Returns the current session of a part with its lease; None before its first session."""
    found = find_lease(connection, part_id)
    number = connection.scalar(select(parts.c.session).where(parts.c.id == part_id))
    session = find_session(connection, part_id, number=number)
    return None if found is None or session is None else (session, found)
