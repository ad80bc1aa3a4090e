"""Checkpoints that are deleted and brought back, and those whose data is lost.

Nothing here touches a data file. A deleted checkpoint keeps all that is known of it until it is purged, so that it can
be brought back, and so that a client that deletes its files has the list of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shardbook.core import limits, refusals
from shardbook.core.names import CheckpointName
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook_server.service import checks, present
from shardbook_server.service.aliases import follow
from shardbook_server.service.closing import is_newer, moves_latest
from shardbook_server.service.descriptions import check_unchanged, full_info
from shardbook_server.service.holds import check_not_held
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from shardbook_server.storage import aliases as alias_rows
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import locations as location_rows
from shardbook_server.storage import retention as rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import DATA_MISSING, FILES_GOING, FILES_GONE, PURGED, CheckpointRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.events import Event, EventKind
from shardbook_server.storage.runs import PartRow

#: How long a deleted checkpoint can be brought back, unless it is set otherwise, seconds.
UNDELETE_S: Final = 7 * 86_400.0


class DeletionService:
    """Deletes, brings back, and notes what became of data files. Thread-safe."""

    def __init__(self, database: Database, *, undelete_s: float = UNDELETE_S) -> None:
        """Keeps no state of its own; ``undelete_s`` is how long what is deleted can be brought back, seconds."""
        self._database = database
        self._undelete_us = round(undelete_s * 1e6)

    def delete(
        self, name: str, *, force: bool = False, files: bool = False, etag: str = ""
    ) -> tuple[CheckpointInfo, tuple[str, ...]]:
        """Deletes a committed checkpoint, and the aliases that mean it; the same again answers the same.

        With ``force`` also one that ``latest`` means, which then means the newest one left, or that a protected alias
        means. What is held is not deleted by force either. With ``files`` the caller goes on to delete the data files,
        so that nothing brings it back.

        Returns:
            The checkpoint, and the names of the aliases that went with it.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not committed (``NOT_COMMITTED``), somebody holds it or works on it
                (``CHECKPOINT_HELD``),
                ``latest`` means it (``LATEST_CHECKPOINT``), or a protected alias (``ALIAS_PROTECTED``).
            AbortedError: It has another etag by now.
        """
        parsed = CheckpointName.parse(name, "name")
        with self._database.write([parsed.part.run]) as connection:
            now_us = self._database.now_us(connection)
            row = self._named(connection, parsed)
            check_unchanged(connection, row.id, parsed, etag, now_us, "etag")
            if row.state == CheckpointState.DELETED:
                if files and not row.flags & (FILES_GOING | PURGED):
                    rows.set_flags(connection, row.id, row.flags | FILES_GOING)
                return full_info(connection, row.id, now_us), ()
            if row.state != CheckpointState.COMMITTED:
                raise FailedPreconditionError(
                    f"{parsed.ref} is {CheckpointState(row.state).name}: only what is committed can be deleted",
                    reason="NOT_COMMITTED",
                )
            checkpoint_rows.lock_committed(connection, [row.id])
            check_not_held(connection, row.id, parsed, now_us)
            aliases, events = self._unname(connection, row, parsed, force=force)
            mark(connection, [row], now_us, self._undelete_us, events, files=files)
            return full_info(connection, row.id, now_us), aliases

    @staticmethod
    def _named(connection: Connection, name: CheckpointName) -> CheckpointRow:
        try:
            checkpoint_id = present.resolve(connection, name)
        except NotFoundError as error:
            if error.reason != "CHECKPOINT_DELETED":
                raise
            checkpoint_id = present.resolve(connection, CheckpointName.parse(error.metadata["name"]))
        return checkpoint_rows.find_by_id(connection, checkpoint_id)

    @staticmethod
    def _unname(
        connection: Connection, row: CheckpointRow, name: CheckpointName, *, force: bool
    ) -> tuple[tuple[str, ...], list[Event]]:
        """Takes away the names of what is about to be deleted; returns the aliases that are gone."""
        meaning = [one for one in alias_rows.find_meaning(connection, row.id) if one.direction == alias_rows.BY_HAND]
        if run_rows.part_by_id(connection, row.part_id).latest_id == row.id and not force:
            raise FailedPreconditionError(refusals.is_latest(name.ref), reason="LATEST_CHECKPOINT")
        for alias in meaning:
            if alias.protected and not force:
                raise FailedPreconditionError(refusals.is_protected(name.ref, alias.name), reason="ALIAS_PROTECTED")
        events = []
        for alias in meaning:
            alias_rows.delete_alias(connection, row.part_id, alias.name)
            events.append(Event(EventKind.ALIAS_DELETED, row.part_id, row.id, alias.name))
        return tuple(alias.name for alias in meaning), events

    def undelete(self, name: str) -> CheckpointInfo:
        """Brings a deleted checkpoint back; what is committed is returned as it is.

        It is live again unless a later session saved the step since, and ``latest`` again where a commit of it would
        have been. Aliases that went with it do not come back.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not deleted (``NOT_DELETED``), its data files are (``FILES_DELETED``), or
                what was known of it is gone (``CHECKPOINT_PURGED``).
        """
        parsed = CheckpointName.parse(name, "name")
        with self._database.write([parsed.part.run]) as connection:
            now_us = self._database.now_us(connection)
            row = self._deleted(connection, parsed)
            if row.state == CheckpointState.COMMITTED:
                return full_info(connection, row.id, now_us)
            _check_undeletable(row, parsed)
            part = run_rows.part_by_id(connection, row.part_id)
            events = [Event(EventKind.UNDELETED, row.part_id, row.id)]
            live = checkpoint_rows.find_live(connection, row.part_id, row.step)
            takes_over = live is None or is_newer(row, live)
            if live is not None and takes_over:
                checkpoint_rows.supersede(connection, live.id)
                events.append(Event(EventKind.SUPERSEDED, row.part_id, live.id))
            rows.mark_undeleted(connection, row.id, live=takes_over)
            if takes_over and (part.latest_id is None or _takes_latest(connection, part, row)):
                run_rows.set_latest(connection, row.part_id, row.id)
                events.append(Event(EventKind.LATEST_MOVED, row.part_id, row.id))
            events += follow(connection, row.part_id, now_us)
            info = full_info(connection, row.id, now_us)
            event_rows.append(connection, events, now_us)
            return info

    @staticmethod
    def _deleted(connection: Connection, name: CheckpointName) -> CheckpointRow:
        part = run_rows.find_parts(connection, [name.part]).get(name.part)
        found = None if part is None else present.resolve_deleted(connection, part.id, name.id)
        if found is None:
            found = present.resolve(connection, name)
        return checkpoint_rows.find_by_id(connection, found)

    def report_missing(self, name: str, *, missing: bool) -> CheckpointInfo:
        """Notes that data files of a committed checkpoint are lost, or that all were found again.

        ``latest`` and the aliases that follow a metric pass over one whose data is lost: ``latest`` as long as there is
        another one, so that a job whose only checkpoint is damaged fails rather than begins anew. The same again
        changes nothing.

        Raises:
            NotFoundError: There is no such checkpoint, or it was deleted.
            FailedPreconditionError: It is not committed (``NOT_COMMITTED``).
        """
        parsed = CheckpointName.parse(name, "name")
        with self._database.write([parsed.part.run]) as connection:
            now_us = self._database.now_us(connection)
            row = present.resolve_committed(connection, parsed)
            if bool(row.flags & DATA_MISSING) is not missing:
                rows.set_flags(connection, row.id, row.flags ^ DATA_MISSING)
                kind = EventKind.DATA_LOST if missing else EventKind.DATA_FOUND
                events = [Event(kind, row.part_id, row.id), *self._latest_of_whole(connection, row, missing=missing)]
                events += follow(connection, row.part_id, now_us)
                event_rows.append(connection, events, now_us)
            return full_info(connection, row.id, now_us)

    @staticmethod
    def _latest_of_whole(connection: Connection, row: CheckpointRow, *, missing: bool) -> list[Event]:
        part = run_rows.part_by_id(connection, row.part_id)
        if missing:
            wanted = rows.newest_live(connection, row.part_id, whole=True) if part.latest_id == row.id else None
        else:
            wanted = row.id if row.live and moves_latest(connection, part, row) else None
        if wanted is None or wanted == part.latest_id:
            return []
        run_rows.set_latest(connection, row.part_id, wanted)
        return [Event(EventKind.LATEST_MOVED, row.part_id, wanted)]

    def record_files(self, name: str, locations: Sequence[str], *, done: bool) -> tuple[CheckpointInfo, list[str]]:
        """Notes that a client begins to delete the data files of a deleted checkpoint, or has; the same again is fine.

        From the beginning on it cannot be brought back, and it is not purged before the end.

        Args:
            name: Full name of the checkpoint.
            locations: What means the same directory to the client, beside its location.
            done: False before the first file goes, True after the last one.

        Returns:
            The checkpoint, and the names of others there that can be loaded, are being written or may be again, or can
            be brought back, and may have some of its files; the first ``limits.MAX_PAGE_SIZE``.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not deleted (``NOT_DELETED``), or was purged (``CHECKPOINT_PURGED``).
        """
        parsed = CheckpointName.parse(name, "name")
        if len(locations) > limits.MAX_SAME_LOCATIONS:
            raise InvalidArgumentError(
                f"{len(locations)} locations, the limit is {limits.MAX_SAME_LOCATIONS}",
                reason="LIMIT_EXCEEDED",
                field="locations",
            )
        for at, one in enumerate(locations):
            checks.check_text(one, f"locations[{at}]", limits.MAX_LOCATION_BYTES)
        with self._database.write([parsed.part.run]) as connection:
            now_us = self._database.now_us(connection)
            row = self._named(connection, parsed)
            if row.state != CheckpointState.DELETED:
                raise FailedPreconditionError(
                    f"{parsed.ref} is not deleted: `shardbook rm {parsed.ref} --delete-files`", reason="NOT_DELETED"
                )
            if row.flags & PURGED:
                raise _purged(parsed)
            rows.set_flags(connection, row.id, row.flags | FILES_GOING | (FILES_GONE if done else 0))
            also = location_rows.find_others(connection, [row.id]).get(row.id, ())
            everywhere = [row.location, *also, *locations]
            sharing = rows.find_sharing(connection, row.id, row.prefix, everywhere, limits.MAX_PAGE_SIZE)
            listed = checkpoint_rows.find_listed(connection, sharing)
            names = [present.checkpoint_of(listed[one]).name for one in sharing]
            return full_info(connection, row.id, now_us), names


def mark(
    connection: Connection,
    deleted: Sequence[CheckpointRow],
    now_us: int,
    undelete_us: int,
    events: Sequence[Event],
    *,
    files: bool,
) -> None:
    """Turns checkpoints of one part DELETED, moves what meant them, and says so. The last step of a transaction.

    Args:
        connection: In the transaction, which holds the run's lock.
        deleted: Committed checkpoints, at least one.
        now_us: The database's time.
        undelete_us: How long they can be brought back.
        events: What else there is to say.
        files: True when a client goes on to delete their data files.
    """
    part = run_rows.part_by_id(connection, deleted[0].part_id)
    rows.mark_deleted(connection, [row.id for row in deleted], now_us, now_us + undelete_us, files=files)
    told = [*events, *(Event(EventKind.DELETED, part.id, row.id) for row in deleted)]
    if part.latest_id in {row.id for row in deleted}:
        newest = rows.newest_live(connection, part.id, whole=True) or rows.newest_live(connection, part.id, whole=False)
        run_rows.set_latest(connection, part.id, newest)
        told.append(Event(EventKind.LATEST_MOVED, part.id, newest or 0))
    told += follow(connection, part.id, now_us)
    event_rows.append(connection, told, now_us)


def _takes_latest(connection: Connection, part: PartRow, row: CheckpointRow) -> bool:
    return not row.flags & DATA_MISSING and moves_latest(connection, part, row)


def _check_undeletable(row: CheckpointRow, name: CheckpointName) -> None:
    if row.state != CheckpointState.DELETED:
        raise FailedPreconditionError(
            f"{name.ref} is {CheckpointState(row.state).name}, not DELETED", reason="NOT_DELETED"
        )
    if row.flags & FILES_GOING:
        raise FailedPreconditionError(
            f"the data files of {name.ref} were deleted, or begun to be: nothing brings it back",
            reason="FILES_DELETED",
        )
    if row.flags & PURGED:
        raise _purged(name)


def _purged(name: CheckpointName) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{name.ref} was deleted, and what was known of it is gone; its directory can be loaded by path while it is "
        "there, and `shardbook import` records it anew, in another run: this name is not given again",
        reason="CHECKPOINT_PURGED",
    )
