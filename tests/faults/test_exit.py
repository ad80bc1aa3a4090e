"""A job whose last act is a save in the background: the interpreters' exit waits for it, on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardbook.dcp import SaveState
from shardbook.sync import SyncOutcome, sync_directories
from tests.faults import jobs
from tests.faults.server import ServerProcess
from tests.torch.harness import RankPool

_SCRIPT = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from shardbook import dcp

rank, path, store, run, server = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store), rank=rank, world_size=2, timeout=timedelta(seconds=60))

class Slow(FileSystemWriter):
    def write_data(self, plan, planner):
        done.append(rank)
        time.sleep(1.0)
        return super().write_data(plan, planner)

done = []
dcp.init(run=run, **({"server": server} if server else {"mode": "offline"}))
state = {"w": torch.arange(64.0), f"own{rank}": torch.ones(3)}
if rank == 0:
    dcp.async_save(state, storage_writer=Slow(path), step=1)
else:
    dcp.async_save(state, checkpoint_id=path, step=1)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_exit_with_a_save_in_flight(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, online: bool
) -> None:
    """Exit code 0 on every rank, no error in what they print, and the save is what it would have been."""
    path = tmp_path / "checkpoint"
    server = shared_server.address if online else ""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", _SCRIPT]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(path), str(tmp_path / "store"), run, server],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [one.communicate(timeout=240)[1] for one in ranks]
    assert [0, 0] == [one.returncode for one in ranks], told
    assert not [line for text in told for line in text.splitlines() if "Error" in line or "Traceback" in line], told
    loaded = pool.run(jobs.load_tensors, str(path), {"w": [64], "own0": [3], "own1": [3]}, world_size=1)
    assert [{"w": 2016.0, "own0": 3.0, "own1": 3.0}] == loaded
    if online:
        (one,) = shared_server.client.list_checkpoints(run)
        assert SaveState.COMMITTED == one.state.value
        assert [False] == [part.writing for part in shared_server.client.get_run(run).parts]
    else:
        assert [SyncOutcome.RECORDED] == [one.outcome for one in sync_directories(shared_server.client, [path])]
