"""The load planner against DCP's own, and the lazy metadata that other planners get."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from shardbook import Client, dcp
from shardbook.core.found import FoundChunks
from shardbook.core.names import CheckpointName
from shardbook.core.wanted import Wanted
from shardbook.dcp.lazy import LazyMetadata
from shardbook.dcp.loading import lazy_directory_metadata
from shardbook.errors import CheckpointMismatchError, UnavailableError
from shardbook.sources import ChunkSource, ManifestSource, ServiceSource
from shardbook.stores import Stores
from tests.torch import jobs
from tests.torch.alone import blank_state, some_state
from tests.torch.equality import differences
from tests.torch.harness import RankPool

#: What a planner asks has nothing to do with the kind of database.
pytestmark = [
    pytest.mark.soak_with("postgres"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning"),
]


@dataclass
class Counting:
    """A source that notes what it is asked."""

    source: ChunkSource
    asked: list[Any] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        """Whatever the source has."""
        if name in ("source", "asked"):  # while a copy is made
            raise AttributeError(name)
        if name in ("fqns", "columns", "key_paths"):
            self.asked.append(name)
        return getattr(self.source, name)

    def query(self, wanted: Wanted) -> FoundChunks:
        """Notes the names."""
        self.asked.append(wanted.fqns)
        return self.source.query(wanted)


@pytest.fixture(params=["service", "manifest"])
def source(request: pytest.FixtureRequest, session: dcp.Session, server: str, tmp_path: Path) -> Counting:
    """``some_state`` as a checkpoint, asked of either."""
    dcp.save(some_state(), checkpoint_id=tmp_path / "1")
    if request.param == "service":
        name = CheckpointName.parse(f"{session.run}@1")
        return Counting(ServiceSource(Client(server), name, Stores(), 30.0))
    found = lazy_directory_metadata(FileSystemReader(tmp_path / "1"), trusted=False)
    assert isinstance(found, LazyMetadata)
    assert isinstance(found.source, ManifestSource)
    return Counting(found.source)


def planned(planner: DefaultLoadPlanner, state: dict[str, Any], metadata: Metadata) -> list[tuple[Any, ...]]:
    """What a planner reads, in no order; hints included where DCP has them."""
    planner.set_up_planner(state, metadata, True)
    return described(planner.create_local_plan())


def described(plan: LoadPlan) -> list[tuple[Any, ...]]:
    """Every attribute of every item."""
    found = []
    for item in plan.items:
        indexes = [
            (vars(one)["fqn"], vars(one).get("offset"), one.index) for one in (item.dest_index, item.storage_index)
        ]
        sizes = [tuple(one) for one in (item.dest_offsets, item.storage_offsets, item.lengths)]
        found.append((item.type.name, *indexes, *sizes))
    assert all(type(item.lengths) is torch.Size for item in plan.items)
    return sorted(found, key=repr)


class TestPlans:
    """The same items as DCP's planner makes."""

    @pytest.mark.parametrize("layout", ["uneven", "objects", "tensor_parallel", "sharded_tensor", "pipeline"])
    def test_items_are_those_of_dcp(self, pool: RankPool, server: str, run: str, tmp_path: Path, layout: str) -> None:
        """Into the same layout at another world size, from the service, the manifest and ``.metadata``."""
        path, ref = str(tmp_path / "1"), f"{run}@1"
        pool.run(jobs.save, layout, [path], {"run": run, "server": server}, {}, world_size=4)
        for same in pool.run(jobs.compare_plans, layout, path, ref, server, world_size=2):
            assert [] == same

    def test_one_question_for_everything(self, source: Counting) -> None:
        """With names, shapes and boxes of all that the state dict holds, and no other."""
        metadata = LazyMetadata(source)
        planner = dcp.ShardbookLoadPlanner()
        planner.set_up_planner(blank_state(), metadata, True)
        plan = planner.create_local_plan()
        assert [("w", "b", "lr")] == source.asked
        assert {item.storage_index for item in plan.items} == set(metadata.storage_data._held())
        assert [("w", "b", "lr")] == source.asked

    def test_in_torchs_own_load(self, session: dcp.Session, tmp_path: Path) -> None:
        """On whatever metadata that read: the same items, and the same complaints."""
        dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        state = blank_state()
        torch_load(state, checkpoint_id=tmp_path / "1", planner=dcp.ShardbookLoadPlanner())
        assert torch.equal(some_state()["w"], state["w"])
        assert 0.5 == state["lr"]
        metadata = FileSystemReader(tmp_path / "1").read_metadata()
        with pytest.raises(CheckpointMismatchError):
            planned(dcp.ShardbookLoadPlanner(), {"w": torch.zeros(1), "x": 1}, metadata)

    def test_a_subclass_that_looks_up_tensors_itself(self, session: dcp.Session, tmp_path: Path) -> None:
        """As subclasses of DCP's planner do."""

        class Doubling(dcp.LoadPlanner):
            def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
                tensor.mul_(2)

        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        state = blank_state()
        dcp.load(state, result.ref, planner=Doubling())
        assert torch.equal(2 * some_state()["w"], state["w"])


