"""Listings of checkpoints: where, in which order, a page at a time, whatever the table has grown to.

No page skips rows that it has counted: it begins behind the key where the one before ended. Two ways lead to one:

- *Few match.* A condition is asked first how many rows its index holds for it, up to a bound. Where that is few, those
  are looked up, judged and sorted.
- *Many match.* The index of the order is walked and each row is judged, until the page is full: as every condition
  holds of many, that is soon.

The planner is left no other: conditions on labels and metrics are lookups by key (``filters``), so neither database can
turn a page into a join of everything.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, func, literal, literal_column, or_, select, tuple_
from sqlalchemy.sql.selectable import NamedFromClause

from shardbook_server.storage.dialect import unindexed
from shardbook_server.storage.filters import (
    COLUMNS,
    LABELS,
    METRICS,
    Compare,
    Condition,
    Field,
    candidates,
    conjuncts,
    parts_where,
    predicate,
)
from shardbook_server.storage.filters import Match as Matching
from shardbook_server.storage.tables import checkpoints, labels, metrics, parts

#: Key of a row in the order of its listing; the last value is the checkpoint's.
Key = tuple[str | int | float, ...]

#: Rows that are looked up and sorted rather than found in order: what takes a few milliseconds.
FEW: Final = 1_000
#: Conditions that are asked for how many rows they hold.
_ASKED: Final = 8
#: Parts that are walked one by one and merged.
_MERGED_PARTS: Final = 16
#: As in ``shardbook.v1.CheckpointState``.
_COMMITTED: Final = 2
_SESSION: Final = Field("session")
_STEP: Final = Field("step")


@dataclass(frozen=True)
class OrderBy:
    """One field of an order."""

    field: Field
    descending: bool = False


#: Newest session and step first: an abandoned branch never hides the live one.
NEWEST_STEP: Final = (OrderBy(_SESSION, descending=True), OrderBy(_STEP, descending=True))
#: Newest first, where sessions of several runs mean nothing to each other.
NEWEST: Final = (OrderBy(Field("create_time"), descending=True),)


@dataclass(frozen=True)
class Listing:
    """What is listed, in which order.

    Attributes:
        part_ids: Parts of one run; None for several runs.
        places: Conditions on project, run and part.
        condition: What else has to hold; None for nothing.
        order: Fields, at least one.
        show_all: Attempts too that are not live.
    """

    part_ids: tuple[int, ...] | None
    places: tuple[Compare | Matching, ...]
    condition: Condition | None
    order: tuple[OrderBy, ...]
    show_all: bool

    @property
    def live(self) -> tuple[int, ...]:
        """Values of ``live`` that are listed. What is live is committed."""
        if not self.show_all:
            return (1,)
        for one in conjuncts(self.condition):
            match one:
                case Compare(Field("state"), sign, state) if (sign == "=") is (state != _COMMITTED):
                    return (0,)
        return (1, 0)


def page(connection: Connection, listing: Listing, after: Key | None, count: int) -> list[Key]:
    """Returns the keys of ``count`` rows behind ``after``, in order; the last value of each is a checkpoint's key."""
    return _Lister(connection, listing).page(after, count)


