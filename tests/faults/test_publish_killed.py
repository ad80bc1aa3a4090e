"""Row 11, P9: the coordinator is killed between two of the files by which it describes the directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardbook.core import directory as names
from shardbook.sync import SyncOutcome, sync_directories
from tests.faults import jobs
from tests.faults.server import ServerProcess
from tests.torch import jobs as torch_jobs
from tests.torch.harness import RankPool

#: What is described, in order.
FILES = ("own manifest", "top manifest", "mark", ".metadata")


@pytest.mark.parametrize("is_online", [True, False], ids=["online", "offline"])
@pytest.mark.parametrize("count", range(len(FILES) + 1), ids=["before", *(f"after {name}" for name in FILES)])
def test_the_next_one_finishes(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, count: int, is_online: bool
) -> None:
    """An older attempt of another session lies there; a load finds the new one, a sync makes the directory mean it."""
    path = tmp_path / "step-1"
    start = (
        {"run": run, "server": shared_server.address, "job_id": run} if is_online else {"run": run, "mode": "offline"}
    )
    pool.run(jobs.save_other_values, start, str(path), world_size=2)
    before = (path / names.DCP_METADATA).read_bytes()
    outcomes = pool.start(jobs.die_publishing, start, str(path), count, world_size=2).outcomes()
    assert [EOFError] * 2 == [type(one.error) for one in outcomes]
    assert (count == len(FILES)) == (before != (path / names.DCP_METADATA).read_bytes())

    if is_online:
        found = list(sync_directories(shared_server.client, [path]))
        assert {SyncOutcome.PRESENT} == {one.outcome for one in found}
    for plain_dcp in (False, True):
        loaded = pool.run(torch_jobs.load, "fsdp", [str(path)], plain_dcp, world_size=2)
        assert [{str(path): []}] * 2 == loaded
