"""P3: an incarnation that is replaced before it has a session; it reaches the service only afterwards."""

from __future__ import annotations

from pathlib import Path

from shardbook.dcp import SaveState
from tests.faults import routes
from tests.faults.processes import await_that
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch.harness import RankPool


def test_a_late_start_does_not_fence_the_restarted_job(
    pool: RankPool, later_pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """The old job met an outage and asks for its session with a save; the new one has the same id and the run."""
    shared_server.kill()
    start = {"run": run, "server": shared_server.address, "job_id": "slurm-7"}
    patience = {"SHARDBOOK_OUTAGE_FIRST_S": "3"}
    old = pool.start(routes.save_when_told, start, str(tmp_path), "old", [2], world_size=2, environment=patience)
    _await(tmp_path, "old-ready")
    shared_server.start()
    new = later_pool.start(routes.save_when_told, start, str(tmp_path), "new", [1, 3], world_size=2)
    _await(tmp_path, "new-ready")
    (tmp_path / "go-1").touch()
    _await(tmp_path, "new-done-1")
    (tmp_path / "go-2").touch()
    assert [["SESSION_FENCED"]] * 2 == old.values()
    (tmp_path / "go-3").touch()
    assert [[SaveState.COMMITTED] * 2] * 2 == new.values()
    assert [3, 1] == [one.step for one in p2_no_torn_checkpoint(shared_server.client, run)]
    # The data of the old one is kept.
    assert 2 == len(list((tmp_path / "old" / "step-2").glob("*/*.distcp")))


def _await(folder: Path, name: str) -> None:
    await_that(name, lambda: all((folder / f"{name}-{rank}").exists() for rank in range(2)))
