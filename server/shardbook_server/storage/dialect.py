"""What differs between databases in statements, and nothing else: the upsert, and locks taken in one order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Select,
    Table,
    bindparam,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite

from shardbook_server.storage.lists import slices

_LOCK: Final = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")


def lock_key(name: str) -> int:
    """Returns the key of an advisory lock: two names that share one by chance would only wait for each other."""
    digest = hashlib.sha256(f"shardbook/{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def lock_names(connection: Connection, names: Iterable[str]) -> None:
    """Keeps off others that take locks of these names, until the transaction ends; taken in one order.

    A statement of its own, because one sees what was committed before it began, and not what it waited for.
    """
    # SQLite's one writer has nobody beside it.
    if connection.dialect.name == "postgresql":
        connection.execute(_LOCK, {"keys": sorted(map(lock_key, names))})


def among(dialect: str, column: ColumnElement[int]) -> ColumnElement[bool]:
    """Returns the condition that a key is one of a list bound as ``ids``, for a statement that is made once a dialect.

    To Postgres they are one value, which costs far less to send.
    """
    if dialect == "postgresql":
        return column == func.any(bindparam("ids", type_=postgresql.ARRAY(BigInteger)))
    return column.in_(bindparam("ids", expanding=True))


def unindexed(dialect: str, column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Returns a column of numbers so that SQLite finds no rows by it: its planner guesses what it has no statistics of.

    Postgres has them, and gets the column as it is.
    """
    return column if dialect == "postgresql" else column + literal_column("0")


def one_of(dialect: str, column: ColumnElement[Any], values: Select[Any]) -> ColumnElement[bool]:
    """Returns the condition that a column has one of the values that a statement finds, each looked up by an index."""
    if dialect == "postgresql":
        # Of IN it makes a join, and might read a whole table for that, which takes longer than it thinks.
        found: ColumnElement[bool] = column == func.any(func.array(values.scalar_subquery()))
        return found
    return column.in_(values)


def insert_ignore(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Returns an insert into ``table`` that leaves rows whose key exists alone.

    Rows are given sorted by that key: transactions that add the same ones then wait for each other in one order only.
    On Postgres a row that another transaction is adding is waited for; the next statement sees it.
    """
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def lock_rows(
    connection: Connection, key: Column[Any], values: Sequence[Any], *, skip_locked: bool = False
) -> list[Any]:
    """Locks the rows that have these keys, in their order, until the transaction ends; returns the keys found.

    An update of several rows locks them in whatever order it meets them, and two such updates can deadlock. Rows that
    refer to these may be added meanwhile: keys stay what they are.

    Args:
        connection: In a write transaction.
        key: Primary key of its table.
        values: Keys.
        skip_locked: Leave out rows that another transaction holds.
    """
    found: list[Any] = []
    for some in slices(sorted(values)):
        statement = select(key).where(key.in_(some)).order_by(key)
        # SQLite has no row locks and needs none: whoever writes, writes alone.
        if connection.dialect.name == "postgresql":
            statement = statement.with_for_update(key_share=True, skip_locked=skip_locked)
        found.extend(connection.scalars(statement))
    return found
