"""Statements of one listing: what finds few rows, what walks along an order, and what judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Integer,
    Select,
    and_,
    bindparam,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.sql.selectable import NamedFromClause

from shardbook_server.storage.candidates import Candidate, Scope, candidates_of, keys_of_parts
from shardbook_server.storage.dialect import one_of, unindexed
from shardbook_server.storage.filters import (
    COLUMNS,
    LABELS,
    METRICS,
    Compare,
    Condition,
    Field,
    affirmed,
    comparisons,
    conjuncts,
    parts_where,
    predicate,
)
from shardbook_server.storage.filters import Match as Matching
from shardbook_server.storage.keyset import Ordered
from shardbook_server.storage.tables import checkpoints, labels, metrics, parts

#: Conditions that are asked for how many rows they hold.
_ASKED: Final = 8
#: Parts that are walked one by one and merged.
_MERGED_PARTS: Final = 16
#: Most keys of a candidate.
_FEW: Final = bindparam("few", type_=Integer)
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


class Statements:
    """Statements of one listing, made when they are needed, and kept. Thread-safe: what is made twice is the same.

    Candidates and branches are known by their numbers. What reads keys of candidates takes ``few``: how many of each at
    most.
    """

    def __init__(self, dialect: str, listing: Listing) -> None:
        self._dialect = dialect
        condition = None if listing.condition is None else affirmed(listing.condition)
        self._listing = replace(listing, condition=condition)
        #: Labels and metrics that the order needs, each a table of its own.
        self._values: dict[Field, NamedFromClause[Any]] = {
            one.field: (labels if one.field.name == LABELS else metrics).alias()
            for one in listing.order
            if one.field.name in (LABELS, METRICS)
        }
        self._lookups: dict[tuple[int, ...], Ordered] = {}
        self._walks: dict[tuple[int, int | None], Ordered] = {}
        self._passes: dict[int, Ordered] = {}

    # ------------------------------------------------------------------ few match

    @cached_property
    def candidates(self) -> list[Candidate]:
        """What finds few rows, if few there are."""
        listing = self._listing
        part_ids = listing.part_ids if self._names_parts else None
        scope = Scope(self._dialect, listing.live, part_ids)
        found = list(islice(candidates_of(listing.condition, scope), _ASKED))
        places = self._places
        if not self._walks_parts and places is not None:
            found.append(Candidate((keys_of_parts(places, scope),), (), is_said=False))
        return found

    @cached_property
    def counts(self) -> dict[bool, tuple[list[int], Select[Any]]]:
        """Candidates, those that are ranges alone and all of them, and how many rows each has, in one statement."""
        counts = [
            select(func.count()).select_from(one.keys(_FEW).subquery()).scalar_subquery() for one in self.candidates
        ]
        ranges = [at for at, one in enumerate(self.candidates) if one.is_range]
        return {
            thoroughly: (asked, select(*(counts[at] for at in asked)))
            for thoroughly, asked in ((False, ranges), (True, list(range(len(counts)))))
        }

    def looking_up(self, ats: tuple[int, ...]) -> Ordered:
        """Returns the rows that each of some candidates has; looked up by the first, which has the fewest."""
        if ats not in self._lookups:
            first = self.candidates[ats[0]]
            found = first.keys(_FEW)
            (key,) = found.selected_columns
            found = found.where(*(self._within(key, at) for at in ats[1:]))
            one_by_one = one_of(self._dialect, checkpoints.c.id, found)
            judged = self._judged(ats)
            later = [one for one in judged if self._is_judged_later(one)]
            looked_up = self._placed(self._base([one for one in judged if one not in later]))
            looked_up = looked_up.where(one_by_one if first.rows is None or ats[1:] else first.rows)
            # Sorted when it is all there: or a planner might walk along the order, and look for those few.
            matching = looked_up.cte("matching").prefix_with("MATERIALIZED")
            self._lookups[ats] = self._judging(matching, later)
        return self._lookups[ats]

    def _judging(self, matching: CTE, later: Sequence[Condition]) -> Ordered:
        """Returns the rows of a table in order that meet the conditions; no more are judged than are needed."""
        if not later:
            return self._ordered(select(matching), list(matching.c))
        ordered = self._ordered(select(matching), list(matching.c)).all.offset(literal_column("0")).subquery()
        key = list(ordered.c)[-1]
        meets = (predicate(self._dialect, one, {}, key) for one in later)
        return self._ordered(select(ordered).where(*meets), list(ordered.c))

    def _is_judged_later(self, condition: Condition) -> bool:
        """True when it is judged by lookups alone: in Postgres each costs more than to sort a row."""
        return self._dialect == "postgresql" and all(
            one.field.name in (LABELS, METRICS) and one.field not in self._at_hand for one in comparisons(condition)
        )

    # ------------------------------------------------------------------ many match

    @cached_property
    def branches(self) -> range:
        """What each walks along an index, and together finds everything."""
        return range(len(self._branches))

    @cached_property
    def _branches(self) -> list[ColumnElement[bool]]:
        listing, first = self._listing, self._listing.order[0].field
        if self._walks_parts:
            column = self._values[first].c.part_id if first.name == METRICS else checkpoints.c.part_id
            return [column == part_id for part_id in listing.part_ids or ()]
        if first.name not in COLUMNS or not listing.show_all:
            return [true()]
        return [checkpoints.c.live == live for live in listing.live]

    def walking(self, branch: int, guide: int | None) -> Ordered:
        """Returns the rows of a branch that are listed; a guide is the candidate whose keys are read before."""
        if (branch, guide) not in self._walks:
            decided = () if guide is None else (guide,)
            within = [self._within(self._columns[-1], at) for at in decided]
            base = self._base(self._judged(decided), within=within, walks=True).where(self._branches[branch])
            placed = base if self._walks_parts else self._placed(base)
            self._walks[branch, guide] = self._ordered(placed, self._columns)
        return self._walks[branch, guide]

    def passing(self, branch: int) -> Ordered | None:
        """Returns all rows of a branch, where the walk may pause; None where it goes on."""
        if self._pauses and branch not in self._passes:
            self._passes[branch] = self._ordered(self._passed(self._branches[branch]), self._columns)
        return self._passes.get(branch)

    @cached_property
    def _walks_parts(self) -> bool:
        """True when there is an index that has the rows of each part in this order."""
        if not self._names_parts or len({one.descending for one in self._listing.order}) > 1:
            return False
        fields = [one.field for one in self._listing.order]
        return fields == [_SESSION, _STEP] or (len(fields) == 1 and fields[0].name == METRICS)

    @cached_property
    def _pauses(self) -> bool:
        """True when rows are passed that are not listed, along an index that has the whole order."""
        order = self._listing.order
        is_judged = len(self._bounds) < len(list(conjuncts(self._listing.condition)))
        if not self.candidates or not (is_judged or (self._listing.places and not self._walks_parts)):
            return False
        if len(order) == 1:
            return order[0].field.name != "part"
        return [one.field for one in order] == [_SESSION, _STEP] and order[0].descending is order[1].descending

    @cached_property
    def _bounds(self) -> list[Condition]:
        """What says where in the order's index the walk begins or ends, so that no row is passed for it."""
        first = self._listing.order[0].field
        return [
            one
            for one in conjuncts(self._listing.condition)
            if isinstance(one, Compare) and one.field == first and one.operator != "!="
        ]

    def _passed(self, which: ColumnElement[bool]) -> Select[Any]:
        """Selects the keys of all rows that a walk passes."""
        first = self._listing.order[0].field
        bounds = (predicate(self._dialect, one, self._at_hand) for one in self._bounds)
        passed = select(*(column.label(f"key_{at}") for at, column in enumerate(self._columns))).where(which, *bounds)
        if first in self._values:
            return passed.where(self._values[first].c.name == first.key)
        if self._listing.show_all:
            return passed
        live = unindexed(self._dialect, checkpoints.c.live) if self._walks_parts else checkpoints.c.live
        return passed.where(live == literal_column("1"))

    # ------------------------------------------------------------------ both

    def _ordered(self, statement: Select[Any], columns: Sequence[ColumnElement[Any]]) -> Ordered:
        return Ordered(self._dialect, statement, columns, self.downs)

    @property
    def _names_parts(self) -> bool:
        """True when what is listed are parts that are few."""
        return self._listing.part_ids is not None and len(self._listing.part_ids) <= _MERGED_PARTS

    @property
    def _columns(self) -> list[ColumnElement[Any]]:
        return [column for column, _ in self._keys]

    @property
    def downs(self) -> list[bool]:
        """For each column of the key whether it descends."""
        return [down for _, down in self._keys]

    @cached_property
    def _places(self) -> Select[int] | tuple[int, ...] | None:
        """Keys of the parts that are listed; None for all."""
        if self._names_parts:
            return self._listing.part_ids or ()
        return parts_where(self._dialect, self._listing.places) if self._listing.places else None

    def _placed(self, statement: Select[Any]) -> Select[Any]:
        places = self._places
        part_id = unindexed(self._dialect, checkpoints.c.part_id)
        return statement if places is None else statement.where(part_id.in_(places))

    def _judged(self, decided: Sequence[int]) -> list[Condition]:
        """Returns what rows have to meet that are in some candidates; what bounds a walk is said again."""
        known = {one for at in decided for one in self.candidates[at].decides}
        return [one for one in conjuncts(self._listing.condition) if one not in known or one in self._bounds]

    def _within(self, key: ColumnElement[int], at: int) -> ColumnElement[bool]:
        """Returns the condition that a key is a candidate's. Those are read once; no planner makes a join of it."""
        return key.in_(self.candidates[at].keys(_FEW)).is_(true())

    def _base(
        self, judged: Sequence[Condition], *, within: Sequence[ColumnElement[bool]] = (), walks: bool = False
    ) -> Select[Any]:
        """Selects the key, from the tables that the order needs, of rows that meet some conditions.

        Args:
            judged: The conditions.
            within: What is judged before.
            walks: An index that has the order is to be walked.
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
        # SQLite judges in the order of the text.
        statement = statement.where(*within)
        if not listing.show_all:
            # Where other columns lead the way SQLite would rather walk through everything that is live.
            is_first = walks and not self._walks_parts and listing.order[0].field.name in COLUMNS
            live = checkpoints.c.live if is_first else unindexed(self._dialect, checkpoints.c.live)
            statement = statement.where(live == literal_column("1"))
        return statement.where(*(predicate(self._dialect, one, self._at_hand) for one in judged))

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