class TestOldKeys:
    """torch 2.3 and before kept lists and dicts without tensors in one entry."""

    @staticmethod
    def state() -> dict[str, Any]:
        """A tensor in a dict, a list of dicts and a dict without any."""
        return {"model": {"w": torch.ones(2)}, "groups": [{"lr": 0.5, "steps": [1, 2]}], "n": {"a": 1}}

    @staticmethod
    def blank() -> dict[str, Any]:
        """The same keys, other values."""
        return {"model": {"w": torch.zeros(2)}, "groups": [{"lr": 0.0, "steps": [0, 0]}], "n": {"a": 0}}

    @pytest.mark.parametrize("by_shardbook", [False, True])
    def test_they_are_found(
        self, session: dcp.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_shardbook: bool
    ) -> None:
        """As DefaultLoadPlanner finds them."""
        from torch.distributed.checkpoint import _version

        monkeypatch.setattr(_version, "_derived_version", "2_3")
        path = tmp_path / "1"
        if by_shardbook:
            dcp.save(self.state(), checkpoint_id=path)
        else:
            torch_save(self.state(), checkpoint_id=path)
        monkeypatch.setattr(_version, "_derived_version", None)
        assert "groups" in FileSystemReader(path).read_metadata().state_dict_metadata
        targets: list[Path | str] = [path, f"{session.run}@1"]
        for target in targets[: 1 + by_shardbook]:
            state = self.blank()
            dcp.load(state, target)
            assert [1.0, 1.0] == state["model"]["w"].tolist()
            assert (self.state()["groups"], {"a": 1}) == (state["groups"], state["n"])
            assert _version._derived_version is None

    def test_new_keys_beside_a_list_are_one_question(self, session: dcp.Session, tmp_path: Path) -> None:
        """Nothing is asked twice for checkpoints of today."""
        dcp.save(self.state(), checkpoint_id=tmp_path / "1")
        found = lazy_directory_metadata(FileSystemReader(tmp_path / "1"), trusted=False)
        assert isinstance(found, LazyMetadata)
        counting = Counting(found.source)
        state = self.blank()
        planner = dcp.ShardbookLoadPlanner()
        planner.set_up_planner(state, LazyMetadata(counting), True)
        planner.create_local_plan()
        assert 1 == len(counting.asked)


