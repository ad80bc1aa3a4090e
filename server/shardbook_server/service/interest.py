"""Which events a watcher is told: by place and kind as plain values, by filter in the database."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from shardbook.core.names import PartName
from shardbook.errors import InvalidArgumentError
from shardbook_server.service.filters import parse_filter
from shardbook_server.service.places import parse_parent
from shardbook_server.storage.database import Connection
from shardbook_server.storage.events import EventKind
from shardbook_server.storage.filters import OPERATORS, PLACES, AllOf, Compare, Condition, Match, conjuncts, meeting

#: Kinds that mean a step of ``latest`` as well as of any other alias are one to who watches.
_SAME: Final = {EventKind.ALIAS_MOVED: EventKind.LATEST_MOVED}


@dataclass(frozen=True)
class Interest:
    """What a watcher wants to be told.

    Attributes:
        places: Conditions on project, run and part; all have to hold.
        kinds: Kinds of events; empty for all.
        condition: What else has to hold of the checkpoint; None for nothing.
    """

    places: tuple[Compare | Match, ...]
    kinds: frozenset[EventKind]
    condition: Condition | None

    @classmethod
    def of(cls, parent: str, filter_text: str, kinds: Collection[int] = ()) -> Interest:
        """Returns what a parent, a filter and kinds say, as in ``shardbook.v1.WatchCheckpointsRequest``.

        Raises:
            InvalidArgumentError: One of them says nothing.
        """
        places: list[Compare | Match] = list(parse_parent(parent).conditions)
        others: list[Condition] = []
        for one in conjuncts(parse_filter(filter_text)):
            if isinstance(one, Compare | Match) and one.field.name in PLACES:
                places.append(one)
            else:
                others.append(one)
        return cls(tuple(places), _kinds(kinds), AllOf(tuple(others)) if others else None)

    def admits(self, kind: EventKind, part: PartName) -> bool:
        """Returns True when kind and place are among what is wanted."""
        return (not self.kinds or kind in self.kinds) and all(_holds(one, part) for one in self.places)

    def meeting(self, connection: Connection, checkpoint_ids: Sequence[int]) -> set[int]:
        """Returns those of some checkpoints that meet the condition."""
        if self.condition is None:
            return set(checkpoint_ids)
        return meeting(connection, self.condition, checkpoint_ids)


def _kinds(numbers: Collection[int]) -> frozenset[EventKind]:
    kinds = set()
    for at, number in enumerate(numbers):
        if number not in set(EventKind) or number == EventKind.LATEST_MOVED:
            raise InvalidArgumentError(f"{number} is no kind of event", field=f"kinds[{at}]")
        kind = EventKind(number)
        kinds |= {kind, _SAME.get(kind, kind)}
    return frozenset(kinds)


def _holds(condition: Compare | Match, part: PartName) -> bool:
    """Judges as the database does: by code point."""
    text = {"project": part.run.project, "run": part.run.run, "part": part.part}[condition.field.name]
    if isinstance(condition, Compare):
        holds: bool = OPERATORS[condition.operator](text, str(condition.value))
        return holds
    first, *middle, last = condition.pieces
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in middle:
        found = text.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True
