"""Saved by real ranks under every parallelism, loaded at other world sizes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from shardbook.dcp import SaveState
from tests.torch import jobs
from tests.torch.harness import RankPool
from tests.torch.layouts import wrong_pieces

#: How ranks share a model has nothing to do with the kind of database.
pytestmark = pytest.mark.soak_with("postgres")

#: (layout saved, its world size, [(layout loaded, its world size), ...]); world size 0 is a process without a group.
_CASES = {
    "FSDP2": ("fsdp", 4, [("fsdp", 2), ("fsdp", 3), ("tensor_parallel", 4), ("plain", 0)]),
    "HSDP 2x2": ("hsdp", 4, [("hsdp", 4), ("fsdp", 3), ("tensor_parallel", 2), ("plain", 0)]),
    "TP x FSDP": ("tensor_parallel", 4, [("tensor_parallel", 2), ("fsdp", 3), ("hsdp", 4), ("plain", 2)]),
    "no parallelism": ("plain", 2, [("tensor_parallel", 4), ("hsdp", 4), ("plain", 0)]),
    "one process": ("plain", 0, [("fsdp", 4)]),
    "pipeline of 2 stages": ("pipeline", 4, [("pipeline", 2), ("pipeline_whole", 0)]),
    "uneven and empty shards": ("uneven", 4, [("uneven", 3), ("uneven", 1)]),
    "ShardedTensor": ("sharded_tensor", 4, [("sharded_tensor", 2), ("sharded_tensor_whole", 0)]),
    "objects in lists": ("objects", 3, [("objects", 2), ("objects", 0)]),
}


@pytest.mark.parametrize("case", _CASES)
def test_what_one_world_saves_another_loads(pool: RankPool, server: str, run: str, tmp_path: Path, case: str) -> None:
    """From the ref, from the directory, and by plain DCP."""
    layout, world_size, others = _CASES[case]
    paths = [str(tmp_path / "step-1"), str(tmp_path / "step-2")]
    saved = pool.run(
        jobs.save,
        layout,
        paths,
        {"run": run, "server": server},
        {},
        world_size=max(world_size, 1),
        process_group=world_size > 0,
    )
    assert {SaveState.COMMITTED} == {result.state for one in saved for result in one.results}
    refs = [result.ref for result in saved[0].results]
    for other, size in others:
        loaded = pool.run(
            jobs.load,
            other,
            [*refs, *paths],
            world_size=max(size, 1),
            process_group=size > 0,
            environment={"SHARDBOOK_SERVER": server},
        )
        assert [{target: [] for target in [*refs, *paths]}] * max(size, 1) == loaded
        by_dcp = pool.run(jobs.load, other, paths[:1], True, world_size=max(size, 1), process_group=size > 0)
        assert [{paths[0]: []}] * max(size, 1) == by_dcp


def test_ranks_load_different_keys(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Nobody waits for anybody, so no two ranks need to load the same; one of them loads nothing."""
    path = str(tmp_path / "step-1")
    pool.run(jobs.save, "fsdp", [path], {"run": run, "server": server}, {}, world_size=4)
    keys = [["model"], ["optim", "note"], []]
    for target in (path, f"{run}@1"):
        loaded = pool.run(jobs.load_some, keys, target, world_size=3, environment={"SHARDBOOK_SERVER": server})
        assert [[], [], []] == loaded


def test_a_submesh_saves_alone(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Ranks 1 and 3 of four are a group of their own: they save all of it, and whoever loads finds all of it."""
    path = str(tmp_path / "step-1")
    saved = pool.run(jobs.save_submesh, [1, 3], path, {"run": run, "server": server}, world_size=4)
    assert [None, SaveState.COMMITTED, None, SaveState.COMMITTED] == [one and one.state for one in saved]
    assert 2 == len({(one.prefix, one.stats.written_count) for one in saved if one} | {("", 0)})
    assert [{path: []}] == pool.run(jobs.load, "submesh", [path], world_size=1)


@pytest.mark.parametrize("layout", ["plain", "hsdp", "objects"])
def test_what_is_replicated_is_written_once(pool: RankPool, server: str, run: str, tmp_path: Path, layout: str) -> None:
    """PlanSave drops every copy but one, and every rank gets a share of what is left."""
    path = tmp_path / "step-1"
    saved = pool.run(jobs.save, layout, [str(path)], {"run": run, "server": server}, {}, world_size=4)
    written = [one.results[0].stats.written_count for one in saved]
    stored = FileSystemReader(path).read_metadata().storage_data
    assert len(stored) == sum(written)
    assert all(written)


def test_a_rank_without_anything_to_save(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """It registers, so that nobody waits for it, and writes no file."""
    path = tmp_path / "step-1"
    saved = pool.run(jobs.save_lopsided, str(path), {"run": run, "server": server}, {}, world_size=3)
    assert [SaveState.COMMITTED] * 3 == [one.state for one in saved]
    assert ["__0_0.distcp"] == [file.name for file in (path / saved[0].prefix).iterdir()]


def test_ranks_that_need_not_know_of_the_commit(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """``wait="registered"``: all but the coordinator return as soon as their part is safe."""
    path, options = str(tmp_path / "step-1"), {"wait": "registered"}
    saved = pool.run(jobs.save_lopsided, path, {"run": run, "server": server}, options, world_size=3)
    assert [SaveState.COMMITTED, SaveState.REGISTERED, SaveState.REGISTERED] == [one.state for one in saved]


def test_torch_converts_the_checkpoint(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """``dcp_to_torch_save`` accepts the ``.metadata`` that a save leaves."""
    path = tmp_path / "step-1"
    pool.run(jobs.save, "fsdp", [str(path)], {"run": run, "server": server}, {}, world_size=4)
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert ([], "value of note") == (wrong_pieces(state), state["note"])
