"""Row 34: a rank that cannot write. The kernel refuses the bytes; nothing of the writer is replaced."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from shardbook import CheckpointState
from shardbook.dcp import SaveResult, SaveState
from shardbook.errors import RankFailedError
from tests.faults import hurt
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch import jobs as torch_jobs
from tests.torch.harness import RankPool


def test_a_rank_that_cannot_write_fails_the_save_at_once(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Every other rank learns rank, host and phase; the same job saves the step again when there is room."""
    path = tmp_path / "step-1"
    start = {"run": run, "server": shared_server.address}
    outcomes = pool.run(hurt.exceed_limit, start, str(path), 1, world_size=3)
    for rank in (0, 2):
        failure = outcomes[rank][0]
        assert isinstance(failure, RankFailedError), failure
        facts = {"rank": "1", "host": socket.gethostname(), "phase": "write"}
        assert facts == {name: failure.metadata[name] for name in facts}
        assert "File too large" in str(failure)
    own = outcomes[1][0]
    assert isinstance(own, OSError)
    assert errno.EFBIG == own.errno
    again = [outcome[1] for outcome in outcomes]
    assert all(isinstance(one, SaveResult) for one in again)
    assert {(SaveState.COMMITTED, 2)} == {(one.state, one.attempt) for one in again}
    attempts = p2_no_torn_checkpoint(shared_server.client, run)
    assert [(2, CheckpointState.COMMITTED), (1, CheckpointState.FAILED)] == [(a.attempt, a.state) for a in attempts]
    environment = {"SHARDBOOK_SERVER": shared_server.address}
    targets = [f"{run}@1", str(path)]
    loaded = pool.run(torch_jobs.load, "fsdp", targets, world_size=2, environment=environment)
    assert [{target: [] for target in targets}] * 2 == loaded
