"""No collective, barrier or store operation after ``init``: the reason why Shardbook exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torch import jobs
from tests.torch.harness import RankPool

#: What ranks say to each other has nothing to do with the kind of database.
pytestmark = pytest.mark.soak_with("postgres")


@pytest.mark.parametrize("how", ["barrier", "objects", "method", "c++", "functional", "dtensor", "store"])
def test_the_detector_notices(pool: RankPool, how: str) -> None:
    """Whatever a rank could say, the detector hears; else the tests below would prove nothing."""
    assert all(pool.run(jobs.speak, how, world_size=2))


def test_the_detector_imagines_nothing(pool: RankPool) -> None:
    """A block that says nothing leaves the list empty."""
    assert [[], []] == pool.run(jobs.speak, "nothing", world_size=2)


@pytest.mark.parametrize("layout", ["fsdp", "tensor_parallel", "sharded_tensor", "objects"])
@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_save_async_save_and_load_say_nothing(
    pool: RankPool, server: str, run: str, tmp_path: Path, layout: str, online: bool
) -> None:
    """A first save, one that the server knows already, an async one, and loads from a ref and a path."""
    start = {"run": run, "server": server} if online else {"run": run, "mode": "offline"}
    paths = [str(tmp_path / f"step-{step}") for step in (1, 2, 3)]
    saved = pool.run(jobs.save, layout, paths, start, {}, world_size=4)
    assert [[]] * 4 == [one.noticed for one in saved]
    refs = [result.ref for result in saved[0].results]
    assert [f"{run}@{step}" for step in (1, 2, 3)] if online else paths == refs
    loaded = pool.run(jobs.load, layout, [*refs, paths[0]], world_size=4, environment={"SHARDBOOK_SERVER": server})
    assert [{target: [] for target in [*refs, paths[0]]}] * 4 == loaded


def test_init_says_two_things(pool: RankPool, server: str, run: str) -> None:
    """``init`` agrees on one number, that no rank has failed, and broadcasts one object: that is all."""
    said = pool.run(jobs.init_only, {"run": run, "server": server}, world_size=3)
    assert [["torch.distributed.broadcast_object_list"]] * 3 == [
        [what for what in one if "broadcast_object_list" in what][:1] for one in said
    ]
    assert all("torch.distributed.all_reduce" in one for one in said)
    assert not [what for one in said for what in one if "barrier" in what or "gather" in what or "store" in what]
