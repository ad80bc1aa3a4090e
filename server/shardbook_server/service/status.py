"""Where the saves of a run stand, for people and alarms: what is open and who is missing, and the last commit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardbook.core import limits
from shardbook.core.names import PartName, RunName
from shardbook.errors import NotFoundError
from shardbook_server.release import release
from shardbook_server.service import present
from shardbook_server.service.catalog import CatalogService
from shardbook_server.service.plans import PlanService
from shardbook_server.service.views import AttemptCounts, CheckpointInfo, CheckpointState, RankHost, RunPartInfo
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import plans as plan_rows
from shardbook_server.storage import recent as recent_rows
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.urls import is_postgres

#: What ``last_failure`` may be.
_FAILED = (CheckpointState.FAILED, CheckpointState.EXPIRED)


@dataclass(frozen=True)
class AttemptStatus:
    """How far an open attempt has come; lists of ranks hold the lowest, at most ``limits.MAX_NAMED_RANKS``.

    Attributes:
        checkpoint: The attempt.
        counts: Numbers.
        missing: Ranks that are not registered.
        registered: Ranks that are.
        unplanned: Ranks that submitted no plan.
        plan_time_us: When all ranks had planned; None while they have not, or when this server did not see it.
    """

    checkpoint: CheckpointInfo
    counts: AttemptCounts
    missing: tuple[RankHost, ...]
    registered: tuple[RankHost, ...]
    unplanned: tuple[int, ...]
    plan_time_us: int | None


@dataclass(frozen=True)
class PartStatus:
    """Where the saves of one part stand.

    Attributes:
        part: The part, and who writes it.
        last_commit: The newest committed checkpoint; None when there is none.
        last_failure: The newest attempt, when it failed or expired.
        open: Open attempts, newest first, at most ``limits.MAX_OPEN_SHOWN``.
        open_count: How many there are.
    """

    part: RunPartInfo
    last_commit: CheckpointInfo | None
    last_failure: CheckpointInfo | None
    open: tuple[AttemptStatus, ...]
    open_count: int


@dataclass(frozen=True)
class RunStatus:
    """Where the saves of a run stand, by part, and when that was so."""

    parts: tuple[PartStatus, ...]
    read_time_us: int


@dataclass(frozen=True)
class ServerInfo:
    """Who answers: the release, the kind of its database, and the time there."""

    version: str
    database: str
    time_us: int


class StatusService:
    """Reads only. Thread-safe."""

    def __init__(self, database: Database, catalog: CatalogService, plans: PlanService) -> None:
        """Keeps no state of its own."""
        self._database = database
        self._catalog = catalog
        self._plans = plans

    def server_info(self) -> ServerInfo:
        """Returns who answers."""
        with self._database.read() as connection:
            now_us = self._database.now_us(connection)
        kind = "postgresql" if is_postgres(self._database.url) else "sqlite"
        return ServerInfo(release(), kind, now_us)

    def run_status(self, run: str, part: str = "") -> RunStatus:
        """Returns where the saves of a run stand, in proportion to what is open, however much was saved.

        Args:
            run: The run.
            part: One part; empty for all.

        Raises:
            NotFoundError: There is no such run or part.
            InvalidArgumentError: A name cannot be one.
        """
        name = RunName.parse(run, "run")
        wanted = PartName(name, part).part if part else ""
        infos = {info.part: info for info in self._catalog.get_run(str(name)).parts}
        if wanted and wanted not in infos:
            raise NotFoundError(
                f"{PartName(name, wanted).ref} does not exist; `shardbook status {name.ref}` tells of all"
            )
        with self._database.read() as connection:
            parts = run_rows.list_parts(connection, name)
            found = [
                self._part(connection, part_id, infos[one])
                for part_id, one in parts
                if one in infos and wanted in ("", one)
            ]
            return RunStatus(tuple(found), self._database.now_us(connection))

    def _part(self, connection: Connection, part_id: int, info: RunPartInfo) -> PartStatus:
        staged = checkpoint_rows.read_staged(connection, [part_id])
        # What sync and import record is no save that anybody waits for.
        opened = [row for row in staged if row.state == CheckpointState.OPEN and not row.recovered]
        opened.sort(key=lambda row: (row.session, row.step, row.id), reverse=True)
        newest = recent_rows.newest_attempt(connection, part_id)
        committed = recent_rows.newest_committed(connection, part_id)
        shown = opened[: limits.MAX_OPEN_SHOWN]
        ids = [*committed, *([] if newest is None else [newest]), *(row.id for row in shown)]
        listed = checkpoint_rows.find_listed(connection, ids)
        told = {checkpoint_id: present.checkpoint_of(one) for checkpoint_id, one in listed.items()}
        last = max((told[one] for one in committed), key=saved_us, default=None)
        tip = None if newest is None else told[newest]
        return PartStatus(
            part=info,
            last_commit=last,
            last_failure=tip if tip is not None and tip.state in _FAILED else None,
            open=tuple(self._attempt(connection, row, told[row.id]) for row in shown),
            open_count=len(opened),
        )

    def _attempt(self, connection: Connection, row: CheckpointRow, checkpoint: CheckpointInfo) -> AttemptStatus:
        planned = plan_rows.read_ranks(connection, row.id)
        registered = registration_rows.read_ranks(connection, row.id)
        absent, there = _absent(registered, row.registration_count), registered[: limits.MAX_NAMED_RANKS]
        hosts = plan_rows.read_hosts(connection, row.id, [*absent, *there])
        counts = AttemptCounts(
            CheckpointState.OPEN, len(planned), len(registered), row.world_size, row.registration_count
        )
        return AttemptStatus(
            checkpoint=checkpoint,
            counts=counts,
            missing=tuple(RankHost(rank, hosts.get(rank, "")) for rank in absent),
            registered=tuple(RankHost(rank, hosts.get(rank, "")) for rank in there),
            unplanned=tuple(_absent(planned, row.world_size)),
            plan_time_us=self._plans.planned_us(row.id, row.create_time_us),
        )


def saved_us(checkpoint: CheckpointInfo) -> int:
    """Returns when a checkpoint was whole, as far as anybody knows: what was recorded later was written before."""
    if checkpoint.recovered or checkpoint.commit_time_us is None:
        return checkpoint.create_time_us
    return checkpoint.commit_time_us


def _absent(there: list[int], count: int) -> list[int]:
    """The lowest of ``count`` ranks that are not there, at most ``limits.MAX_NAMED_RANKS``."""
    seen = np.zeros(count, dtype=np.bool_)
    seen[there] = True
    named: list[int] = np.flatnonzero(~seen)[: limits.MAX_NAMED_RANKS].tolist()
    return named
