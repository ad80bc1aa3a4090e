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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Select,
    and_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    tuple_,
)
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
FEW: Final = 1_500
#: The same where only columns are judged: to walk past such a row costs a fraction of what a label or metric does.
_FEW_BY_COLUMN: Final = 1_000
#: Conditions that are asked for how many rows they hold.
_ASKED: Final = 8
#: Listings whose statements are kept.
_KEPT: Final = 256
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


_NO_VALUES: Final[Mapping[Field, ColumnElement[Any]]] = {}

#: Newest session and step first: an abandoned branch never hides the live one.
NEWEST_STEP: Final = (OrderBy(_SESSION, descending=True), OrderBy(_STEP, descending=True))
#: Newest first, where sessions of several runs mean nothing to each other.
NEWEST: Final = (OrderBy(Field("create_time"), descending=True),)


@dataclass(frozen=True)
class _Ordered:
    """Statements of a first page of ``count`` keys in order, and of one behind a key."""

    first: Select[Any]
    further: Select[Any]


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
    return _lister(connection.dialect.name, listing).page(connection, after, count)


@lru_cache(maxsize=_KEPT)
def _lister(dialect: str, listing: Listing) -> _Lister:
    """Returns what reads a listing's pages: making its statements takes longer than the database does for a page."""
    return _Lister(dialect, listing)


