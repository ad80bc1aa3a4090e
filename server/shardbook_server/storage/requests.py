"""Requests that were made, by their ids, and what was answered."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, select, update

from shardbook.errors import UnavailableError
from shardbook_server.storage.dialect import insert_ignore
from shardbook_server.storage.failures import RETRY_S
from shardbook_server.storage.request_tables import requests


@dataclass(frozen=True)
class RequestKey:
    """Who asked what.

    Attributes:
        project: Name of the project that it is about; empty when it is about none.
        principal: Who asks.
        method: Full name of the call.
        request_id: A UUID, 16 bytes.
    """

    project: str
    principal: str
    method: str
    request_id: bytes


@dataclass(frozen=True)
class RequestRow:
    """A request that was made: digest of its content, and its answer."""

    content_digest: bytes
    answer: bytes


def begin(connection: Connection, key: RequestKey, content_digest: bytes, now_us: int) -> RequestRow | None:
    """Notes that a request is being made; returns it instead when it was made before.

    One that another transaction is making is waited for, so nothing else may be locked before this.

    Raises:
        UnavailableError: It was made a day ago, and is being forgotten.
    """
    row = vars(key) | {"content_digest": content_digest, "answer": b"", "time_us": now_us}
    added = insert_ignore(connection, requests).values(row).returning(requests.c.time_us)
    if connection.execute(added).first() is not None:
        return None
    columns = (requests.c.content_digest, requests.c.answer)
    made = connection.execute(select(*columns).where(_is(key))).one_or_none()
    if made is None:
        raise UnavailableError(
            "the request was forgotten at this moment; try again", reason="DATABASE_CONFLICT", retry_delay_s=RETRY_S
        )
    return RequestRow(*made)


def put_answer(connection: Connection, key: RequestKey, answer: bytes) -> None:
    """Stores what is answered to a request that was begun in the same transaction."""
    connection.execute(update(requests).where(_is(key)).values(answer=answer))


def drop_before(connection: Connection, time_us: int, count: int) -> int:
    """Forgets the oldest requests made before a time, about so many at most; returns how many."""
    oldest = select(requests.c.time_us).where(requests.c.time_us < time_us).order_by(requests.c.time_us)
    last_us = connection.execute(oldest.offset(count - 1).limit(1)).scalar()
    where = requests.c.time_us < time_us if last_us is None else requests.c.time_us <= last_us
    return connection.execute(delete(requests).where(where)).rowcount


def _is(key: RequestKey) -> ColumnElement[bool]:
    return and_(*(requests.c[name] == value for name, value in vars(key).items()))
