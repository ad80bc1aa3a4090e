"""Conditions of listings, and their SQL.

A condition about a label or metric that a checkpoint lacks is false, and its negation true: nothing is ever unknown.
Text is compared by code point, capitals apart from small letters, the same on both databases.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, false, func, not_, or_, select, true

from shardbook_server.storage.dialect import unindexed
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import SAVE_TIME, checkpoints, labels, metrics, parts, projects, runs

#: Fields by name that are columns of a checkpoint.
COLUMNS: Final[Mapping[str, ColumnElement[Any]]] = {
    "state": checkpoints.c.state,
    "step": checkpoints.c.step,
    "session": checkpoints.c.session,
    "world_size": checkpoints.c.world_size,
    "bytes": checkpoints.c.size_bytes,
    "create_time": SAVE_TIME,
}
#: Fields by name that are names of what the checkpoint belongs to.
PLACES: Final = ("project", "run", "part")
LABELS: Final = "labels"
METRICS: Final = "metrics"

#: Of values, and of columns.
OPERATORS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Field:
    """What is compared: a column, a place, or with a key a label or metric."""

    name: str
    key: str = ""


@dataclass(frozen=True)
class Compare:
    """``field operator value``; texts for labels and places, numbers for the rest, times in microseconds."""

    field: Field
    operator: str
    value: str | int | float


@dataclass(frozen=True)
class Match:
    """The text consists of the pieces, in order, with anything between them: ``("llm-", "")`` is ``llm-*``."""

    field: Field
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Present:
    """There is such a label or metric."""

    field: Field


@dataclass(frozen=True)
class AllOf:
    """Every one of the conditions."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class AnyOf:
    """At least one of the conditions."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Not:
    """The condition is not met."""

    condition: Condition


Comparison = Compare | Match | Present
Condition = Comparison | AllOf | AnyOf | Not


#: Columns that hold values of fields, where they are at hand: of a label or metric by a join.
Values = Mapping[Field, ColumnElement[Any]]


def predicate(dialect: str, condition: Condition, values: Values) -> ColumnElement[bool]:
    """Returns the condition on a row of ``checkpoints``.

    Which rows are looked at is decided by whoever lists. So labels and metrics are looked up by the checkpoint's own
    key, one at a time, which no planner turns into a join; and SQLite, which knows nothing of what columns hold, is
    kept from using an index for a column that the order does not begin with.

    Args:
        dialect: Which database it is.
        condition: The condition.
        values: Columns to take as they are.
    """
    match condition:
        case AllOf(conditions):
            return and_(true(), *(predicate(dialect, one, values) for one in conditions))
        case AnyOf(conditions):
            return or_(false(), *(predicate(dialect, one, values) for one in conditions))
        case Not(one):
            return not_(predicate(dialect, one, values))
        case _:
            return _compared(dialect, condition, values)


def _compared(dialect: str, condition: Comparison, values: Values) -> ColumnElement[bool]:
    field = condition.field
    if field in values:
        return _judged(dialect, condition, values[field])
    if field.name in COLUMNS:
        return _judged(dialect, condition, unindexed(dialect, COLUMNS[field.name]))
    if field.name in PLACES:
        part_id = unindexed(dialect, checkpoints.c.part_id)
        return part_id.in_(parts_where(dialect, [condition]))
    table = labels if field.name == LABELS else metrics
    value = (
        select(table.c.value)
        .where(table.c.checkpoint_id == checkpoints.c.id, table.c.name == field.key)
        .correlate(checkpoints)
        .scalar_subquery()
    )
    return func.coalesce(_judged(dialect, condition, value), false())


def meeting(connection: Connection, condition: Condition, checkpoint_ids: Sequence[int]) -> set[int]:
    """Returns those of some checkpoints that meet a condition."""
    found: set[int] = set()
    meets = predicate(connection.dialect.name, condition, {})
    for some in slices(checkpoint_ids):
        found.update(connection.scalars(select(checkpoints.c.id).where(checkpoints.c.id.in_(some), meets)))
    return found


def parts_where(dialect: str, conditions: Sequence[Comparison]) -> Select[int]:
    """Returns the statement that finds the parts whose names meet conditions on places."""
    columns = {"project": projects.c.name, "run": runs.c.name, "part": parts.c.name}
    statement = select(parts.c.id)
    named = {one.field.name for one in conditions}
    if named & {"run", "project"}:
        statement = statement.join(runs, runs.c.id == parts.c.run_id)
    if "project" in named:
        statement = statement.join(projects, projects.c.id == runs.c.project_id)
    return statement.where(*(_judged(dialect, one, columns[one.field.name]) for one in conditions))


def conjuncts(condition: Condition | None) -> Iterator[Condition]:
    """Yields the conditions that all have to be met."""
    if isinstance(condition, AllOf):
        for one in condition.conditions:
            yield from conjuncts(one)
    elif condition is not None:
        yield condition


def candidates(dialect: str, condition: Condition | None, live: tuple[int, ...]) -> Iterator[tuple[Field, Select[Any]]]:
    """Yields statements that find by an index the keys of checkpoints that may meet a condition, and some more.

    One for each field that all of them have something to say of; what is said of it from both sides is one range. Of a
    label or metric its value comes with the key, in a column of the name ``value``.

    Args:
        dialect: Which database it is.
        condition: The condition.
        live: Values of ``live`` that are looked for.
    """
    by_field: dict[Field, list[Comparison]] = {}
    for one in conjuncts(condition):
        match one:
            case Compare(operator="!=") | AllOf() | AnyOf() | Not():
                # The first of them is nearly everything, mostly.
                continue
            case Match(pieces=(prefix, *_)) if not prefix:
                continue
        by_field.setdefault(one.field, []).append(one)
    of_live = select(checkpoints.c.id).where(checkpoints.c.live.in_(live))
    for field, compared in by_field.items():
        if field.name in PLACES:
            yield field, of_live.where(checkpoints.c.part_id.in_(parts_where(dialect, compared)))
        elif field.name in COLUMNS:
            yield field, of_live.where(*(_range(one, COLUMNS[field.name]) for one in compared))
        else:
            table = labels if field.name == LABELS else metrics
            ranges = (_range(one, table.c.value) for one in compared)
            yield field, select(table.c.checkpoint_id, table.c.value).where(table.c.name == field.key, *ranges)


def _judged(dialect: str, condition: Comparison, value: Any) -> ColumnElement[bool]:
    match condition:
        case Compare(_, name, wanted):
            judged: ColumnElement[bool] = OPERATORS[name](value, wanted)
            return judged
        case Match(_, pieces):
            return _matches(dialect, value, pieces)
        case _:
            present: ColumnElement[bool] = value.is_not(None)
            return present


def _range(condition: Comparison, column: ColumnElement[Any]) -> ColumnElement[bool]:
    """Returns the range of an index that holds everything that meets a comparison."""
    match condition:
        case Compare(_, name, wanted):
            within: ColumnElement[bool] = OPERATORS[name](column, wanted)
            return within
        case Match(_, (prefix, *_)):
            end = _successor(prefix)
            return column >= prefix if end is None else and_(column >= prefix, column < end)
        case _:
            return true()


def _successor(prefix: str) -> str | None:
    """Returns the first text behind all those that begin with ``prefix``; None when there is none."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return None
    code = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if code == 0xD800 else code)


def _matches(dialect: str, value: Any, pieces: tuple[str, ...]) -> ColumnElement[bool]:
    """Matches a pattern in the database's own words, both of which heed capitals."""
    if dialect == "postgresql":
        escaped = (piece.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") for piece in pieces)
        found: ColumnElement[bool] = value.like("%".join(escaped), escape="\\")
        return found
    for special in "[?":
        pieces = tuple(piece.replace(special, f"[{special}]") for piece in pieces)
    # GLOB's own star: one within a piece is meant as it is.
    return func.glob("*".join(piece.replace("*", "[*]") for piece in pieces), value) == 1
