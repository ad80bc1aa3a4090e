"""Aliases: ``latest``, which the server keeps; those that follow a metric; those that people set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from shardbook.core.description import check_name
from shardbook.core.names import LATEST, AliasName, CheckpointName, PartName
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook_server.service import present
from shardbook_server.service.etags import check_etag, etag_of
from shardbook_server.service.pages import Tokens, page_count
from shardbook_server.service.places import parse_parent, part_ids_of
from shardbook_server.service.views import AliasInfo, Page
from shardbook_server.storage import aliases as alias_rows
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.aliases import AliasRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.events import Event, EventKind


class Direction(IntEnum):
    """Which value of a metric is best; numbers as in ``shardbook.v1.Alias.Direction`` and in the database."""

    BY_HAND = alias_rows.BY_HAND
    MIN = alias_rows.SMALLEST
    MAX = alias_rows.LARGEST


@dataclass(frozen=True)
class AliasRequest:
    """An alias as it is to be, as ``shardbook.v1.SetAliasRequest``.

    Attributes:
        name: ``projects/{project}/runs/{run}/parts/{part}/aliases/{alias}``.
        checkpoint: What it is to mean; empty for one that follows a metric.
        metric: What it follows; empty for one that is set by hand.
        direction: Which value is best; BY_HAND without a metric.
        protected: It is not to be moved without force.
        force: Move one that is protected.
        etag: What it is like as the caller saw it; empty when he does not care.
    """

    name: str
    checkpoint: str = ""
    metric: str = ""
    direction: Direction = Direction.BY_HAND
    protected: bool = False
    force: bool = False
    etag: str = ""

    def __post_init__(self) -> None:
        _settable(self.name, "alias.name")
        if bool(self.checkpoint) == bool(self.metric):
            raise InvalidArgumentError(
                "an alias either means a checkpoint or follows a metric: give one of the two", field="alias.checkpoint"
            )
        if bool(self.metric) != (self.direction is not Direction.BY_HAND):
            raise InvalidArgumentError(
                "an alias that follows a metric has a direction, min or max, and no other has", field="alias.direction"
            )
        if self.metric:
            check_name(self.metric, "alias.metric")
            if self.protected:
                raise InvalidArgumentError(
                    "an alias that follows a metric moves by itself and cannot be protected", field="alias.protected"
                )


class AliasService:
    """Sets and lists aliases. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps nothing but the key of the page tokens."""
        self._database = database
        self._tokens = Tokens(database)

    def list(self, parent: str, *, page_size: int = 0, page_token: str = "") -> Page[AliasInfo]:
        """Returns one page of the aliases of a part, or with ``parts/-`` of all parts of a run, ``latest`` among them.

        Raises:
            NotFoundError: The run or part does not exist.
            InvalidArgumentError: The parent, page size or token is not valid.
        """
        place = parse_parent(parent)
        listing = ("aliases", parent)
        count = page_count(page_size)
        position = self._tokens.read(listing, page_token)
        after = None if position is None else (int(position[0]), str(position[1]))
        with self._database.read() as connection:
            part_ids = part_ids_of(connection, place)
            rows = alias_rows.page_of_aliases(connection, part_ids, after, count + 1)
            # ``latest`` is no row of the table: it takes its place among those that are.
            latest = [row for row in _latest(connection, part_ids) if after is None or _place(row) > after]
            rows = sorted([*rows, *latest], key=_place)[: count + 1]
            items = _infos(connection, rows[:count])
        token = self._tokens.make(listing, _place(rows[count - 1])) if len(rows) > count else ""
        return Page(tuple(items), token)

    def set(self, request: AliasRequest) -> AliasInfo:
        """Makes an alias or moves it; the same again changes nothing.

        Raises:
            NotFoundError: There is no such part or checkpoint.
            FailedPreconditionError: The checkpoint is not committed (``NOT_COMMITTED``), or the alias is protected
                (``ALIAS_PROTECTED``).
            InvalidArgumentError: The checkpoint is one of another part.
            AbortedError: It has another etag by now, or is gone.
        """
        name = _settable(request.name, "alias.name")
        with self._database.write([name.part.run]) as connection:
            now_us = self._database.now_us(connection)
            part = present.existing_part(connection, name.part)
            held = alias_rows.find_alias(connection, part.id, name.alias)
            check_etag(request.etag, _etag(held), name.ref, "alias.etag")
            if request.metric:
                best = alias_rows.best_checkpoint(connection, part.id, request.metric, request.direction)
            else:
                best = self._meant(connection, name, request.checkpoint)
            row = AliasRow(part.id, name.alias, best, request.metric, request.direction, request.protected, now_us)
            if held is None or _content(held) != _content(row):
                if held is not None:
                    _check_unprotected(held, name, force=request.force)
                alias_rows.put_alias(connection, row)
            else:
                row = held
            info = _infos(connection, [row])[0]
            if held is None or held.checkpoint_id != row.checkpoint_id:
                event_rows.append(connection, [_moved(row)], now_us)
            return info

    @staticmethod
    def _meant(connection: Connection, name: AliasName, checkpoint: str) -> int:
        wanted = CheckpointName.parse(checkpoint, "alias.checkpoint")
        if wanted.part != name.part:
            raise InvalidArgumentError(f"{wanted.ref} is no checkpoint of {name.part.ref}", field="alias.checkpoint")
        return present.resolve_committed(connection, wanted).id

    def delete(self, text: str, *, force: bool = False, etag: str = "") -> None:
        """Deletes an alias.

        Raises:
            NotFoundError: There is no such alias.
            FailedPreconditionError: It is protected (``ALIAS_PROTECTED``).
            AbortedError: It has another etag by now.
        """
        name = _settable(text, "name")
        with self._database.write([name.part.run]) as connection:
            part = present.existing_part(connection, name.part)
            held = alias_rows.find_alias(connection, part.id, name.alias)
            if held is None:
                raise NotFoundError(f"{name.ref} does not exist; `shardbook alias {name.part.ref}` lists what there is")
            check_etag(etag, _etag(held), name.ref, "etag")
            _check_unprotected(held, name, force=force)
            alias_rows.delete_alias(connection, part.id, name.alias)
            event = Event(EventKind.ALIAS_DELETED, part.id, held.checkpoint_id or 0, name.alias)
            event_rows.append(connection, [event], self._database.now_us(connection))


def follow(connection: Connection, part_id: int, now_us: int) -> list[Event]:
    """Moves the aliases of a part that follow a metric to where its best value is now; returns what is to be told.

    Whoever changes metrics, or which checkpoints are live, calls it in the same transaction under the run's lock.
    """
    events = []
    for held in alias_rows.find_following(connection, part_id):
        best = alias_rows.best_checkpoint(connection, part_id, held.metric, held.direction)
        if best != held.checkpoint_id:
            row = AliasRow(part_id, held.name, best, held.metric, held.direction, held.protected, now_us)
            alias_rows.put_alias(connection, row)
            events.append(_moved(row))
    return events


def _settable(text: str, field: str) -> AliasName:
    name = AliasName.parse(text, field)
    if name.alias == LATEST:
        raise InvalidArgumentError(
            "the server keeps `latest` itself: it follows commits, and what a job resumed from",
            reason="ALIAS_RESERVED",
            field=field,
        )
    return name


def _check_unprotected(held: AliasRow, name: AliasName, *, force: bool) -> None:
    if held.protected and not force:
        raise FailedPreconditionError(
            f"{name.ref} is protected: move or delete it with --force", reason="ALIAS_PROTECTED"
        )


def _content(row: AliasRow) -> tuple[object, ...]:
    return row.checkpoint_id, row.metric, row.direction, row.protected


def _etag(row: AliasRow | None) -> str:
    return "" if row is None or row.name == LATEST else etag_of(row.part_id, row.name, *_content(row))


def _place(row: AliasRow) -> tuple[int, str]:
    return row.part_id, row.name


def _moved(row: AliasRow) -> Event:
    return Event(EventKind.ALIAS_MOVED, row.part_id, row.checkpoint_id or 0, row.name)


def _latest(connection: Connection, part_ids: Sequence[int]) -> list[AliasRow]:
    found = run_rows.latest_of(connection, part_ids)
    return [AliasRow(part_id, LATEST, latest_id, "", Direction.BY_HAND, False, 0) for part_id, latest_id in found]


def _infos(connection: Connection, rows: Sequence[AliasRow]) -> list[AliasInfo]:
    meant = checkpoint_rows.find_listed(
        connection, [row.checkpoint_id for row in rows if row.checkpoint_id is not None]
    )
    parts: dict[int, PartName] = {}
    infos = []
    for row in rows:
        if row.part_id not in parts:
            parts[row.part_id] = run_rows.part_by_id(connection, row.part_id).name
        listed = None if row.checkpoint_id is None else meant.get(row.checkpoint_id)
        infos.append(
            AliasInfo(
                name=str(AliasName(parts[row.part_id], row.name)),
                checkpoint="" if listed is None else present.checkpoint_of(listed).name,
                metric=row.metric,
                direction=Direction(row.direction),
                protected=row.protected,
                update_time_us=row.update_time_us or None,
                etag=_etag(row),
            )
        )
    return infos
