"""Where the saves of a run stand, for people and alarms: what is open and who is missing, and the last commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardbook.core import limits
from shardbook.core.names import PartName, RunName
from shardbook.errors import NotFoundError
from shardbook_server.release import release
from shardbook_server.service.catalog import CatalogService
from shardbook_server.service.descriptions import described
from shardbook_server.service.plans import PlanService
from shardbook_server.service.timing import timing_so_far
from shardbook_server.service.views import (
    AttemptCounts,
    CheckpointInfo,
    CheckpointState,
    RankHost,
    RunPartInfo,
    SaveTiming,
)
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


Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HostRanks:
    """Ranks of one host: how many, and as ranges, first and last by turns, at most ``limits.MAX_RANK_RANGES``.

    The host is empty where it is not known.
    """

    host: str
    rank_count: int
    bounds: tuple[int, ...]


@dataclass(frozen=True)
class AttemptStatus:
    """How far an open attempt has come; lists of ranks hold the lowest, at most ``limits.MAX_NAMED_RANKS``.

    Attributes:
        checkpoint: The attempt.
        counts: Numbers.
        missing: Ranks that are not registered.
        registered: Ranks that are.
        unplanned: Ranks that submitted no plan.
        plan_time_us: When all ranks had planned, by what those say that are registered; while none is, None where this
            server did not see it.
        timing: What the ranks that are registered took; None while none said.
        missing_hosts: Ranks that are not registered, by host, at most ``limits.MAX_NAMED_RANKS`` hosts.
        missing_host_count: How many hosts there are.
        unplanned_bounds: Ranks that submitted no plan, in ranges.
    """

    checkpoint: CheckpointInfo
    counts: AttemptCounts
    missing: tuple[RankHost, ...]
    registered: tuple[RankHost, ...]
    unplanned: tuple[int, ...]
    plan_time_us: int | None
    timing: SaveTiming | None
    missing_hosts: tuple[HostRanks, ...]
    missing_host_count: int
    unplanned_bounds: tuple[int, ...]


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
        told = {one.checkpoint_id: one for one in described(connection, list(listed.values()))}
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
        hosts = plan_rows.read_planned(connection, row.id)
        measured = registration_rows.read_measures(connection, row.id)
        registered = [rank for rank, _, _ in measured]
        absent, unplanned = _absent(registered, row.registration_count), _absent(list(hosts), row.world_size)
        counts = AttemptCounts(
            CheckpointState.OPEN, len(hosts), len(registered), row.world_size, row.registration_count
        )
        by_host = ranks_by_host(absent, hosts)
        timing = timing_so_far(measured, hosts)
        named = limits.MAX_NAMED_RANKS
        return AttemptStatus(
            checkpoint=checkpoint,
            counts=counts,
            missing=tuple(RankHost(rank, hosts.get(rank, "")) for rank in absent[:named].tolist()),
            registered=tuple(RankHost(rank, hosts.get(rank, "")) for rank in registered[:named]),
            unplanned=tuple(unplanned[:named].tolist()),
            plan_time_us=self._planned_us(row, timing, is_planned=not len(unplanned)),
            timing=timing,
            missing_hosts=by_host[:named],
            missing_host_count=len(by_host),
            unplanned_bounds=bounds_of(unplanned),
        )

    def _planned_us(self, row: CheckpointRow, timing: SaveTiming | None, *, is_planned: bool) -> int | None:
        """When all ranks had planned: what ranks say of it any replica tells, after a restart too."""
        if not is_planned or timing is None or not timing.phases:
            return self._plans.planned_us(row.id, row.create_time_us)
        return row.create_time_us + 1000 * timing.phases[0].slowest_ms


def saved_us(checkpoint: CheckpointInfo) -> int:
    """Returns when a checkpoint was whole, as far as anybody knows: what was recorded later was written before."""
    if checkpoint.recovered or checkpoint.commit_time_us is None:
        return checkpoint.create_time_us
    return checkpoint.commit_time_us


def ranks_by_host(ranks: Ranks, hosts: Mapping[int, str]) -> tuple[HostRanks, ...]:
    """Returns ranks by host, those of the lowest ranks first; ranks without a host are one group."""
    grouped: dict[str, list[int]] = {}
    for rank in ranks.tolist():
        grouped.setdefault(hosts.get(rank, ""), []).append(rank)
    return tuple(HostRanks(host, len(some), bounds_of(np.array(some, np.int64))) for host, some in grouped.items())


def bounds_of(ranks: Ranks) -> tuple[int, ...]:
    """Returns the first and last rank of each range of ascending ranks by turns, of the lowest ranges."""
    if not len(ranks):
        return ()
    ends = np.flatnonzero(np.diff(ranks) > 1)
    firsts, lasts = ranks[np.concatenate(([0], ends + 1))], ranks[np.concatenate((ends, [len(ranks) - 1]))]
    bounds: list[int] = np.stack((firsts, lasts), axis=1)[: limits.MAX_RANK_RANGES].ravel().tolist()
    return tuple(bounds)


def _absent(there: list[int], count: int) -> Ranks:
    """Which of ``count`` ranks are not there."""
    seen = np.zeros(count, dtype=np.bool_)
    seen[there] = True
    return np.flatnonzero(~seen)
