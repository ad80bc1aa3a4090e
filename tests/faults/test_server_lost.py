"""P9: a save outlives the service. Rows 30 of the matrix, and the circuit breaker's bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from shardbook.dcp import SaveState
from shardbook.sync import SyncOutcome, sync_directories
from tests.faults import jobs
from tests.faults.server import ServerProcess
from tests.faults.validators import p9_save_outlives_service
from tests.torch.harness import RankPool

#: What an outage costs here, seconds: once, and then a save.
_FIRST_S, _LATER_S = 2.0, 0.5
_PATIENCE = {"SHARDBOOK_OUTAGE_FIRST_S": str(_FIRST_S), "SHARDBOOK_OUTAGE_LATER_S": str(_LATER_S)}
#: What a save costs anyway on a machine that does other things too, seconds.
_SLACK_S = 8.0


@pytest.mark.parametrize(
    ("phase", "is_async"),
    [("plan", False), ("register", True), ("commit", False)],
    ids=["plan", "register, async_save", "commit"],
)
def test_the_server_is_killed_in_the_middle_of_a_save(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, phase: str, is_async: bool
) -> None:
    """The save returns in bounded time, the directory is enough, and ``sync`` brings the catalogue level."""
    directory = tmp_path / "ckpt"
    start = {"run": run, "server": shared_server.address}
    saved = pool.run(
        jobs.lose_server, start, str(directory), phase, shared_server.pid, is_async, world_size=3, environment=_PATIENCE
    )
    states = [[one.result.state for one in ranks] for ranks in zip(*saved, strict=True)]
    # The first step only makes the fault strike a session that works; on a busy machine it may itself be too slow.
    assert [[SaveState.UNREGISTERED] * 3] * 2 == states[1:]
    assert max(ranks[1].elapsed_s for ranks in saved) < _FIRST_S + _SLACK_S
    assert max(ranks[2].elapsed_s for ranks in saved) < _LATER_S + _SLACK_S
    shared_server.restart()
    _, second, third = p9_save_outlives_service(
        pool, shared_server.client, run, [directory / f"step-{step}" for step in (1, 2, 3)]
    )
    # A commit whose answer was lost has happened or not; what comes later is new to the catalogue.
    assert SyncOutcome.RECORDED == third.outcome
    assert phase == "commit" or SyncOutcome.RECORDED == second.outcome
    assert [3, 2, 1] == [one.step for one in shared_server.client.list_checkpoints(run)]


def test_the_server_is_away_when_the_job_starts(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Training starts all the same; the saves after the server's return also record what it missed."""
    shared_server.kill()
    directory = tmp_path / "ckpt"
    directory.mkdir()
    running = pool.start(
        jobs.server_comes_back,
        {"run": run, "server": shared_server.address},
        str(directory),
        world_size=2,
        environment={"SHARDBOOK_OUTAGE_FIRST_S": "3", "SHARDBOOK_OUTAGE_LATER_S": "3"},
    )
    for rank in range(2):
        jobs._await_file(directory / f"away-{rank}")
    shared_server.start()
    (directory / "back").touch()
    results = running.values()
    expected = [SaveState.UNREGISTERED, SaveState.COMMITTED, SaveState.COMMITTED]
    assert [expected] * 2 == [[one.state for one in ranks] for ranks in results]
    assert {1, 2, 3} == {one.step for one in shared_server.client.list_checkpoints(run)}


def test_nothing_is_deduplicated_without_the_service(pool: RankPool, run: str, tmp_path: Path) -> None:
    """Every rank writes its whole plan: duplicates, never holes, and each chunk counts once."""
    path = tmp_path / "step-1"
    saved = pool.run(jobs.save_once, {"run": run, "mode": "offline"}, str(path), {}, world_size=3)
    assert [one.stats.planned_count for one in saved] == [one.stats.written_count for one in saved]
    stored = FileSystemReader(path).read_metadata().storage_data
    assert len(stored) < sum(one.stats.written_count for one in saved)
    assert [[]] * 2 == pool.run(jobs.load_once, str(path), world_size=2)


def test_the_coordinator_has_no_route(pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path) -> None:
    """Nobody can commit: the others learn so from storage, and do not wait for a commit that will not come."""
    path = str(tmp_path / "step-1")
    start = {"run": run, "server": shared_server.address}
    saved = pool.run(jobs.no_route_from_coordinator, start, path, world_size=3, environment=_PATIENCE)
    assert [SaveState.UNREGISTERED] * 3 == [one.result.state for one in saved]
    assert max(one.elapsed_s for one in saved) < 20
    assert [[]] * 2 == pool.run(jobs.load_once, path, world_size=2)
    assert [SyncOutcome.RECORDED] == [one.outcome for one in sync_directories(shared_server.client, [path])]
    environment = {"SHARDBOOK_SERVER": shared_server.address}
    assert [[]] * 2 == pool.run(jobs.load_once, f"{run}@1", world_size=2, environment=environment)
