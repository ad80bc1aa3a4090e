"""Finds runs and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from shardbook.core.names import CheckpointName, RunName, check_segment
from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook_server.service import present
from shardbook_server.service.descriptions import described, full_info
from shardbook_server.service.filters import parse_filter, parse_order
from shardbook_server.service.pages import Tokens, page_count
from shardbook_server.service.places import ANY, parse_parent, part_ids_of
from shardbook_server.service.timing import RankStats
from shardbook_server.service.views import CheckpointInfo, Page, ProjectInfo, RankView, RunInfo, RunPartInfo
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import descriptions as description_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.listing import page
from shardbook_server.storage.listing_statements import NEWEST, NEWEST_STEP, Listing
from shardbook_server.storage.runs import RunRow


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
        if project != ANY:
            check_segment(project, "parent")
        listing = ("runs", project)
        count = page_count(page_size)
        after = _texts(self._tokens.read(listing, page_token))
        with self._database.read() as connection:
            rows = run_rows.page_of_runs(connection, None if project == ANY else project, after, count + 1)
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
            return full_info(connection, present.resolve(connection, parsed), self._database.now_us(connection))

    def get_attempt(self, checkpoint_id: int) -> CheckpointInfo:
        """Returns the checkpoint with a key that another answer gave, without what is said; raises NotFoundError."""
        with self._database.read() as connection:
            return present.checkpoint_info(connection, checkpoint_id)

    def list_projects(self, *, page_size: int = 0, page_token: str = "") -> Page[ProjectInfo]:
        """Returns one page of projects, by name; raises InvalidArgumentError."""
        listing = ("projects",)
        count = page_count(page_size)
        position = self._tokens.read(listing, page_token)
        with self._database.read() as connection:
            rows = run_rows.page_of_projects(connection, None if position is None else str(position[0]), count + 1)
        token = self._tokens.make(listing, (rows[count - 1][0],)) if len(rows) > count else ""
        return Page(tuple(ProjectInfo(f"projects/{name}", number) for name, number in rows[:count]), token)

    def list_checkpoints(
        self,
        parent: str,
        *,
        page_size: int = 0,
        page_token: str = "",
        show_all: bool = False,
        filter_text: str = "",
        order_by: str = "",
    ) -> Page[CheckpointInfo]:
        """Returns one page of the checkpoints of a part, of a run, or of several runs.

        Args:
            parent: ``projects/{project}/runs/{run}/parts/{part}``, each of them ``-`` for all.
            page_size: 50 when 0, at most 1,000.
            page_token: From the page before.
            show_all: List attempts that are open, failed, expired or superseded too.
            filter_text: See ``filters.parse_filter``.
            order_by: See ``filters.parse_order``; empty for the newest session and step of a run first, and for the
                newest first in several.

        Raises:
            NotFoundError: The run or part does not exist.
            InvalidArgumentError: The parent, filter, order, page size or token is not valid.
        """
        place = parse_parent(parent)
        condition, order = parse_filter(filter_text), parse_order(order_by)
        scope = ("listing", parent, filter_text, order_by, str(show_all))
        count = page_count(page_size)
        position = self._tokens.read(scope, page_token)
        with self._database.read() as connection:
            part_ids = None if place.one_run is None else tuple(part_ids_of(connection, place))
            order = order or (NEWEST if part_ids is None else NEWEST_STEP)
            listing = Listing(part_ids, place.conditions, condition, order, show_all)
            keys = page(connection, listing, None if position is None else tuple(position), count + 1)
            listed = checkpoint_rows.find_listed(connection, [int(key[-1]) for key in keys[:count]])
            items = described(connection, [listed[int(key[-1])] for key in keys[:count]])
        token = self._tokens.make(scope, keys[count - 1]) if len(keys) > count else ""
        return Page(tuple(items), token)

    def list_ranks(self, name: str, *, page_size: int = 0, page_token: str = "") -> Page[RankView]:
        """Returns one page of what the ranks of a committed checkpoint took and wrote, by rank.

        Raises:
            NotFoundError: It does not exist, or is not committed.
            InvalidArgumentError: The name, page size or token is not valid.
        """
        parsed = CheckpointName.parse(name, "parent")
        scope = ("ranks", name)
        count = page_count(page_size)
        position = self._tokens.read(scope, page_token)
        first = 0 if position is None else int(position[0])
        with self._database.read() as connection:
            # The first page says which checkpoint an alias meant.
            checkpoint_id = present.resolve_committed(connection, parsed).id if position is None else int(position[1])
            payload = description_rows.read_rank_stats(connection, checkpoint_id)
        if payload is None:
            return Page(())
        stats = RankStats.decode(payload)
        total = len(stats.size_bytes)
        columns = zip(stats.size_bytes.tolist(), *stats.phase_ms.tolist(), strict=True)
        items = tuple(RankView(rank, *values) for rank, values in enumerate(columns) if first <= rank < first + count)
        token = self._tokens.make(scope, (first + count, checkpoint_id)) if first + count < total else ""
        return Page(items, token, total)

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


def _texts(position: list[str | int | float] | None) -> tuple[str, str] | None:
    return None if position is None else (str(position[0]), str(position[1]))
