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
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from shardbook import dcp
from shardbook.dcp.runtime import current
from tests.faults.process_jobs import SlowWriter

rank, path, store, run, server, executor = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store), rank=rank, world_size=2, timeout=timedelta(seconds=60))

dcp.init(run=run, **({"server": server} if server else {"mode": "offline"}))
state = {"w": torch.arange(64.0), f"own{rank}": torch.ones(3)}
options = {"step": 1, "async_checkpointer_type": dcp.AsyncCheckpointerType[executor]}
if rank == 0:
    dcp.async_save(state, storage_writer=SlowWriter(path), **options)
else:
    dcp.async_save(state, checkpoint_id=path, **options)
if executor == "PROCESS":
    from shardbook.dcp.save_process_handle import save_process_of
    print(save_process_of(current()).pid)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("executor", ["THREAD", "PROCESS"])
@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
@pytest.mark.soak_with("offline", "PROCESS")  # of one process: test_a_script_without_a_guard
def test_exit_with_a_save_in_flight(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, online: bool, executor: str
) -> None:
    """Exit code 0 on every rank, no error in what they print, and the save is what it would have been.

    No process is left behind.
    """
    path = tmp_path / "checkpoint"
    server = shared_server.address if online else ""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", _SCRIPT]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(path), str(tmp_path / "store"), run, server, executor],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed, told = zip(*(one.communicate(timeout=240) for one in ranks), strict=True)
    assert [0, 0] == [one.returncode for one in ranks], told
    assert not [line for text in told for line in text.splitlines() if "Error" in line or "Traceback" in line], told
    pids = "".join(printed).split()
    assert (0 if executor == "THREAD" else 2) == len(pids)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    loaded = pool.run(jobs.load_tensors, str(path), {"w": [64], "own0": [3], "own1": [3]}, world_size=1)
    assert [{"w": 2016.0, "own0": 3.0, "own1": 3.0}] == loaded
    if online:
        (one,) = shared_server.client.list_checkpoints(run)
        assert SaveState.COMMITTED == one.state.value
        assert [False] == [part.writing for part in shared_server.client.get_run(run).parts]
    else:
        assert [SyncOutcome.RECORDED] == [one.outcome for one in sync_directories(shared_server.client, [path])]