class _Lister:
    """Statements of one listing, made when they are needed, and kept. Thread-safe: what is made twice is the same."""

    def __init__(self, dialect: str, listing: Listing) -> None:
        self._dialect = dialect
        self._listing = listing
        #: Labels and metrics that the order needs, each a table of its own.
        self._values: dict[Field, NamedFromClause[Any]] = {
            one.field: (labels if one.field.name == LABELS else metrics).alias()
            for one in listing.order
            if one.field.name in (LABELS, METRICS)
        }
        self._lookups: dict[int, _Ordered] = {}

    def page(self, connection: Connection, after: Key | None, count: int) -> list[Key]:
        few, found = self._few(connection)
        if few is not None and found == 0:
            return []
        statements = self._walks if few is None else [self._lookup(few)]
        values: dict[str, Any] = {"count": count}
        if few is not None:
            values["few"] = FEW
        if after is not None:
            values |= {f"after_{at}": value for at, value in enumerate(after)}
        pages = [
            [tuple(row) for row in connection.execute(one.first if after is None else one.further, values).all()]
            for one in statements
        ]
        if len(pages) == 1:
            return pages[0]
        downs = [down for _, down in self._keys]
        return list(heapq.merge(*pages, key=lambda key: _Place(key, downs)))[:count]

    # ------------------------------------------------------------------ few match

    def _few(self, connection: Connection) -> tuple[int | None, int]:
        """Returns which condition the fewest rows may meet, if those are few, and how many."""
        fewest, chosen = FEW, None
        for at, (field, _, counting) in enumerate(self._asked):
            is_said = field is not None and field.name in (LABELS, METRICS)
            most = fewest if is_said else min(fewest, _FEW_BY_COLUMN)
            found: int = connection.execute(counting, {"few": most + 1}).scalar_one()
            if found <= most:
                fewest, chosen = found, at
                if found == 0:
                    break
        return chosen, fewest

    @cached_property
    def _asked(self) -> list[tuple[Field | None, FromClause, Select[int]]]:
        """Conditions that have an index: of which field, up to ``few`` keys that may meet it, and their count."""
        listing = self._listing
        asked: list[tuple[Field | None, Select[Any]]] = list(
            islice(candidates(self._dialect, listing.condition, listing.live), _ASKED)
        )
        place = self._place(checkpoints.c.part_id)
        if not self._walks_parts and place is not None:
            asked.append((None, select(checkpoints.c.id).where(place, checkpoints.c.live.in_(listing.live))))
        bounded = [(field, one.limit(bindparam("few", type_=Integer)).subquery()) for field, one in asked]
        return [(field, found, select(func.count()).select_from(found)) for field, found in bounded]

    def _lookup(self, at: int) -> _Ordered:
        if at not in self._lookups:
            field, found, _ = self._asked[at]
            # Of a label or metric the value has been found too, and need not be looked up by the key of each.
            values = {field: found.c.value} if field is not None and "value" in found.c else {}
            looked_up = self._placed(self._base(values).join(found, next(iter(found.c)) == checkpoints.c.id))
            # Sorted when it is all there: or a planner might walk along the order, and look for those few.
            matching = looked_up.cte("matching").prefix_with("MATERIALIZED")
            self._lookups[at] = self._ordered(select(matching), list(matching.c))
        return self._lookups[at]

    # ------------------------------------------------------------------ many match

    @cached_property
    def _walks_parts(self) -> bool:
        """True when there is an index that has the rows of each part in this order."""
        part_ids, order = self._listing.part_ids, self._listing.order
        if part_ids is None or len(part_ids) > _MERGED_PARTS or len({one.descending for one in order}) > 1:
            return False
        fields = [one.field for one in order]
        return fields == [_SESSION, _STEP] or (len(fields) == 1 and fields[0].name == METRICS)

    @cached_property
    def _walks(self) -> list[_Ordered]:
        """Statements that each walk along an index, and together find everything."""
        columns = [column for column, _ in self._keys]
        return [self._ordered(branch, columns) for branch in self._branches()]

    def _branches(self) -> list[Select[Any]]:
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
            return part_id.in_(parts_where(self._dialect, list(self._listing.places)))
        return None

    def _placed(self, statement: Select[Any]) -> Select[Any]:
        place = self._place(unindexed(self._dialect, checkpoints.c.part_id))
        return statement if place is None else statement.where(place)

    def _base(self, found: Mapping[Field, ColumnElement[Any]] = _NO_VALUES, *, walks_all: bool = False) -> Select[Any]:
        """Selects the key, from the tables that the order needs, of rows that meet the condition.

        Args:
            found: Columns that hold values of fields, beside those of the order.
            walks_all: An index that begins with ``live`` is to be walked.
        """
        listing = self._listing
        columns = (column.label(f"key_{at}") for at, (column, _) in enumerate(self._keys))
        statement = select(*columns).select_from(checkpoints)
        for field, values in self._values.items():
            statement = statement.join(
                values, and_(values.c.checkpoint_id == checkpoints.c.id, values.c.name == field.key)
            )
        if any(one.field.name == "part" for one in listing.order):
            # From parts to checkpoints, whichever SQLite takes to be fewer: that is their order.
            statement = statement.join(parts, checkpoints.c.part_id == unindexed(self._dialect, parts.c.id))
        if not listing.show_all:
            # Where other columns lead the way SQLite would rather walk through everything that is live.
            live = checkpoints.c.live if walks_all else unindexed(self._dialect, checkpoints.c.live)
            statement = statement.where(live == literal_column("1"))
        if listing.condition is not None:
            statement = statement.where(predicate(self._dialect, listing.condition, {**self._at_hand, **found}))
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

    def _ordered(self, statement: Select[Any], columns: Sequence[ColumnElement[Any]]) -> _Ordered:
        downs = [down for _, down in self._keys]
        order = (column.desc() if down else column.asc() for column, down in zip(columns, downs, strict=True))
        first = statement.order_by(*order).limit(bindparam("count", type_=Integer))
        return _Ordered(first, first.where(_behind(columns, downs)))


def _behind(columns: Sequence[ColumnElement[Any]], downs: Sequence[bool]) -> ColumnElement[bool]:
    """Returns the condition that a row comes behind the one whose key is bound as ``after_0``, ``after_1``, ..."""
    values = [bindparam(f"after_{at}", type_=column.type) for at, column in enumerate(columns)]
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
