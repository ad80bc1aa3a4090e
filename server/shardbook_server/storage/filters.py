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
_OPPOSITES: Final = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}


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


def predicate(
    dialect: str, condition: Condition, values: Values, key: ColumnElement[int] = checkpoints.c.id
) -> ColumnElement[bool]:
    """Returns the condition on a row of ``checkpoints``.

    Which rows are looked at is decided by whoever lists. So labels and metrics are looked up by the checkpoint's own
    key, one at a time, which no planner turns into a join; and SQLite, which knows nothing of what columns hold, is
    kept from using an index for a column that the order does not begin with.

    Args:
        dialect: Which database it is.
        condition: The condition.
        values: Columns to take as they are.
        key: Key of the row, to look up labels and metrics.
    """
    match condition:
        case AllOf(conditions):
            return and_(true(), *(predicate(dialect, one, values, key) for one in conditions))
        case AnyOf(conditions):
            return or_(false(), *(predicate(dialect, one, values, key) for one in conditions))
        case Not(one):
            return not_(predicate(dialect, one, values, key))
        case _:
            return _compared(dialect, condition, values, key)


def _compared(dialect: str, condition: Comparison, values: Values, key: ColumnElement[int]) -> ColumnElement[bool]:
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
        .where(table.c.checkpoint_id == key, table.c.name == field.key)
        .correlate(key.table)
        .scalar_subquery()
    )
    return func.coalesce(_judged(dialect, condition, value), false())


def comparisons(condition: Condition) -> Iterator[Comparison]:
    """Yields everything that a condition is made of."""
    match condition:
        case AllOf(conditions) | AnyOf(conditions):
            for one in conditions:
                yield from comparisons(one)
        case Not(one):
            yield from comparisons(one)
        case _:
            yield condition


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


def affirmed(condition: Condition) -> Condition:
    """Returns the same condition with NOT only where a label or metric may be lacking, or a pattern is not met.

    So it says as much as it can of which rows it holds for: ``NOT step < 5`` is a range of an index.
    """
    match condition:
        case AllOf(conditions):
            return AllOf(tuple(map(affirmed, conditions)))
        case AnyOf(conditions):
            return AnyOf(tuple(map(affirmed, conditions)))
        case Not(Not(inner)):
            return affirmed(inner)
        case Not(AllOf(conditions)):
            return AnyOf(tuple(affirmed(Not(one)) for one in conditions))
        case Not(AnyOf(conditions)):
            return AllOf(tuple(affirmed(Not(one)) for one in conditions))
        case Not(Compare(field, sign, value)) if field.name not in (LABELS, METRICS):
            return Compare(field, _OPPOSITES[sign], value)
        case _:
            return condition


def conjuncts(condition: Condition | None) -> Iterator[Condition]:
    """Yields the conditions that all have to be met."""
    if isinstance(condition, AllOf):
        for one in condition.conditions:
            yield from conjuncts(one)
    elif condition is not None:
        yield condition


def _judged(dialect: str, condition: Comparison, value: Any) -> ColumnElement[bool]:
    match condition:
        case Compare(_, name, wanted):
            judged: ColumnElement[bool] = OPERATORS[name](value, wanted)
            return judged
        case Match(_, pieces):
            return matches(dialect, value, pieces)
        case _:
            present: ColumnElement[bool] = value.is_not(None)
            return present


def matches(dialect: str, value: Any, pieces: tuple[str, ...]) -> ColumnElement[bool]:
    """Returns the condition that a text consists of the pieces of a pattern; both databases heed capitals."""
    if dialect == "postgresql":
        escaped = (piece.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") for piece in pieces)
        found: ColumnElement[bool] = value.like("%".join(escaped), escape="\\")
        return found
    for special in "[?":
        pieces = tuple(piece.replace(special, f"[{special}]") for piece in pieces)
    # GLOB's own star: one within a piece is meant as it is.
    return func.glob("*".join(piece.replace("*", "[*]") for piece in pieces), value) == 1