class _Lister:
    """Reads pages of one listing. For one transaction."""

    def __init__(self, connection: Connection, listing: Listing) -> None:
        self._connection = connection
        self._listing = listing
        #: Labels and metrics that the order needs, each a table of its own.
        self._values: dict[Field, NamedFromClause[Any]] = {
            one.field: (labels if one.field.name == LABELS else metrics).alias()
            for one in listing.order
            if one.field.name in (LABELS, METRICS)
        }

    def page(self, after: Key | None, count: int) -> list[Key]:
        few, found = self._few()
        if few is not None and found == 0:
            return []
        if few is None:
            columns = [column for column, _ in self._keys]
            pages = [self._read(branch, columns, after, count) for branch in self._walks()]
        else:
            # Sorted when it is all there: or a planner might walk along the order, and look for those few.
            matching = self._looked_up(few).cte("matching").prefix_with("MATERIALIZED")
            pages = [self._read(select(matching), list(matching.c), after, count)]
        if len(pages) == 1:
            return pages[0]
        downs = [down for _, down in self._keys]
        return list(heapq.merge(*pages, key=lambda key: _Place(key, downs)))[:count]

    # ------------------------------------------------------------------ few match

    def _few(self) -> tuple[Select[Any] | None, int]:
        """Returns the statement of the condition that the fewest rows may meet, if those are few, and how many."""
        asked = list(islice(candidates(self._connection, self._listing.condition, self._listing.live), _ASKED))
        place = self._place(checkpoints.c.part_id)
        if not self._walks_parts and place is not None:
            live = checkpoints.c.live.in_(self._listing.live)
            asked.append(select(checkpoints.c.id).where(place, live))
        fewest, chosen = FEW, None
        for statement in asked:
            bounded = statement.limit(fewest + 1).subquery()
            found = self._connection.scalar(select(func.count()).select_from(bounded)) or 0
            if found <= fewest:
                fewest, chosen = found, statement
                if found == 0:
                    break
        return chosen, fewest

    def _looked_up(self, few: Select[Any]) -> Select[Any]:
        (found,) = few.limit(FEW).subquery().c
        return self._placed(self._base().join(found.table, found == checkpoints.c.id))

    # ------------------------------------------------------------------ many match

    @cached_property
    def _walks_parts(self) -> bool:
        """True when there is an index that has the rows of each part in this order."""
        part_ids, order = self._listing.part_ids, self._listing.order
        if part_ids is None or len(part_ids) > _MERGED_PARTS or len({one.descending for one in order}) > 1:
            return False
        fields = [one.field for one in order]
        return fields == [_SESSION, _STEP] or (len(fields) == 1 and fields[0].name == METRICS)

    def _walks(self) -> list[Select[Any]]:
        """Returns statements that each walk along an index, and together find everything."""
        listing, first = self._listing, self._listing.order[0].field
        if self._walks_parts:
            column = self._values[first].c.part_id if first.name == METRICS else checkpoints.c.part_id
            return [self._base().where(column == part_id) for part_id in listing.part_ids or ()]
        base = self._placed(self._base(walks_all=first.name in COLUMNS))
        if first.name not in COLUMNS or not listing.show_all:
            return [base]
        return [base.where(checkpoints.c.live == live) for live in listing.live]

    # ------------------------------------------------------------------ both

    def _place(self, part_id: ColumnElement[int]) -> ColumnElement[bool] | None:
        if self._listing.part_ids is not None and len(self._listing.part_ids) <= _MERGED_PARTS:
            return part_id.in_(self._listing.part_ids)
        if self._listing.places:
            return part_id.in_(parts_where(self._connection, list(self._listing.places)))
        return None

    def _placed(self, statement: Select[Any]) -> Select[Any]:
        place = self._place(unindexed(self._connection, checkpoints.c.part_id))
        return statement if place is None else statement.where(place)

    def _base(self, *, walks_all: bool = False) -> Select[Any]:
        """Selects the key, from the tables that the order needs, of rows that meet the condition."""
        listing = self._listing
        columns = (column.label(f"key_{at}") for at, (column, _) in enumerate(self._keys))
        statement = select(*columns).select_from(checkpoints)
        for field, values in self._values.items():
            statement = statement.join(
                values, and_(values.c.checkpoint_id == checkpoints.c.id, values.c.name == field.key)
            )
        if any(one.field.name == "part" for one in listing.order):
            # From parts to checkpoints, whichever SQLite takes to be fewer: that is their order.
            statement = statement.join(parts, checkpoints.c.part_id == unindexed(self._connection, parts.c.id))
        if not listing.show_all:
            # Where other columns lead the way SQLite would rather walk through everything that is live.
            live = checkpoints.c.live if walks_all else unindexed(self._connection, checkpoints.c.live)
            statement = statement.where(live == literal_column("1"))
        if listing.condition is not None:
            statement = statement.where(predicate(self._connection, listing.condition, self._at_hand))
        return statement

    @property
    def _at_hand(self) -> dict[Field, ColumnElement[Any]]:
        """Columns whose values the index of the order has: conditions on them bound the walk."""
        first = self._listing.order[0].field
        columns = {first: COLUMNS[first.name]} if first.name in COLUMNS else {}
        return columns | {field: values.c.value for field, values in self._values.items()}

    @cached_property
    def _keys(self) -> list[tuple[ColumnElement[Any], bool]]:
        """Columns of the key with their directions; the last is the checkpoint's own, so no two are equal."""
        keys: list[tuple[ColumnElement[Any], bool]] = []
        for one in self._listing.order:
            if one.field.name == "part":
                keys.append((parts.c.name, one.descending))
                if one is self._listing.order[-1]:
                    keys.append((parts.c.id, one.descending))
            elif one.field in self._values:
                keys.append((self._values[one.field].c.value, one.descending))
            else:
                keys.append((COLUMNS[one.field.name], one.descending))
        first, last = self._listing.order[0], self._listing.order[-1]
        # As the index of the order has it.
        own = self._values[first.field].c.checkpoint_id if first.field in self._values else checkpoints.c.id
        return [*keys, (own, last.descending)]

    def _read(
        self, statement: Select[Any], columns: Sequence[ColumnElement[Any]], after: Key | None, count: int
    ) -> list[Key]:
        downs = [down for _, down in self._keys]
        order = (column.desc() if down else column.asc() for column, down in zip(columns, downs, strict=True))
        if after is not None:
            statement = statement.where(_behind(columns, downs, after))
        return [tuple(row) for row in self._connection.execute(statement.order_by(*order).limit(count)).all()]


def _behind(columns: Sequence[ColumnElement[Any]], downs: Sequence[bool], after: Key) -> ColumnElement[bool]:
    """Returns the condition that a row comes behind another one."""
    values = [literal(value, column.type) for column, value in zip(columns, after, strict=True)]
    if len(set(downs)) == 1:
        mine, other = tuple_(*columns), tuple_(*values)
        behind: ColumnElement[bool] = mine < other if downs[0] else mine > other
        return behind
    steps = []
    for at, (column, down) in enumerate(zip(columns, downs, strict=True)):
        equal = [before == value for before, value in zip(columns[:at], values, strict=False)]
        steps.append(and_(*equal, column < values[at] if down else column > values[at]))
    return or_(*steps)


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
