"""P3: a rank of an older session that goes on after a later one has saved the same step. Rows 8 and 9 of the matrix."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shardbook.dcp import SaveState
from shardbook.errors import SessionFencedError
from tests.faults import hurt, jobs
from tests.faults.processes import await_stop
from tests.faults.server import ServerProcess
from tests.faults.validators import files_of, p3_fenced, p3_later_save_stands
from tests.torch.harness import RankPool


@pytest.mark.parametrize("world_size", [2, 3], ids=["same world", "another world size"])
def test_a_step_is_saved_again_while_a_rank_is_in_mid_write(
    pool: RankPool, later_pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, world_size: int
) -> None:
    """The straggler is fenced; it opened no file of another attempt, and what it wrote is whole and its own."""
    path = tmp_path / "step-7"
    client = shared_server.client
    start = {"run": run, "server": shared_server.address}
    running = pool.start(hurt.straggle, start, str(path), 1, world_size=2)
    await_stop(running.pids[1])
    torn = next(path.glob("*/__1_0.distcp"))
    prefix, torn_bytes = torn.parent.name, torn.stat().st_size
    later = later_pool.run(jobs.save_other_values, {**start, "on_live": "takeover"}, str(path), world_size=world_size)
    assert [SaveState.COMMITTED] * world_size == [one.state for one in later]
    before, row = files_of(path), client.get_checkpoint(later[0].name)
    os.kill(running.pids[1], signal.SIGCONT)
    stragglers = running.values()
    assert [SessionFencedError] * 2 == [type(one.error) for one in stragglers]
    assert torn.stat().st_size > torn_bytes, "it was not stopped in mid-write"

    opened = [name for one in stragglers for name in one.opened]
    p3_fenced(path, before, opened, prefix, (row, client.get_checkpoint(later[0].name)))
    p3_later_save_stands(later_pool, shared_server.address, path, row, prefix, tmp_path / "alone")
