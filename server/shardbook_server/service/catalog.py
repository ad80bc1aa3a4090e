"""Finds runs and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from shardbook.core.names import CheckpointName, PartName, RunName, check_segment
from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook_server.service.pages import check_page_size, page_of, read_token
from shardbook_server.service.present import checkpoint_info, checkpoint_of, resolve
from shardbook_server.service.views import CheckpointInfo, Page, RunInfo, RunPartInfo
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import ListedCheckpoint
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.runs import PartStatusRow, RunRow

#: Stands for "all" in a parent, as in AIP-159.
_ALL = "-"
_PROJECT = re.compile(r"projects/([^/]*)")
_EVERY_PART = re.compile(r"(projects/[^/]*/runs/[^/]*)/parts/-")


class CatalogService:
    """Reads only. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get_run(self, name: str) -> RunInfo:
        """Returns one run; raises NotFoundError."""
        run_name = RunName.parse(name, "name")
        with self._database.read() as connection:
            run = run_rows.find_run(connection, run_name)
            if run is None:
                raise NotFoundError(f"nothing has been saved in {run_name.ref}: see `shardbook runs`")
            return self._infos(connection, [run])[0]

    def list_runs(self, parent: str, *, page_size: int = 0, page_token: str = "") -> Page[RunInfo]:
        """Returns one page of the runs of ``projects/{project}`` or ``projects/-``, by name."""
        match = _PROJECT.fullmatch(parent)
        if match is None:
            raise InvalidArgumentError("parent is not projects/{project} or projects/-", field="parent")
        project = None if match[1] == _ALL else check_segment(match[1], "parent")
        size = check_page_size(page_size)
        listing = ("runs", parent)
        with self._database.read() as connection:
            key = event_rows.read_token_key(connection)
            after = read_token(key, listing, page_token)
            behind = None if after is None else (str(after[0]), str(after[1]))
            runs = run_rows.page_of_runs(connection, project, behind, size + 1)
            infos = dict(zip((run.id for run in runs), self._infos(connection, runs), strict=True))
        return page_of(
            key,
            listing,
            runs,
            size,
            position=lambda run: (run.name.project, run.name.run),
            item=lambda run: infos[run.id],
        )

    def get_checkpoint(self, name: str) -> CheckpointInfo:
        """Returns the checkpoint that a resource name or ref names; raises NotFoundError."""
        wanted = CheckpointName.parse(name)
        with self._database.read() as connection:
            return checkpoint_info(connection, resolve(connection, wanted))

    def get_attempt(self, checkpoint_id: int) -> CheckpointInfo:
        """Returns the checkpoint with a key that another answer gave; raises NotFoundError."""
        with self._database.read() as connection:
            return checkpoint_info(connection, checkpoint_id)

    def list_checkpoints(
        self, parent: str, *, page_size: int = 0, page_token: str = "", show_all: bool = False
    ) -> Page[CheckpointInfo]:
        """Returns one page of a part's checkpoints, newest session and step first; ``parts/-`` means all parts.

        Args:
            parent: ``projects/{project}/runs/{run}/parts/{part}``.
            page_size: 50 when 0, at most 1,000.
            page_token: From the page before.
            show_all: List attempts that are open, failed, expired or superseded too.
        """
        size = check_page_size(page_size)
        listing = ("checkpoints", parent, str(show_all))
        with self._database.read() as connection:
            part_ids = self._part_ids(connection, parent)
            key = event_rows.read_token_key(connection)
            after = read_token(key, listing, page_token)
            behind = None if after is None else (int(after[0]), int(after[1]), int(after[2]))
            rows = checkpoint_rows.page(connection, part_ids, show_all=show_all, after=behind, count=size + 1)
        return page_of(key, listing, rows, size, position=_position, item=checkpoint_of)

    def _part_ids(self, connection: Connection, parent: str) -> list[int]:
        every = _EVERY_PART.fullmatch(parent)
        if every is None:
            name = PartName.parse(parent)
            part = run_rows.find_parts(connection, [name]).get(name)
            if part is None:
                raise NotFoundError(f"nothing has been saved in {name.ref}: see `shardbook runs`")
            return [part.id]
        run_name = RunName.parse(every[1], "parent")
        run = run_rows.find_run(connection, run_name)
        if run is None:
            raise NotFoundError(f"nothing has been saved in {run_name.ref}: see `shardbook runs`")
        return [status.part_id for status in run_rows.part_statuses(connection, [run.id])]

    def _infos(self, connection: Connection, runs: Sequence[RunRow]) -> list[RunInfo]:
        statuses = run_rows.part_statuses(connection, [run.id for run in runs])
        latest = {status.latest_id for status in statuses if status.latest_id is not None}
        listed = checkpoint_rows.find_listed_by_ids(connection, sorted(latest))
        now_us = self._database.now_us(connection)
        by_run: dict[int, list[RunPartInfo]] = {run.id: [] for run in runs}
        for status in statuses:
            by_run[status.run_id].append(_part_info(status, listed, now_us))
        return [RunInfo(str(run.name), run.create_time_us, tuple(by_run[run.id])) for run in runs]


def _position(listed: ListedCheckpoint) -> tuple[int, int, int]:
    return listed.row.session, listed.row.step, listed.row.id


def _part_info(status: PartStatusRow, listed: Mapping[int, ListedCheckpoint], now_us: int) -> RunPartInfo:
    latest = None if status.latest_id is None else listed.get(status.latest_id)
    return RunPartInfo(
        part=status.part,
        session=status.session,
        host=status.host or "",
        user=status.user or "",
        job_id=status.job_id or "",
        writing=status.expire_time_us is not None and status.expire_time_us > now_us,
        last_seen_time_us=status.seen_time_us,
        latest="" if latest is None else checkpoint_of(latest).name,
        latest_step=0 if latest is None else latest.row.step,
        checkpoint_count=status.checkpoint_count,
    )
