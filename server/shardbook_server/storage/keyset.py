"""Pages by key: a page begins behind the key where the one before ended, and may end at another."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Integer, Select, and_, bindparam, not_, or_, tuple_

#: Values of a row that put it in its place; no two rows have the same.
Key = tuple[str | int | float, ...]

_NOTHING: Final[Mapping[str, Any]] = {}


class Ordered:
    """Returns the keys of a statement's rows in their order. Its statements are made once. Thread-safe.

    Args:
        dialect: Which database it is.
        statement: Selects the key and nothing else.
        columns: Those of the key.
        downs: For each whether it descends.

    Attributes:
        all: Every row, in order.
    """

    def __init__(
        self, dialect: str, statement: Select[Any], columns: Sequence[ColumnElement[Any]], downs: Sequence[bool]
    ) -> None:
        order = (column.desc() if down else column.asc() for column, down in zip(columns, downs, strict=True))
        self.all = statement.order_by(*order)
        self._dialect = dialect
        self._columns = columns
        self._downs = downs
        self._made: dict[tuple[bool, bool, bool], Select[Any]] = {}

    def read(
        self,
        connection: Connection,
        count: int,
        *,
        after: Key | None,
        until: Key | None = None,
        values: Mapping[str, Any] = _NOTHING,
    ) -> list[Key]:
        """Returns at most ``count`` keys behind ``after``, none behind ``until``; ``values`` are bound otherwise."""
        return self._rows(connection, after, until, {"count": count, **values})

    def find(self, connection: Connection, rows: int, *, after: Key | None) -> Key | None:
        """Returns the last of so many keys behind ``after``; None when there are fewer."""
        found = self._rows(connection, after, None, {"count": 1, "passed": rows - 1})
        return found[0] if found else None

    def _rows(
        self, connection: Connection, after: Key | None, until: Key | None, values: Mapping[str, Any]
    ) -> list[Key]:
        made = (after is not None, until is not None, "passed" in values)
        if made not in self._made:
            self._made[made] = self._make(*made)
        bound = {f"after_{at}": value for at, value in enumerate(after or ())}
        bound |= {f"until_{at}": value for at, value in enumerate(until or ())}
        return [tuple(row) for row in connection.execute(self._made[made], {**values, **bound}).all()]

    def _make(self, is_after: bool, is_until: bool, passes: bool) -> Select[Any]:
        statement = self.all.limit(bindparam("count", type_=Integer))
        if is_after:
            statement = statement.where(self._compared("after", behind=True))
        if is_until:
            statement = statement.where(self._compared("until", behind=False))
        return statement.offset(bindparam("passed", type_=Integer)) if passes else statement

    def _compared(self, name: str, *, behind: bool) -> ColumnElement[bool]:
        """Returns the condition that a row comes behind the key bound as ``name_0``, ``name_1``, ..., or does not."""
        columns, downs = self._columns, self._downs
        values = [bindparam(f"{name}_{at}", type_=column.type) for at, column in enumerate(columns)]
        if len(set(downs)) == 1:
            mine, other = tuple_(*columns), tuple_(*values)
            if behind:
                compared: ColumnElement[bool] = mine < other if downs[0] else mine > other
            else:
                compared = mine >= other if downs[0] else mine <= other
        else:
            steps = []
            for at, (column, down) in enumerate(zip(columns, downs, strict=True)):
                equal = [before == value for before, value in zip(columns[:at], values, strict=False)]
                steps.append(and_(*equal, column < values[at] if down else column > values[at]))
            compared = or_(*steps) if behind else not_(or_(*steps))
        if self._dialect == "postgresql":
            # It would take two conditions for two that each leave rows out, and few for left.
            return compared
        # SQLite finds no range of an index in a key of which a column is an expression.
        return and_(columns[0] <= values[0] if downs[0] is behind else columns[0] >= values[0], compared)


def merged(pages: Sequence[list[Key]], downs: Sequence[bool], count: int) -> list[Key]:
    """Returns the first keys of several pages, each in order."""
    if len(pages) == 1:
        return pages[0]
    return list(islice(heapq.merge(*pages, key=lambda key: _Place(key, downs)), count))


class _Place:
    """A key that compares as the database orders it."""

    def __init__(self, key: Key, downs: Sequence[bool]) -> None:
        self._key = key
        self._downs = downs

    def __lt__(self, other: _Place) -> bool:
        for mine, its, down in zip(self._key, other._key, self._downs, strict=True):
            if mine != its:
                return bool(mine > its if down else mine < its)  # type: ignore[operator]  # of one column, so of one type
        return False
