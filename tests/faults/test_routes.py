"""Ranks whose routes to the service differ: what one of them knows all of them learn. Rows 11, 30 and 34."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shardbook import CheckpointState
from shardbook.dcp import SaveState
from shardbook.errors import NotFoundError, RankFailedError
from tests.faults import jobs, routes
from tests.faults.processes import await_stop, await_that
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch.harness import RankPool

_PATIENCE = {"SHARDBOOK_OUTAGE_FIRST_S": "2", "SHARDBOOK_OUTAGE_LATER_S": "0.5"}
#: Far from the five minutes and the half hour that ranks wait for data.
_AT_ONCE_S = 45.0


@pytest.mark.parametrize("cut_off", [[2], [0], [0, 2]], ids=["the one that fails", "the coordinator", "both"])
def test_a_full_disk_while_some_ranks_have_no_route(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, cut_off: list[int]
) -> None:
    """Row 34: whoever waits for the rank learns which one failed, where and why, by whichever way there is."""
    start = {"run": run, "server": shared_server.address}
    outcomes = pool.start(
        routes.full_disk, start, str(tmp_path / "step-1"), 2, cut_off, world_size=3, environment=_PATIENCE
    ).outcomes(_AT_ONCE_S)
    assert isinstance(outcomes[2].error, OSError), outcomes[2].traceback
    for one in outcomes[:2]:
        assert isinstance(one.error, RankFailedError), one.traceback or one.value
        facts = one.error.metadata
        assert ("2", "write", os.uname().nodename) == (facts["rank"], facts["phase"], facts["host"])
        assert "No space left" in str(one.error)
    if 0 not in cut_off:
        assert [CheckpointState.FAILED] == [one.state for one in p2_no_torn_checkpoint(shared_server.client, run)]


@pytest.mark.parametrize("is_async", [False, True], ids=["save", "async_save"])
@pytest.mark.soak_with("async_save")
@pytest.mark.parametrize("cut_off", [[], [1], [0]], ids=["all have a route", "it has none", "the coordinator has none"])
def test_a_plan_that_one_rank_refuses(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, cut_off: list[int], is_async: bool
) -> None:
    """What fails before a save begins is told too, and the ranks count their attempts alike afterwards."""
    start = {"run": run, "server": shared_server.address}
    refused = pool.start(
        routes.refused_plan, start, str(tmp_path), 1, cut_off, is_async, world_size=2, environment=_PATIENCE
    ).values(2 * _AT_ONCE_S)
    (told, elapsed_s, first), (own, _, second) = refused
    assert own.startswith("UNSUPPORTED_PLANNER")
    assert told.startswith("RANK_FAILED"), told
    assert "rank 1" in told
    assert "UnsupportedPlannerError" in told
    assert elapsed_s < _AT_ONCE_S
    assert [(SaveState.COMMITTED, 2)] * 2 == [(one.state, one.attempt) for one in (first, second)]


def test_the_coordinator_is_cut_off_for_longer_than_its_lease(pool: RankPool, run: str, tmp_path: Path) -> None:
    """EXPIRED is not the end: it comes back, nobody has superseded it, and commits; the others wait for that."""
    path = str(tmp_path / "step-1")
    with ServerProcess(tmp_path / "server", SHARDBOOK_LEASE_TTL_S="2", SHARDBOOK_REAP_INTERVAL_S="0.3") as server:
        start = {"run": run, "server": server.address}
        running = pool.start(jobs.hang_writing, start, path, 0, world_size=2)
        await_stop(running.pids[0])
        await_that("the attempt has expired", lambda: [CheckpointState.EXPIRED] == _states(server, run))
        os.kill(running.pids[0], signal.SIGCONT)
        assert [SaveState.COMMITTED] * 2 == [one.state for one in running.values()]
        assert [CheckpointState.COMMITTED] == [one.state for one in p2_no_torn_checkpoint(server.client, run)]


@pytest.mark.soak
def test_a_coordinator_without_route_is_slow(pool: RankPool, run: str, tmp_path: Path) -> None:
    """The lease ends while it writes; what it leaves on storage at last is what the others return with."""
    path = str(tmp_path / "step-1")
    with ServerProcess(tmp_path / "server", SHARDBOOK_LEASE_TTL_S="3", SHARDBOOK_REAP_INTERVAL_S="0.3") as server:
        start = {"run": run, "server": server.address}
        until = tmp_path / "write"
        running = pool.start(
            routes.slow_coordinator_without_route, start, path, str(until), world_size=2, environment=_PATIENCE
        )
        await_that("the attempt has expired", lambda: [CheckpointState.EXPIRED] == _states(server, run))
        until.touch()
        assert [SaveState.UNREGISTERED] * 2 == [one.state for one in running.values()]
    assert [[]] * 2 == pool.run(jobs.load_once, path, world_size=2)


def _states(server: ServerProcess, run: str) -> list[CheckpointState]:
    try:
        return [one.state for one in server.client.list_checkpoints(run, show_all=True)]
    except NotFoundError:
        return []


@pytest.mark.parametrize("is_cut_off", [False, True], ids=["online", "without route"])
@pytest.mark.soak_with("without route")
def test_storage_that_cannot_be_listed(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, is_cut_off: bool
) -> None:
    """Whatever a filesystem's library raises where a save only looks: the data is there, and the save returns."""
    start = {"run": run, "server": shared_server.address}
    saved = pool.run(
        routes.broken_looks, start, str(tmp_path / "step-1"), 4.0, is_cut_off, world_size=2, environment=_PATIENCE
    )
    expected = SaveState.UNREGISTERED if is_cut_off else SaveState.COMMITTED
    assert [expected] * 2 == [one.state for one in saved]


def test_a_part_without_rank_0_keeps_its_lease(pool: RankPool, run: str, tmp_path: Path) -> None:
    """The coordinator of its saves keeps it, as rank 0 keeps the session's own; both end with the job."""
    with ServerProcess(tmp_path / "server", SHARDBOOK_LEASE_TTL_S="2", SHARDBOOK_REAP_INTERVAL_S="0.3") as server:
        start = {"run": run, "server": server.address}
        seen = pool.run(routes.part_of_some, start, str(tmp_path / "step-1"), [1, 2], 5.0, world_size=3)
        assert [[True, True]] * 3 == seen
        assert [False, False] == [one.writing for one in server.client.get_run(run).parts]
