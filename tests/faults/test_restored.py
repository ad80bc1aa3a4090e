"""Row 32 from a running trainer: the database is put back from a backup under a job that goes on saving."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardbook.dcp import SaveState
from shardbook.errors import NotFoundError, RunBusyError
from shardbook.sync import SyncOutcome, sync_directories
from shardbook_server.storage.backup import SESSION_GAP, backup, mark_restored
from tests.faults import routes
from tests.faults.processes import await_that
from tests.faults.server import ServerProcess
from tests.faults.test_late_start import _await
from tests.faults.test_second_job import _keep_alive, _start
from tests.torch.harness import RankPool


@pytest.mark.parametrize("forgets_session", [True, False], ids=["session lost", "session kept"])
def test_a_running_job_goes_on_after_a_restore(pool: RankPool, run: str, tmp_path: Path, forgets_session: bool) -> None:
    """It has the run again before it saves, its next save is committed, and sync brings back what was lost."""
    folder = tmp_path / "server"
    database, copy = folder / "shardbook.sqlite", tmp_path / "backup.sqlite"
    with ServerProcess(folder, SHARDBOOK_LEASE_TTL_S="4") as server:
        _keep_alive(server, _start(server, run), release=True)  # an earlier job
        if forgets_session:
            backup(f"sqlite:///{database}", copy)
        start = {"run": run, "server": server.address}
        # What an outage may cost is not what this is about: on a loaded machine a start of the server takes long.
        patience = {"SHARDBOOK_OUTAGE_FIRST_S": "60", "SHARDBOOK_OUTAGE_LATER_S": "60"}
        running = pool.start(
            routes.save_when_told, start, str(tmp_path), "job", [1, 2, 3, 4], world_size=2, environment=patience
        )
        _await(tmp_path, "job-ready")
        if not forgets_session:
            backup(f"sqlite:///{database}", copy)
        for step in (1, 2):
            (tmp_path / f"go-{step}").touch()
            _await(tmp_path, f"job-done-{step}")
        server.kill()
        for name in folder.glob("shardbook.sqlite*"):
            name.unlink()
        copy.rename(database)
        mark_restored(f"sqlite:///{database}")
        server.start()
        await_that("the job has its run", lambda: _is_written(server, run))
        with pytest.raises(RunBusyError):
            _start(server, run, job_id="another")
        for step in (3, 4):
            (tmp_path / f"go-{step}").touch()
            _await(tmp_path, f"job-done-{step}")
        assert [[SaveState.COMMITTED] * 4] * 2 == running.values()
        assert [4, 3] == [one.step for one in server.client.list_checkpoints(run)]
        synced = list(sync_directories(server.client, [tmp_path / "job"]))
        assert {1: SyncOutcome.RECORDED, 2: SyncOutcome.RECORDED, 3: SyncOutcome.PRESENT, 4: SyncOutcome.PRESENT} == {
            one.step: one.outcome for one in synced
        }
        assert {SyncOutcome.PRESENT} == {one.outcome for one in sync_directories(server.client, [tmp_path / "job"])}
        assert {4: True, 3: True, 2: True, 1: True} == {
            one.step: one.live for one in server.client.list_checkpoints(run)
        }
        latest = server.client.get_checkpoint(f"{run}@latest")
        assert 4 == latest.step
        assert (latest.session > SESSION_GAP) or not forgets_session


def _is_written(server: ServerProcess, run: str) -> bool:
    try:
        return any(part.writing for part in server.client.get_run(run).parts)
    except NotFoundError:
        return False
