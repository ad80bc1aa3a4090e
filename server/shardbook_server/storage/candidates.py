"""Which few rows may meet a condition: what an index is asked before a page is found.

Whatever has to hold of every row that a listing shows leads to a candidate: one range of an index, mostly. It leaves no
row out that meets the condition; whether it has others too it says itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    CompoundSelect,
    Select,
    and_,
    func,
    literal_column,
    select,
    true,
    union_all,
)

from shardbook_server.storage.dialect import one_of, unindexed
from shardbook_server.storage.filters import (
    COLUMNS,
    LABELS,
    METRICS,
    OPERATORS,
    PLACES,
    AllOf,
    AnyOf,
    Compare,
    Comparison,
    Condition,
    Field,
    Match,
    Not,
    conjuncts,
    matches,
    parts_where,
)
from shardbook_server.storage.tables import checkpoints, labels, metrics

#: Values of a label that are judged each.
VALUES: Final = 100


@dataclass(frozen=True)
class Scope:
    """What is listed whatever the condition.

    Attributes:
        dialect: Which database it is.
        live: Values of ``live``.
        part_ids: Parts, when they are few; None for any.
    """

    dialect: str
    live: tuple[int, ...]
    part_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class Candidate:
    """Finds by indexes the keys of checkpoints that may meet a condition, and perhaps some more.

    Attributes:
        found: Statements that each return keys; several may return the same key.
        decides: Conditions of which every row that is found meets each, and no other row all.
        is_said: It is about labels or metrics.
        is_range: A range of an index each holds what is looked for; else much of an index has to be read for it.
        rows: The same as a condition on ``checkpoints`` itself, where it is one.
    """

    found: tuple[Select[int], ...]
    decides: tuple[Condition, ...]
    is_said: bool
    is_range: bool = True
    rows: ColumnElement[bool] | None = None

    def keys(self, most: BindParameter[int]) -> Select[int]:
        """Returns the statement that finds the keys, at most so many."""
        # A database takes a limit within a union for the whole's, unless it stands in a table of its own.
        limited = [_keys(one.limit(most)) for one in self.found]
        return limited[0] if len(limited) == 1 else _keys(union_all(*limited).limit(most))


def _keys(statement: Select[int] | CompoundSelect[int]) -> Select[int]:
    (key,) = statement.subquery().c
    return select(key.label("id"))


def candidates_of(condition: Condition | None, scope: Scope) -> Iterator[Candidate]:
    """Yields what finds the rows that may meet a condition: one for each thing that all of them have to meet."""
    by_field: dict[Field, list[Comparison]] = {}
    for one in conjuncts(condition):
        match one:
            case AnyOf():
                either = _either(one, scope)
                if either is not None:
                    yield either
            case AllOf() | Not():
                continue
            case _:
                by_field.setdefault(one.field, []).append(one)
    for field, compared in by_field.items():
        yield _candidate(field, tuple(compared), scope)


def _either(condition: AnyOf, scope: Scope) -> Candidate | None:
    """Returns what finds the rows that meet any of some conditions; None when one of them has nothing that does."""
    found: list[Candidate] = []
    decides = True
    for one in condition.conditions:
        # One of what has to be met together is enough; which is the shortest nobody knows yet.
        ways = sorted(candidates_of(one, scope), key=lambda way: not way.is_range)
        if not ways:
            return None
        found.append(ways[0])
        decides = decides and set(conjuncts(one)) <= set(ways[0].decides)
    return Candidate(
        tuple(statement for way in found for statement in way.found),
        (condition,) if decides else (),
        any(way.is_said for way in found),
        all(way.is_range for way in found),
    )


def _candidate(field: Field, compared: tuple[Comparison, ...], scope: Scope) -> Candidate:
    """What is said of a field from both sides is one range."""
    if field.name in PLACES:
        # Parts are few, however they are found.
        return Candidate((keys_of_parts(parts_where(scope.dialect, compared), scope),), compared, is_said=False)
    is_range = any(map(_is_range, compared))
    if field.name in COLUMNS:
        ranges = (_range(one, COLUMNS[field.name], scope) for one in compared)
        rows = and_(checkpoints.c.live.in_(scope.live), *ranges)
        return Candidate((select(checkpoints.c.id).where(rows),), compared, is_said=False, is_range=is_range, rows=rows)
    if field.name == LABELS and not is_range:
        return Candidate(_by_value(field.key, compared, scope), compared, is_said=True, is_range=False)
    table = labels if field.name == LABELS else metrics
    ranges = (_range(one, table.c.value, scope) for one in compared)
    found = select(table.c.checkpoint_id).where(table.c.name == field.key, *ranges)
    if field.name == METRICS and scope.part_ids is not None:
        found = found.where(metrics.c.part_id.in_(scope.part_ids))
    return Candidate((found,), compared, is_said=True, is_range=is_range)


def _by_value(name: str, compared: tuple[Comparison, ...], scope: Scope) -> tuple[Select[int], Select[int]]:
    """Judges the values of a label instead of its rows, as most labels have few: the first ones; behind them rows."""
    other = labels.alias()
    values = (
        select(func.min(labels.c.value).label("value"), literal_column("1").label("number"))
        .where(labels.c.name == name)
        .cte(recursive=True)
    )
    following = select(func.min(other.c.value)).where(other.c.name == name, other.c.value > values.c.value)
    values = values.union_all(
        select(following.scalar_subquery(), values.c.number + 1).where(
            values.c.value.is_not(None), values.c.number < VALUES
        )
    )
    meeting = select(values.c.value).where(
        values.c.value.is_not(None), *(_range(one, values.c.value, scope) for one in compared)
    )
    last = select(values.c.value).where(values.c.number == VALUES).scalar_subquery()
    found = select(labels.c.checkpoint_id).where(labels.c.name == name)
    return (
        found.where(one_of(scope.dialect, labels.c.value, meeting)),
        # None, when there are fewer values.
        found.where(labels.c.value > last, *(_range(one, labels.c.value, scope) for one in compared)),
    )


def keys_of_parts(part_ids: Select[int] | Sequence[int], scope: Scope) -> Select[int]:
    """Returns the statement that finds the keys of what is listed of parts."""
    # SQLite would rather walk through everything that is live.
    live = unindexed(scope.dialect, checkpoints.c.live).in_(scope.live)
    return select(checkpoints.c.id).where(checkpoints.c.part_id.in_(part_ids), live)


def _is_range(condition: Comparison) -> bool:
    match condition:
        case Compare(operator="!=") | Match(pieces=("", *_)):
            return False
        case _:
            return True


def _range(condition: Comparison, column: ColumnElement[Any], scope: Scope) -> ColumnElement[bool]:
    """Returns what a comparison says of a column of an index, so that it is a range of it where it can be one."""
    match condition:
        case Compare(_, name, wanted):
            within: ColumnElement[bool] = OPERATORS[name](column, wanted)
            return within
        case Match(_, (prefix, *others)):
            begins = true() if not prefix else column >= prefix
            end = _successor(prefix)
            matched = true() if others == [""] else matches(scope.dialect, column, condition.pieces)
            return and_(begins, true() if end is None else column < end, matched)
        case _:
            return true()


def _successor(prefix: str) -> str | None:
    """Returns the first text behind all those that begin with ``prefix``; None when there is none."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return None
    code = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if code == 0xD800 else code)
