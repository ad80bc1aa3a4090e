"""Options and subclasses of DCP's writers and planners."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from shardbook import dcp
from shardbook.dcp import SaveState
from shardbook.errors import CheckpointMismatchError
from tests.torch.alone import blank_state, loads, some_state

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


class TestWriters:
    """Options of DCP's writers."""

    @pytest.mark.parametrize(
        "options",
        [{"thread_count": 2}, {"single_file_per_rank": False}, {"_extensions": [ZStandard()]}, {"sync_files": False}],
        ids=["threads", "a file an item", "zstd", "no fsync"],
    )
    def test_file_layouts(self, session: dcp.Session, tmp_path: Path, options: dict[str, Any]) -> None:
        """However the files are cut, refs, paths and plain DCP find every byte."""
        result = dcp.save(some_state(), storage_writer=FileSystemWriter(tmp_path / "step-1", **options))
        plain = blank_state()
        torch_load(plain, checkpoint_id=tmp_path / "step-1")
        assert (True, True, True) == (
            loads(result.ref),
            loads(result.path),
            torch.equal(some_state()["w"], plain["w"]),
        )

    def test_a_writer_is_used_again(self, session: dcp.Session, tmp_path: Path) -> None:
        """With another ``checkpoint_id``, as DCP's are."""
        writer = FileSystemWriter(tmp_path / "unused")
        for step in (1, 2):
            assert loads(dcp.save(some_state(), checkpoint_id=tmp_path / f"step-{step}", storage_writer=writer).ref)

    def test_an_existing_checkpoint_is_not_overwritten_unless_allowed(
        self, offline: dcp.Session, tmp_path: Path
    ) -> None:
        """``overwrite=False`` means what it means in DCP; ``overwrite=True`` needs no warning, nothing is lost."""
        for _ in range(2):
            dcp.save(some_state(), storage_writer=FileSystemWriter(tmp_path / "1"))
        with pytest.raises(RuntimeError, match="already exists"):
            dcp.save(some_state(), storage_writer=FileSystemWriter(tmp_path / "1", overwrite=False))

    def test_a_planner_that_drops_and_adds_items(self, session: dcp.Session, tmp_path: Path) -> None:
        """What is registered is what was given to the writer, not what was planned before."""

        class Renaming(DefaultSavePlanner):
            def finish_plan(self, new_plan: SavePlan) -> SavePlan:
                items = [dataclasses.replace(item) for item in new_plan.items if item.index.fqn != "lr"]
                return super().finish_plan(dataclasses.replace(new_plan, items=items))

        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1", planner=Renaming())
        state = {"w": torch.zeros(3, 4), "b": torch.zeros(())}
        dcp.load(state, result.ref)
        assert torch.equal(some_state()["w"], state["w"])
        with pytest.raises(CheckpointMismatchError, match="'lr' is not in the checkpoint"):
            dcp.load(blank_state(), result.ref)

    def test_no_flattening(self, session: dcp.Session, tmp_path: Path) -> None:
        """A planner without key paths."""
        planner = DefaultSavePlanner(flatten_state_dict=False)
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1", planner=planner)
        assert loads(result.ref, planner=dcp.LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False))

    def test_an_empty_state_dict(self, session: dcp.Session, tmp_path: Path) -> None:
        """It registers and writes no data file."""
        result = dcp.save({}, checkpoint_id=tmp_path / "1")
        assert SaveState.COMMITTED == result.state
        assert not (tmp_path / "1" / result.prefix).exists()
        dcp.load({}, result.ref)