class TestLazyMetadata:
    """What planners get that know torch's ``Metadata`` alone."""

    def test_it_is_the_same_as_everything(self, source: Counting) -> None:
        """When it is looked at as a whole: one question more, and torch's own types."""
        lazy = LazyMetadata(source)
        expected = LazyMetadata(source.source).everything()
        assert isinstance(lazy, Metadata)
        assert [] == differences(dict(expected.state_dict_metadata), dict(lazy.state_dict_metadata.items()))
        assert [] == differences(dict(expected.storage_data), dict(lazy.storage_data))
        assert ["columns"] == source.asked
        assert (expected.planner_data, expected.version) == (lazy.planner_data, lazy.version)
        assert [] == differences(expected.storage_meta, lazy.storage_meta)

    def test_one_by_one_and_in_bulk(self, source: Counting) -> None:
        """Each entry is asked for once, absent ones too; a prefetch is one question for many."""
        lazy = LazyMetadata(source)
        entries = lazy.state_dict_metadata
        assert "w" in entries
        assert entries["w"] is entries["w"]
        assert isinstance(entries["w"], TensorStorageMetadata)
        assert ("gone" in entries, entries.get("gone"), entries.get("gone", 1)) == (False, None, 1)
        with pytest.raises(KeyError):
            entries["gone"]
        assert [("w",), ("gone",)] == source.asked
        lazy.prefetch(["w", "b", "lr"])
        assert "lr" in entries
        assert [("w",), ("gone",), ("b", "lr")] == source.asked

    def test_what_is_changed_stays_changed(self, source: Counting) -> None:
        """Also when the rest is fetched, and through a pickle or a deep copy."""
        lazy = LazyMetadata(source)
        entries = lazy.state_dict_metadata
        entries["w"].size = torch.Size((9, 9))  # type: ignore[union-attr]
        entries["own"] = entries["b"]
        del entries["lr"]
        lazy.version = "mine"
        again: LazyMetadata = pickle.loads(pickle.dumps(lazy))
        for one in (lazy, again, copy.deepcopy(lazy)):
            found = one.state_dict_metadata
            assert ("mine", "lr" in found, torch.Size((9, 9))) == (one.version, "lr" in found, found["w"].size)  # type: ignore[union-attr]
            assert {"w", "b", "own"} == set(found)
            assert 3 == len(found)
            assert sorted({**found}) == sorted(found.keys()) == ["b", "own", "w"]
        assert {"b", "own"} == set(pickle.loads(pickle.dumps(entries)).keys()) - {"w"}

    def test_a_planner_that_knows_nothing_of_it(self, source: Counting) -> None:
        """DCP's own plans from it, after a prefetch, without a question more but for what is not in the state dict."""
        lazy = LazyMetadata(source)
        lazy.prefetch(blank_state())
        plan = create_default_local_load_plan(blank_state(), lazy)
        assert 3 == len(plan.items)
        assert all(item.storage_index in lazy.storage_data for item in plan.items)
        assert 1 == len(source.asked)

    @pytest.mark.parametrize("by_path", [False, True])
    def test_planners_of_torch_load_with_it(self, session: dcp.Session, tmp_path: Path, by_path: bool) -> None:
        """The default one; one that makes the state dict of the metadata; a prefetch for both."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        target = tmp_path / "1" if by_path else result.ref
        state = blank_state()
        dcp.load(state, target, planner=DefaultLoadPlanner())
        assert torch.equal(some_state()["w"], state["w"])
        empty: dict[str, Any] = {}
        dcp.load(empty, target, planner=_EmptyStateDictLoadPlanner())
        assert {"w", "b", "lr"} == set(empty)
        assert torch.equal(some_state()["w"], empty["w"])

    def test_the_checkpoint_stays_the_same_one(self, session: dcp.Session, server: str, tmp_path: Path) -> None:
        """``latest`` may move on between two questions."""
        dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        source = ServiceSource(Client(server), CheckpointName.parse(f"{session.run}@latest"), Stores(), 30.0)
        assert str(tmp_path / "1") == source.location
        dcp.save({"other": torch.ones(1)}, checkpoint_id=tmp_path / "2")
        assert ["w", "b", "lr"] == list(source.fqns())
        assert source.query(Wanted.all_of(["w"])).found.all()

    def test_no_server(self) -> None:
        """Said with the way around it."""
        source = ServiceSource(Client("127.0.0.1:1", outage_s=0.2), CheckpointName.parse("a/b@1"), Stores(), 30.0)
        with pytest.raises(UnavailableError, match="can be loaded without a server"):
            _ = source.location
