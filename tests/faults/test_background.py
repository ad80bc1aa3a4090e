"""P9 for saves in the background: two in a row, with the server away and with the server killed in between."""

from __future__ import annotations

from pathlib import Path

from shardbook.dcp import SaveState
from tests.faults import hurt
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint, p9_save_outlives_service
from tests.torch.harness import RankPool


def test_two_saves_in_the_background(pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path) -> None:
    """Neither waits for the other, and the later step is ``latest`` whichever ends first."""
    start = {"run": run, "server": shared_server.address}
    paths = [str(tmp_path / f"step-{step}") for step in (1, 2)]
    saved = pool.run(hurt.save_twice_in_background, start, paths, world_size=3)
    assert {SaveState.COMMITTED} == {one.state for ranks in saved for one in ranks}
    assert [2, 1] == [one.step for one in p2_no_torn_checkpoint(shared_server.client, run)]
    assert 2 == shared_server.client.get_checkpoint(f"{run}@latest").step


def test_two_saves_in_the_background_while_the_server_is_away(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Training is not held up for longer than an outage may cost, and both steps come in afterwards."""
    shared_server.kill()
    start = {"run": run, "server": shared_server.address}
    paths = [tmp_path / f"step-{step}" for step in (1, 2)]
    patience = {"SHARDBOOK_OUTAGE_FIRST_S": "2", "SHARDBOOK_OUTAGE_LATER_S": "0.5"}
    saved = pool.run(
        hurt.save_twice_in_background, start, [str(path) for path in paths], world_size=2, environment=patience
    )
    assert {SaveState.UNREGISTERED} == {one.state for ranks in saved for one in ranks}
    shared_server.start()
    synced = p9_save_outlives_service(pool, shared_server.client, run, paths)
    # No server ever gave the session a number.
    assert [(1, 0), (2, 0)] == [(one.step, one.session) for one in synced]
