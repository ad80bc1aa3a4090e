"""Where checkpoints are when their files have been copied. Whoever copied them has looked; the server cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardbook.core import limits
from shardbook.core.names import CheckpointName
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from shardbook_server.service import present
from shardbook_server.service.checks import check_location
from shardbook_server.service.descriptions import described
from shardbook_server.service.views import CheckpointInfo
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import locations as location_rows
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.events import Event, EventKind


@dataclass(frozen=True)
class Move:
    """One checkpoint and where it is to be.

    Attributes:
        name: Its full name.
        from_location: Its first location as the caller knows it.
        to_location: Where its files are now.
        keep: Add it behind the others, rather than make it the only one.

    Raises:
        InvalidArgumentError: The name is none of one attempt, or the location cannot be stored.
    """

    name: str
    from_location: str
    to_location: str
    keep: bool = False

    def __post_init__(self) -> None:
        if CheckpointName.parse(self.name, "name").id.attempt is None:
            raise InvalidArgumentError("a move names one attempt, by its full name", field="name")
        check_location(self.to_location, "to_location")

    @property
    def checkpoint(self) -> CheckpointName:
        """The name, parsed."""
        return CheckpointName.parse(self.name, "name")


class LocationService:
    """Changes locations. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps no state of its own."""
        self._database = database

    def move(self, moves: Sequence[Move]) -> list[CheckpointInfo]:
        """Gives checkpoints of one run other locations, in one transaction; returns them in order.

        The same again changes nothing more. What is open is not touched, nor what ranks register meanwhile.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: One is not committed (``NOT_COMMITTED``), or has another first location by now
                (``LOCATION_CHANGED``). Nothing was moved.
            InvalidArgumentError: There are too many, of several runs, or the same one twice.
            ResourceExhaustedError: One would have too many locations.
        """
        if not moves:
            return []
        runs = {move.checkpoint.part.run for move in moves}
        if len(moves) > limits.MAX_MOVES or len(runs) > 1 or len({move.name for move in moves}) < len(moves):
            raise InvalidArgumentError(
                f"a call moves at most {limits.MAX_MOVES} checkpoints, all of one run, each once", field="moves"
            )
        with self._database.write(list(runs)) as connection:
            now_us = self._database.now_us(connection)
            rows = [_committed(connection, at, move) for at, move in enumerate(moves)]
            others = location_rows.find_others(connection, [row.id for row in rows])
            places: dict[int, list[str]] = {}
            for at, (row, move) in enumerate(zip(rows, moves, strict=True)):
                held = [row.location, *others.get(row.id, ())]
                wanted = _wanted(at, move, held)
                if wanted != held:
                    places[row.id] = wanted
            location_rows.put(connection, places)
            listed = checkpoint_rows.find_listed(connection, [row.id for row in rows])
            answer = described(connection, [listed[row.id] for row in rows])
            moved = [Event(EventKind.MOVED, row.part_id, row.id) for row in rows if row.id in places]
            event_rows.append(connection, moved, now_us)
            return answer


def _committed(connection: Connection, at: int, move: Move) -> CheckpointRow:
    try:
        return present.resolve_committed(connection, move.checkpoint)
    except FailedPreconditionError as error:
        raise FailedPreconditionError(error.message, reason=error.reason, field=f"moves[{at}].name") from error


def _wanted(at: int, move: Move, held: list[str]) -> list[str]:
    """Returns the locations that a checkpoint is to have."""
    if (move.to_location in held) if move.keep else held == [move.to_location]:
        return held
    if held[0] != move.from_location:
        raise FailedPreconditionError(
            f"{move.checkpoint.ref} was moved meanwhile: look again",
            reason="LOCATION_CHANGED",
            field=f"moves[{at}].from_location",
        )
    if not move.keep:
        return [move.to_location]
    if len(held) >= limits.MAX_LOCATIONS:
        raise ResourceExhaustedError(
            f"{move.checkpoint.ref} has {len(held)} locations, the limit is {limits.MAX_LOCATIONS}",
            reason="LIMIT_EXCEEDED",
            field=f"moves[{at}].to_location",
        )
    return [*held, move.to_location]
