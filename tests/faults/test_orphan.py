"""P3 with the process executor: save processes whose trainer was killed. Rows 8 and 9 of the matrix."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from shardbook import CheckpointState
from shardbook.dcp import SaveState
from tests.faults import jobs, process_jobs
from tests.faults.processes import await_stop, await_that
from tests.faults.server import ServerProcess
from tests.faults.validators import files_of, p2_no_torn_checkpoint, p3_fenced, p3_later_save_stands
from tests.torch import jobs as torch_jobs
from tests.torch.harness import RankPool

#: What an orphan does has nothing to do with the kind of database.
pytestmark = pytest.mark.soak_with("postgres", "another world size")


def _orphans(
    pool: RankPool, start: dict[str, str], path: Path, notes: Path, stopped_rank: int | None
) -> tuple[list[int], list[int]]:
    """Kills the trainers of two ranks once their save processes have the save.

    Returns:
        The ids of the save processes, and those of forked children of the trainers that live on.
    """
    notes.mkdir()
    running = pool.start(process_jobs.leave_an_orphan, start, str(path), str(notes), stopped_rank, world_size=2)
    told = [notes / f"pids-{rank}" for rank in range(2)]
    await_that("the save processes have the save", lambda: all(one.exists() for one in told))
    orphans, workers = zip(*(map(int, one.read_text().split()) for one in told), strict=True)
    if stopped_rank is not None:
        await_stop(orphans[stopped_rank])
    for pid in running.pids:
        os.kill(pid, signal.SIGKILL)
    running.outcomes(timeout_s=0.1)  # nobody says that it is gone: its forked child holds that pipe too
    return list(orphans), list(workers)


def _await_end(orphans: list[int], workers: list[int]) -> None:
    """Waits for the orphans, which end although others hold what they had in common with their trainers."""
    await_that("the orphans have ended", lambda: not any(map(_lives, orphans)))
    assert all(map(_lives, workers))
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("world_size", [2, 3], ids=["same world", "another world size"])
def test_a_step_is_saved_again_while_an_orphan_is_in_mid_write(
    pool: RankPool, later_pool: RankPool, either_server: ServerProcess, run: str, tmp_path: Path, world_size: int
) -> None:
    """The orphan ends its write in its own files, is fenced and goes; both attempts' bytes are whole."""
    path, notes = tmp_path / "step-7", tmp_path / "notes"
    client = either_server.client
    start = {"run": run, "server": either_server.address}
    orphans, workers = _orphans(pool, start, path, notes, 1)
    torn = next(path.glob("*/__1_0.distcp"))
    prefix, torn_bytes = torn.parent.name, torn.stat().st_size
    again = {**start, "on_live": "takeover"}
    later = later_pool.run(process_jobs.save_other_values, again, str(path), world_size=world_size)
    assert [SaveState.COMMITTED] * world_size == [one.state for one in later]
    before, row = files_of(path), client.get_checkpoint(later[0].name)
    os.kill(orphans[1], signal.SIGCONT)
    _await_end(orphans, workers)
    assert torn.stat().st_size > torn_bytes, "it was not stopped in mid-write"

    opened = [name for rank in range(2) for name in json.loads((notes / f"opened-{rank}.json").read_text())]
    p3_fenced(path, before, opened, prefix, (row, client.get_checkpoint(later[0].name)))
    p3_later_save_stands(later_pool, either_server.address, path, row, prefix, tmp_path / "alone")


def test_orphans_finish_the_save_of_a_killed_job(
    pool: RankPool, later_pool: RankPool, either_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """They commit it and go. The restarted job saves the step again: that one is live, and both load."""
    path = tmp_path / "step-7"
    client = either_server.client
    start = {"run": run, "server": either_server.address, "job_id": "the job"}
    _await_end(*_orphans(pool, start, path, tmp_path / "notes", None))
    (orphaned,) = p2_no_torn_checkpoint(client, run)
    assert (CheckpointState.COMMITTED, True, 1) == (orphaned.state, orphaned.live, orphaned.session)

    later = later_pool.run(process_jobs.save_other_values, start, str(path), world_size=2)
    assert [SaveState.COMMITTED] * 2 == [one.state for one in later]
    states = {one.session: (one.state, one.live) for one in p2_no_torn_checkpoint(client, run)}
    assert {1: (CheckpointState.COMMITTED, False), 2: (CheckpointState.COMMITTED, True)} == states
    environment = {"SHARDBOOK_SERVER": either_server.address}
    old, new = f"{run}@7.s1", f"{run}@7"
    assert [{old: []}] * 2 == later_pool.run(torch_jobs.load, "fsdp", [old], world_size=2, environment=environment)
    assert [True] * 2 == later_pool.run(jobs.load_other_values, new, world_size=2, environment=environment)


def test_a_save_process_is_killed_in_mid_write(
    pool: RankPool, either_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Its trainer says so to all at once, with the exit code; the next save has a new process."""
    start = {"run": run, "server": either_server.address}
    one, other = pool.run(process_jobs.lose_save_process, start, str(tmp_path), 1, world_size=2)
    assert ("SAVE_PROCESS_DIED", "-9") == other[0][:2]
    assert ("RANK_FAILED", None) == one[0][:2]
    assert one[0][2] < 60, "it waited for a process that was gone"
    assert [SaveState.COMMITTED] * 2 == [ends[1].state for ends in (one, other)]
    states = {found.step: found.state for found in p2_no_torn_checkpoint(either_server.client, run)}
    assert {1: CheckpointState.FAILED, 2: CheckpointState.COMMITTED} == states


@pytest.mark.soak
def test_a_save_process_is_killed_when_the_others_need_it_no_more(
    pool: RankPool, either_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Its share is registered: its trainer does not know the outcome, and the step is committed."""
    start = {"run": run, "server": either_server.address}
    ended = pool.run(process_jobs.lose_registered_save_process, start, str(tmp_path), world_size=2)
    assert ["COMMITTED", "SAVE_PROCESS_DIED"] == ended
    (found,) = p2_no_torn_checkpoint(either_server.client, run)
    assert CheckpointState.COMMITTED is found.state


@pytest.mark.soak
def test_an_idle_save_process_is_killed(pool: RankPool, either_server: ServerProcess, run: str, tmp_path: Path) -> None:
    """Nobody notices."""
    start = {"run": run, "server": either_server.address}
    ended = pool.run(process_jobs.lose_idle_save_process, start, str(tmp_path), world_size=2)
    assert [["COMMITTED"] * 2] * 2 == ended
