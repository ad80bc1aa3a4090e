"""P9 with a relay: its death costs a save what an outage of the server costs, and never the save."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardbook.dcp import SaveState
from shardbook.sync import SyncOutcome
from tests.faults import jobs
from tests.faults.server import ServerProcess
from tests.faults.validators import p9_save_outlives_service
from tests.relays import RelayProcess
from tests.torch.harness import RankPool

#: What an outage costs here, seconds: once, and then a save.
_FIRST_S, _LATER_S = 2.0, 0.5
_PATIENCE = {"SHARDBOOK_OUTAGE_FIRST_S": str(_FIRST_S), "SHARDBOOK_OUTAGE_LATER_S": str(_LATER_S)}
#: What a save costs anyway on a machine that does other things too, seconds.
_SLACK_S = 8.0


@pytest.mark.parametrize("phase", ["plan", "register", "commit"])
@pytest.mark.soak_with("plan", "commit")  # as without a relay: test_server_lost.py
def test_the_relay_is_killed_in_the_middle_of_a_save(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, phase: str
) -> None:
    """The save returns in bounded time, the directory is enough, and ``sync`` brings the catalogue level."""
    directory = tmp_path / "ckpt"
    with RelayProcess(shared_server.address) as relay:
        start = {"run": run, "server": relay.address}
        saved = pool.run(
            jobs.lose_server, start, str(directory), phase, relay.pid, False, world_size=3, environment=_PATIENCE
        )
    states = [[one.result.state for one in ranks] for ranks in zip(*saved, strict=True)]
    assert [[SaveState.UNREGISTERED] * 3] * 2 == states[1:]
    assert max(ranks[1].elapsed_s for ranks in saved) < _FIRST_S + _SLACK_S
    assert max(ranks[2].elapsed_s for ranks in saved) < _LATER_S + _SLACK_S
    _, _, third = p9_save_outlives_service(
        pool, shared_server.client, run, [directory / f"step-{step}" for step in (1, 2, 3)]
    )
    assert SyncOutcome.RECORDED == third.outcome
    assert [3, 2, 1] == [one.step for one in shared_server.client.list_checkpoints(run)]


def test_the_server_is_killed_behind_a_relay(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Ranks learn of it through the relay as fast as without one, and save again once the server is back."""
    directory = tmp_path / "ckpt"
    with RelayProcess(shared_server.address) as relay:
        start = {"run": run, "server": relay.address}
        saved = pool.run(
            jobs.lose_server,
            start,
            str(directory),
            "register",
            shared_server.pid,
            False,
            world_size=3,
            environment=_PATIENCE,
        )
        states = [[one.result.state for one in ranks] for ranks in zip(*saved, strict=True)]
        assert [[SaveState.UNREGISTERED] * 3] * 2 == states[1:]
        assert max(ranks[1].elapsed_s for ranks in saved) < _FIRST_S + _SLACK_S
        assert max(ranks[2].elapsed_s for ranks in saved) < _LATER_S + _SLACK_S
        shared_server.restart()
        # The job of before has not ended its lease.
        start |= {"on_live": "takeover"}
        again = pool.run(jobs.save_once, start, str(directory / "step-4"), {}, world_size=3)
        assert [SaveState.COMMITTED] * 3 == [one.state for one in again]
