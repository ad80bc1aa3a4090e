"""P9: a save outlives the service. Rows 30 of the matrix, and the circuit breaker's bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from shardbook import CheckpointState
from shardbook.dcp import SaveState
from shardbook.sync import SyncOutcome, sync_directories
from tests.faults import jobs
from tests.faults.server import ServerProcess
from tests.torch import jobs as torch_jobs
from tests.torch.harness import RankPool

#: What an outage costs here, seconds: once, and then a save.
_FIRST_S, _LATER_S = 4.0, 1.0
_PATIENCE = {"SHARDBOOK_OUTAGE_FIRST_S": str(_FIRST_S), "SHARDBOOK_OUTAGE_LATER_S": str(_LATER_S)}
#: What a save costs anyway on a machine that does other things too, seconds.
_SLACK_S = 4.0


@pytest.mark.parametrize("is_async", [False, True], ids=["save", "async_save"])
@pytest.mark.parametrize("phase", list(jobs.PHASES))
def test_the_server_is_killed_in_the_middle_of_a_save(
    pool: RankPool, server: ServerProcess, run: str, tmp_path: Path, phase: str, is_async: bool
) -> None:
    """The save returns in bounded time, the directory is enough, and ``sync`` brings the catalogue level."""
    directory = tmp_path / "ckpt"
    start = {"run": run, "server": server.address}
    saved = pool.run(
        jobs.lose_server, start, str(directory), phase, server.pid, is_async, world_size=3, environment=_PATIENCE
    )
    states = [[one.result.state for one in ranks] for ranks in zip(*saved, strict=True)]
    assert [SaveState.COMMITTED] * 3 == states[0]
    assert [SaveState.UNREGISTERED] * 6 == states[1] + states[2]
    assert max(ranks[1].elapsed_s for ranks in saved) < _FIRST_S + _SLACK_S
    assert max(ranks[2].elapsed_s for ranks in saved) < _LATER_S + _SLACK_S
    paths = [str(directory / f"step-{step}") for step in (2, 3)]
    assert [{path: [] for path in paths}] * 2 == pool.run(torch_jobs.load, "fsdp", paths, world_size=2)
    assert [{path: [] for path in paths}] * 2 == pool.run(torch_jobs.load, "fsdp", paths, True, world_size=2)
    server.kill()
    server.start()
    outcomes = {one.step: one.outcome for one in sync_directories(server.client, [directory])}
    # A commit whose answer was lost has happened or not; everything else is new to the catalogue.
    assert SyncOutcome.PRESENT == outcomes.pop(1)
    assert {SyncOutcome.RECORDED} >= {outcomes.pop(3)}
    assert {SyncOutcome.RECORDED, SyncOutcome.PRESENT} >= set(outcomes.values())
    listed = list(server.client.list_checkpoints(run))
    assert [3, 2, 1] == [one.step for one in listed]
    assert {CheckpointState.COMMITTED} == {one.state for one in listed}
    refs = [f"{run}@{step}" for step in (1, 2, 3)]
    loaded = pool.run(torch_jobs.load, "fsdp", refs, world_size=2, environment={"SHARDBOOK_SERVER": server.address})
    assert [{ref: [] for ref in refs}] * 2 == loaded


def test_the_server_is_away_when_the_job_starts(
    pool: RankPool, server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Training starts all the same; the saves after the server's return also record what it missed."""
    server.kill()
    directory = tmp_path / "ckpt"
    directory.mkdir()
    running = pool.start(
        jobs.server_comes_back,
        {"run": run, "server": server.address},
        str(directory),
        world_size=2,
        environment=_PATIENCE,
    )
    for rank in range(2):
        jobs._await_file(directory / f"away-{rank}")
    server.start()
    (directory / "back").touch()
    results = running.values()
    expected = [SaveState.UNREGISTERED, SaveState.COMMITTED, SaveState.COMMITTED]
    assert [expected] * 2 == [[one.state for one in ranks] for ranks in results]
    assert {1, 2, 3} == {one.step for one in server.client.list_checkpoints(run)}


def test_nothing_is_deduplicated_without_the_service(pool: RankPool, run: str, tmp_path: Path) -> None:
    """Every rank writes its whole plan: duplicates, never holes, and each chunk counts once."""
    path = tmp_path / "step-1"
    saved = pool.run(jobs.save_once, {"run": run, "mode": "offline"}, str(path), {}, world_size=3)
    assert [one.stats.planned_count for one in saved] == [one.stats.written_count for one in saved]
    stored = FileSystemReader(path).read_metadata().storage_data
    assert len(stored) < sum(one.stats.written_count for one in saved)
    assert [[]] * 2 == pool.run(jobs.load_once, str(path), world_size=2)


def test_one_rank_has_no_route(pool: RankPool, server: ServerProcess, run: str, tmp_path: Path) -> None:
    """It does not sink the save: the coordinator finds its record on storage."""
    patience = {**_PATIENCE, "SHARDBOOK_PLAN_WAIT_S": "2"}
    start = {"run": run, "server": server.address}
    path = str(tmp_path / "step-1")
    saved = pool.run(jobs.no_route, start, path, 1, world_size=3, environment=patience)
    assert [SaveState.COMMITTED, SaveState.UNREGISTERED, SaveState.COMMITTED] == [one.result.state for one in saved]
    environment = {"SHARDBOOK_SERVER": server.address}
    assert [[]] * 2 == pool.run(jobs.load_once, f"{run}@1", world_size=2, environment=environment)
    assert [[]] * 2 == pool.run(jobs.load_once, path, world_size=2)


def test_the_coordinator_has_no_route(pool: RankPool, server: ServerProcess, run: str, tmp_path: Path) -> None:
    """Nobody can commit: the others learn so from storage, and do not wait for a commit that will not come."""
    path = str(tmp_path / "step-1")
    start = {"run": run, "server": server.address}
    saved = pool.run(jobs.no_route, start, path, 0, world_size=3, environment=_PATIENCE)
    assert [SaveState.UNREGISTERED] * 3 == [one.result.state for one in saved]
    assert max(one.elapsed_s for one in saved) < 20
    assert [[]] * 2 == pool.run(jobs.load_once, path, world_size=2)
    assert [SyncOutcome.RECORDED] == [one.outcome for one in sync_directories(server.client, [path])]
    environment = {"SHARDBOOK_SERVER": server.address}
    assert [[]] * 2 == pool.run(jobs.load_once, f"{run}@1", world_size=2, environment=environment)
