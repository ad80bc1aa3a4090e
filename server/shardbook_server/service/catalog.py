"""Finds runs and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shardbook.core.names import CheckpointName, PartName, RunName, check_segment
from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook_server.service import present
from shardbook_server.service.pages import Tokens, page_count
from shardbook_server.service.views import CheckpointInfo, Page, RunInfo, RunPartInfo
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.runs import RunRow

#: Stands for all of a kind in the parent of a listing.
_ANY: Final = "-"


class CatalogService:
    """Reads only. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps nothing but the key of the page tokens."""
        self._database = database
        self._tokens = Tokens(database)

    def get_run(self, name: str) -> RunInfo:
        """Returns one run; raises NotFoundError."""
        run = RunName.parse(name, "name")
        with self._database.read() as connection:
            row = run_rows.find_run(connection, run)
            if row is None:
                raise NotFoundError(f"{run.ref} does not exist; `shardbook runs` lists what there is")
            return self._runs(connection, [row])[0]

    def list_runs(self, parent: str, *, page_size: int = 0, page_token: str = "") -> Page[RunInfo]:
        """Returns one page of the runs of ``projects/{project}`` or ``projects/-``, by name.

        Raises:
            InvalidArgumentError: The parent, page size or token is not valid.
        """
        project = parent.removeprefix("projects/")
        if project == parent:
            raise InvalidArgumentError("the parent is projects/{project} or projects/-", field="parent")
        if project != _ANY:
            check_segment(project, "parent")
        listing = ("runs", project)
        count = page_count(page_size)
        after = _texts(self._tokens.read(listing, page_token))
        with self._database.read() as connection:
            rows = run_rows.page_of_runs(connection, None if project == _ANY else project, after, count + 1)
            items = self._runs(connection, rows[:count])
        token = ""
        if len(rows) > count:
            last = rows[count - 1].name
            token = self._tokens.make(listing, (last.project, last.run))
        return Page(tuple(items), token)

    def get_checkpoint(self, name: str) -> CheckpointInfo:
        """Returns the checkpoint that a resource name or ref names; raises NotFoundError."""
        parsed = CheckpointName.parse(name, "name")
        with self._database.read() as connection:
            return present.checkpoint_info(connection, present.resolve(connection, parsed))

    def get_attempt(self, checkpoint_id: int) -> CheckpointInfo:
        """Returns the checkpoint with a key that another answer gave; raises NotFoundError."""
        with self._database.read() as connection:
            return present.checkpoint_info(connection, checkpoint_id)

    def list_checkpoints(
        self, parent: str, *, page_size: int = 0, page_token: str = "", show_all: bool = False
    ) -> Page[CheckpointInfo]:
        """Returns one page of a part's checkpoints, newest session and step first; ``parts/-`` means all parts.

        Args:
            parent: ``projects/{project}/runs/{run}/parts/{part}``.
            page_size: 50 when 0, at most 1,000.
            page_token: From the page before.
            show_all: List attempts that are open, failed, expired or superseded too.

        Raises:
            NotFoundError: The run or part does not exist.
            InvalidArgumentError: The parent, page size or token is not valid.
        """
        run, part = _parent(parent)
        listing = ("checkpoints", str(run), part, str(show_all))
        count = page_count(page_size)
        after = _numbers(self._tokens.read(listing, page_token))
        with self._database.read() as connection:
            part_ids = _part_ids(connection, run, part)
            rows = checkpoint_rows.page(connection, part_ids, show_all=show_all, after=after, count=count + 1)
        token = ""
        if len(rows) > count:
            last = rows[count - 1].row
            token = self._tokens.make(listing, (last.session, last.step, last.id))
        return Page(tuple(present.checkpoint_of(row) for row in rows[:count]), token)

    def _runs(self, connection: Connection, rows: Sequence[RunRow]) -> list[RunInfo]:
        now_us = self._database.now_us(connection)
        statuses = run_rows.part_statuses(connection, [row.id for row in rows])
        latest_ids = [status.latest_id for status in statuses if status.latest_id is not None]
        latest = checkpoint_rows.find_listed(connection, latest_ids)
        parts: dict[int, list[RunPartInfo]] = {row.id: [] for row in rows}
        for status in statuses:
            newest = None if status.latest_id is None else latest[status.latest_id]
            parts[status.run_id].append(
                RunPartInfo(
                    part=status.part,
                    session=status.session,
                    host=status.host or "",
                    user=status.user or "",
                    job_id=status.job_id or "",
                    writing=(status.expire_time_us or 0) > now_us,
                    last_seen_time_us=status.seen_time_us,
                    latest="" if newest is None else present.checkpoint_of(newest).name,
                    latest_step=0 if newest is None else newest.row.step,
                    checkpoint_count=status.checkpoint_count,
                )
            )
        return [RunInfo(str(row.name), row.create_time_us, tuple(parts[row.id])) for row in rows]


def _parent(parent: str) -> tuple[RunName, str]:
    head, found, last = parent.rpartition("/parts/")
    if found and last == _ANY:
        return RunName.parse(head, "parent"), _ANY
    name = PartName.parse(parent, "parent")
    return name.run, name.part


def _part_ids(connection: Connection, run: RunName, part: str) -> list[int]:
    row = run_rows.find_run(connection, run)
    statuses = [] if row is None else run_rows.list_parts(connection, row.id)
    ids = [part_id for part_id, name in statuses if part in (_ANY, name)]
    if not ids:
        what = run.ref if part == _ANY else PartName(run, part).ref
        raise NotFoundError(f"{what} does not exist; `shardbook runs` lists what there is")
    return ids


def _texts(position: list[str | int] | None) -> tuple[str, str] | None:
    return None if position is None else (str(position[0]), str(position[1]))


def _numbers(position: list[str | int] | None) -> tuple[int, int, int] | None:
    return None if position is None else (int(position[0]), int(position[1]), int(position[2]))
