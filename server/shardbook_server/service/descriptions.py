"""What is said of checkpoints: labels, metrics, notes, and who wrote them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from shardbook.core import limits
from shardbook.core.names import LATEST, CheckpointName
from shardbook.errors import InvalidArgumentError
from shardbook_server.service import aliases, present
from shardbook_server.service.describing import Changes, Description, Writer
from shardbook_server.service.etags import check_etag, checkpoint_etag
from shardbook_server.service.timing import timing_from_json
from shardbook_server.service.views import CheckpointInfo, HoldView
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import descriptions as description_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import holds as hold_rows
from shardbook_server.storage import sessions as session_rows
from shardbook_server.storage.checkpoints import CheckpointRow, ListedCheckpoint
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.descriptions import NOTHING_SAID, DescriptionRow, Said
from shardbook_server.storage.sessions import SessionRow


class DescriptionService:
    """Changes what is said of checkpoints. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps no state of its own."""
        self._database = database

    def update(self, name: str, changes: Changes, *, etag: str = "") -> CheckpointInfo:
        """Changes what is said of a checkpoint; aliases that follow a metric move in the same transaction.

        The same again changes nothing more, but with an etag, which is another one then.

        Raises:
            NotFoundError: There is no such checkpoint.
            InvalidArgumentError: It would have too many labels or metrics.
            AbortedError: It has another etag by now.
        """
        parsed = CheckpointName.parse(name, "checkpoint.name")
        with self._database.write([parsed.part.run]) as connection:
            now_us = self._database.now_us(connection)
            checkpoint_id = present.resolve(connection, parsed)
            row = checkpoint_rows.find_by_id(connection, checkpoint_id)
            check_unchanged(connection, row.id, parsed, etag, now_us, "checkpoint.etag")
            held = description_rows.find_said(connection, [row.id]).get(row.id, NOTHING_SAID)
            self._labels(connection, row, held.labels, changes)
            measured = self._metrics(connection, row, held.metrics, changes)
            if "note" in changes.paths:
                description_rows.set_note(connection, row.id, changes.note)
            events = aliases.follow(connection, row.part_id, now_us) if measured else []
            info = full_info(connection, row.id, now_us)
            event_rows.append(connection, events, now_us)
            return info

    @staticmethod
    def _labels(connection: Connection, row: CheckpointRow, held: Mapping[str, str], changes: Changes) -> None:
        named = changes.named("labels", held) or set()
        wanted = {key: value for key, value in changes.labels.items() if key in named}
        _check_total(set(held) - named | set(wanted), "labels", limits.MAX_LABELS)
        description_rows.delete_labels(connection, row.id, sorted(named - set(wanted)))
        description_rows.set_labels(connection, row.id, wanted)

    @staticmethod
    def _metrics(connection: Connection, row: CheckpointRow, held: Mapping[str, float], changes: Changes) -> bool:
        named = changes.named("metrics", held) or set()
        wanted = {key: value for key, value in changes.metrics.items() if key in named}
        _check_total(set(held) - named | set(wanted), "metrics", limits.MAX_METRICS)
        description_rows.delete_metrics(connection, row.id, sorted(named - set(wanted)))
        description_rows.set_metrics(connection, row.id, row.part_id, wanted)
        return bool(named)


def describe(connection: Connection, row: CheckpointRow, description: Description, timing: str) -> None:
    """Stores what is said of a checkpoint that is being committed.

    Args:
        connection: In the transaction that commits.
        row: The checkpoint.
        description: The coordinator's word.
        timing: What stands out, as it is stored.
    """
    description_rows.set_labels(connection, row.id, description.labels)
    description_rows.set_metrics(connection, row.id, row.part_id, description.metrics)
    writer = description.writer
    if row.session > 0 and not (writer.host and writer.user and writer.job_id):
        session = session_rows.find_session(connection, row.part_id, number=row.session)
        if session is not None and session.incarnation == row.incarnation:
            writer = _completed(writer, session)
    known = {name: value for name, value in vars(writer).items() if value}
    text = json.dumps(known, separators=(",", ":")) if known else ""
    description_rows.put_description(connection, row.id, DescriptionRow(description.note, text, timing))


def described(connection: Connection, listed: Sequence[ListedCheckpoint]) -> list[CheckpointInfo]:
    """Returns checkpoints as they are answered, with their labels, metrics and aliases."""
    found = description_rows.find_said(connection, [one.row.id for one in listed])
    for one in listed:
        if one.row.id == one.latest_id:
            found.setdefault(one.row.id, Said()).aliases.append(LATEST)
    return [present.checkpoint_of(one, found.get(one.row.id, NOTHING_SAID)) for one in listed]


def full_info(connection: Connection, checkpoint_id: int, now_us: int) -> CheckpointInfo:
    """Returns a checkpoint with all that is said of it, also what listings leave out; raises NotFoundError."""
    info = described(connection, [present.listed_by_id(connection, checkpoint_id)])[0]
    row = description_rows.find_description(connection, checkpoint_id)
    known = json.loads(row.writer) if row.writer else {}
    writer = Writer(**{one.name: known.get(one.name, "") for one in dataclasses.fields(Writer)})
    held = hold_rows.find_holds(connection, [checkpoint_id], now_us).get(checkpoint_id, [])
    holds = tuple(HoldView(**vars(one)) for one in held)
    timing = timing_from_json(row.timing)
    info = dataclasses.replace(info, note=row.note, writer=writer, timing=timing, holds=holds)
    return dataclasses.replace(info, etag=checkpoint_etag(info))


def check_unchanged(
    connection: Connection, checkpoint_id: int, name: CheckpointName, etag: str, now_us: int, field: str
) -> None:
    """Refuses to change a checkpoint that is not as the caller saw it; without an etag he saw it as it is.

    Raises:
        AbortedError: It has another etag by now.
    """
    if etag:
        check_etag(etag, full_info(connection, checkpoint_id, now_us).etag, name.ref, field)


def _completed(writer: Writer, session: SessionRow) -> Writer:
    """Returns a writer with what its session knows, where it does not say itself."""
    return dataclasses.replace(
        writer,
        host=writer.host or session.host,
        user=writer.user or session.user,
        job_id=writer.job_id or session.job_id,
    )


def _check_total(names: set[str], what: str, limit: int) -> None:
    if len(names) > limit:
        raise InvalidArgumentError(
            f"the checkpoint would have {len(names)} {what}, the limit is {limit}",
            reason="LIMIT_EXCEEDED",
            field=f"checkpoint.{what}",
        )
