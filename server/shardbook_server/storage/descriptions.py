"""What is said of checkpoints: labels, metrics, notes, writers, and what their ranks took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from sqlalchemy import CompoundSelect, Connection, Table, delete, insert, literal_column, select, union_all, update

from shardbook_server.storage.dialect import among, insert_ignore
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import aliases, descriptions, labels, metrics, rank_stats


@dataclass(frozen=True)
class DescriptionRow:
    """What a listing leaves out; each field is JSON text, or empty."""

    note: str = ""
    writer: str = ""
    timing: str = ""


@dataclass(frozen=True)
class Said:
    """What a listing shows of a checkpoint: labels and metrics by name, and names of aliases without ``latest``."""

    labels: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)


#: Nothing is said.
NOTHING_SAID: Final = Said()


@cache
def _said_of(dialect: str) -> CompoundSelect[*tuple[Any, ...]]:
    columns: list[tuple[Any, ...]] = [
        (labels, literal_column("1"), labels.c.value, literal_column("0.0")),
        (metrics, literal_column("2"), literal_column("''"), metrics.c.value),
        (aliases, literal_column("3"), literal_column("''"), literal_column("0.0")),
    ]
    return union_all(
        *(
            select(table.c.checkpoint_id, table.c.name, *shown).where(among(dialect, table.c.checkpoint_id))
            for table, *shown in columns
        )
    )


def find_said(connection: Connection, checkpoint_ids: Sequence[int]) -> dict[int, Said]:
    """Returns what is said of checkpoints, in one statement; those of which nothing is are left out."""
    found: dict[int, Said] = {}
    statement = _said_of(connection.dialect.name)
    for some in slices(checkpoint_ids):
        for checkpoint_id, name, kind, value, number in connection.execute(statement, {"ids": list(some)}).all():
            said = found.setdefault(checkpoint_id, Said())
            if kind == 1:
                said.labels[name] = value
            elif kind == 2:
                said.metrics[name] = number
            else:
                said.aliases.append(name)
    return found


def set_labels(connection: Connection, checkpoint_id: int, values: Mapping[str, str]) -> None:
    """Sets labels; the others stay as they are."""
    _clear(connection, labels, checkpoint_id, values)
    rows = [{"checkpoint_id": checkpoint_id, "name": name, "value": values[name]} for name in sorted(values)]
    if rows:
        connection.execute(insert(labels), rows)


def set_metrics(connection: Connection, checkpoint_id: int, part_id: int, values: Mapping[str, float]) -> None:
    """Sets metrics; the others stay as they are."""
    _clear(connection, metrics, checkpoint_id, values)
    # Adding 0.0 makes the two zeros one: SQLite would keep neither from the other.
    rows = [
        {"checkpoint_id": checkpoint_id, "name": name, "part_id": part_id, "value": values[name] + 0.0}
        for name in sorted(values)
    ]
    if rows:
        connection.execute(insert(metrics), rows)


def delete_labels(connection: Connection, checkpoint_id: int, names: Sequence[str]) -> None:
    """Removes labels by name."""
    _clear(connection, labels, checkpoint_id, names)


def delete_metrics(connection: Connection, checkpoint_id: int, names: Sequence[str]) -> None:
    """Removes metrics by name."""
    _clear(connection, metrics, checkpoint_id, names)


def find_description(connection: Connection, checkpoint_id: int) -> DescriptionRow:
    """Returns what else is known of a checkpoint; empty fields where nothing is."""
    columns = (descriptions.c.note, descriptions.c.writer, descriptions.c.timing)
    row = connection.execute(select(*columns).where(descriptions.c.checkpoint_id == checkpoint_id)).one_or_none()
    return DescriptionRow() if row is None else DescriptionRow(*row)


def put_description(connection: Connection, checkpoint_id: int, row: DescriptionRow) -> None:
    """Stores what is known at the commit; an attempt may have had a note before, which stays unless there is one."""
    values = {name: value for name, value in vars(row).items() if value or name != "note"}
    where = descriptions.c.checkpoint_id == checkpoint_id
    if connection.execute(update(descriptions).where(where).values(**values)).rowcount == 0:
        connection.execute(insert(descriptions).values(checkpoint_id=checkpoint_id, **vars(row)))


def set_note(connection: Connection, checkpoint_id: int, note: str) -> None:
    """Replaces the note; checkpoints that an older server committed have no row yet."""
    empty = {"checkpoint_id": checkpoint_id, **vars(DescriptionRow())}
    connection.execute(insert_ignore(connection, descriptions).values(**empty))
    where = descriptions.c.checkpoint_id == checkpoint_id
    connection.execute(update(descriptions).where(where).values(note=note))


def insert_rank_stats(connection: Connection, checkpoint_id: int, payload: bytes) -> None:
    """Stores what the ranks of a checkpoint took and wrote."""
    connection.execute(insert(rank_stats).values(checkpoint_id=checkpoint_id, payload=payload))


def read_rank_stats(connection: Connection, checkpoint_id: int) -> bytes | None:
    """Returns what the ranks took and wrote, packed; None when nothing is known of them."""
    payload: bytes | None = connection.scalar(
        select(rank_stats.c.payload).where(rank_stats.c.checkpoint_id == checkpoint_id)
    )
    return payload


def _clear(
    connection: Connection, table: Table, checkpoint_id: int, names: Sequence[str] | Mapping[str, object]
) -> None:
    if names:
        where = (table.c.checkpoint_id == checkpoint_id, table.c.name.in_(sorted(names)))
        connection.execute(delete(table).where(*where))
