"""P9: a server that is killed and comes back within what an outage may cost: the save is committed all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardbook.dcp import SaveState
from tests.faults import jobs, routes
from tests.faults.processes import await_that
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch.harness import RankPool

#: More than a restart takes on a machine that is busy with other things.
_SHARE_S = 30.0
_PATIENCE = {"SHARDBOOK_OUTAGE_FIRST_S": str(_SHARE_S)}


@pytest.mark.parametrize("phase", ["plan", "register", "commit"])
def test_the_server_restarts_within_a_save(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, phase: str
) -> None:
    """No rank gives up, and nothing is left for ``sync``."""
    start = {"run": run, "server": shared_server.address}
    running = pool.start(
        jobs.lose_server, start, str(tmp_path), phase, shared_server.pid, False, world_size=2, environment=_PATIENCE
    )
    await_that("the server is killed", lambda: shared_server.has_ended)
    shared_server.restart()
    saves = running.values()
    assert [[SaveState.COMMITTED] * 3] * 2 == [[one.result.state for one in rank] for rank in saves]
    assert max(rank[1].elapsed_s for rank in saves) < _SHARE_S
    assert [3, 2, 1] == [one.step for one in p2_no_torn_checkpoint(shared_server.client, run)]


@pytest.mark.soak
def test_waiting_for_a_slow_rank_costs_nothing_of_the_share(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """One rank waits for the other's plan for longer than the share; then the server restarts, and both get over it."""
    share_s, late_s = 25.0, 27.0
    start = {"run": run, "server": shared_server.address}
    at = tmp_path / "planned"
    running = pool.start(
        routes.wait_then_save,
        start,
        str(tmp_path / "step-1"),
        late_s,
        str(at),
        world_size=2,
        environment={"SHARDBOOK_OUTAGE_FIRST_S": str(share_s)},
    )
    await_that("the late rank is about to plan", at.exists)
    shared_server.kill()
    Path(f"{at}-down").touch()
    shared_server.start()
    saved = running.values()
    assert [SaveState.COMMITTED] * 2 == [result.state for result, _ in saved]
    lost_s = [spent_s for _, spent_s in saved]
    assert all(0 < one_s < share_s for one_s in lost_s), lost_s
