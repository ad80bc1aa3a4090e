"""Where checkpoints are beside their first location, which is in their own row; none for one that is in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, ScalarSelect, Text, cast, delete, func, insert, literal, select, update

from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import checkpoints, locations

#: Locations have neither: they are printable.
_ROW_END: Final = "\n"
_GAP: Final = " "


def packed_others() -> ScalarSelect[Any]:
    """Returns a column with a checkpoint's further locations as one text, for ``unpacked``; null for none."""
    one = cast(locations.c.position, Text) + literal(_GAP) + locations.c.location
    of_this = locations.c.checkpoint_id == checkpoints.c.id
    return select(func.aggregate_strings(one, _ROW_END)).where(of_this).correlate(checkpoints).scalar_subquery()


def unpacked(text: str | None) -> tuple[str, ...]:
    """Returns the further locations of a checkpoint, in their order."""
    if not text:
        return ()
    rows = [row.partition(_GAP) for row in text.split(_ROW_END)]
    return tuple(location for _, _, location in sorted(rows, key=lambda row: int(row[0])))


def find_others(connection: Connection, checkpoint_ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Returns the further locations of checkpoints by id, in their order; those that have none are left out."""
    found: dict[int, tuple[str, ...]] = {}
    columns = (locations.c.checkpoint_id, locations.c.location)
    for some in slices(checkpoint_ids):
        rows = connection.execute(
            select(*columns)
            .where(locations.c.checkpoint_id.in_(some))
            .order_by(locations.c.checkpoint_id, locations.c.position)
        )
        for checkpoint_id, location in rows:
            found[checkpoint_id] = (*found.get(checkpoint_id, ()), location)
    return found


def put(connection: Connection, places: Mapping[int, Sequence[str]]) -> None:
    """Gives checkpoints other locations than they had; the first of each is the one that counts most."""
    for some in slices(sorted(places)):
        connection.execute(delete(locations).where(locations.c.checkpoint_id.in_(some)))
    rows = [
        {"checkpoint_id": one, "position": at, "location": location}
        for one, all_of_it in sorted(places.items())
        for at, location in enumerate(all_of_it[1:], 1)
    ]
    if rows:
        connection.execute(insert(locations), rows)
    for one, all_of_it in sorted(places.items()):
        connection.execute(update(checkpoints).where(checkpoints.c.id == one).values(location=all_of_it[0]))
