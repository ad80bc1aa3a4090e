"""torch's own ``save``, ``async_save`` and ``load``, with ``ShardbookWriter`` and ``ShardbookReader``."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import async_save as torch_async_save
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from shardbook import Client, dcp, verify
from shardbook.config import ClientConfig
from shardbook.core import directory as names
from shardbook.core.names import CheckpointName
from shardbook.dcp import SaveState
from shardbook.dcp.loading import columns_of
from shardbook.dcp.planner import UnsafeEntryWarning
from shardbook.errors import (
    NotFoundError,
    ShardbookError,
    UnregisteredError,
    UnsupportedWriterError,
)
from shardbook.sync import SyncOutcome, sync_directory
from shardbook_server.app import running_server
from shardbook_server.settings import Settings
from tests.conftest import MakeDatabases
from tests.torch import entry_jobs, jobs
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.equality import differences, without_identity
from tests.torch.harness import RankPool, files_below

#: What torch's own functions do has nothing to do with the kind of database.
pytestmark = [
    pytest.mark.soak_with("postgres"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

_LAYOUTS = ["fsdp", "tensor_parallel", "uneven", "sharded_tensor", "objects"]


def _saved(path: Path, planner: DefaultSavePlanner | None = None, **options: Any) -> dcp.SaveResult:
    writer = dcp.ShardbookWriter(path, **options)
    torch_save(some_state(), storage_writer=writer, planner=planner)
    assert writer.result is not None
    return writer.result


def _loads_by_torch(target: str | Path) -> bool:
    state = blank_state()
    torch_load(state, storage_reader=dcp.ShardbookReader(target))
    return torch.equal(some_state()["w"], state["w"]) and state["lr"] == some_state()["lr"]


def test_saved_by_four_ranks_and_loaded_by_two(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Bit for bit, by ref and by path, through every door; both metadata say the same, and every byte is there."""
    start = {"run": run, "server": server}
    saved = pool.run(entry_jobs.save_layouts, _LAYOUTS, str(tmp_path), start, world_size=4)
    first, *others = saved
    assert [SaveState.COMMITTED] * 6 == [result.state for result in first]
    assert [[None] * 5 + [SaveState.COMMITTED]] * 3 == [[one and one.state for one in results] for results in others]
    assert [1, 1, 1, 1, 1, 2] == [result.attempt for result in first]

    targets = {layout: [f"{run}@{step}", str(tmp_path / layout)] for step, layout in enumerate(_LAYOUTS, 1)}
    environment = {"SHARDBOOK_SERVER": server}
    loaded = pool.run(entry_jobs.load_layouts, targets, world_size=2, environment=environment)
    assert [{}] * 2 == loaded
    assert [[]] * 2 == pool.run(entry_jobs.load_renamed, targets["uneven"], world_size=2, environment=environment)
    for layout in _LAYOUTS[1:]:  # the first one was saved over by Shardbook's save, which has tests of its own
        for plain_dcp, doors in ((False, targets[layout]), (True, targets[layout][1:])):
            wrong = pool.run(jobs.load, layout, doors, plain_dcp, world_size=2, environment=environment)
            assert [{door: [] for door in doors}] * 2 == wrong
    for step, layout in enumerate(_LAYOUTS, 1):
        service = columns_of(CheckpointName.parse(f"{run}@{step}"), ClientConfig(server=server)).to_torch()
        plain = FileSystemReader(tmp_path / layout).read_metadata()
        assert [] == differences(without_identity(plain), without_identity(service))
        assert verify(tmp_path / layout).is_ok


@pytest.mark.parametrize("by", ["thread", "process"])
def test_in_the_background(pool: RankPool, server: str, run: str, tmp_path: Path, by: str) -> None:
    """What there was when ``async_save`` returned. A process that torch spawns saves in the trainer's session, in
    directories that neither of both uses again.
    """
    start = {"run": run, "server": server}
    environment = {"MASTER_ADDR": "127.0.0.1"}
    saved = pool.run(entry_jobs.save_in_background, str(tmp_path), by, start, world_size=2, environment=environment)
    assert [SaveState.COMMITTED, None] == [one.last and one.last.state for one in saved]
    attempts = Client(server).get_checkpoint(f"{run}@1"), Client(server).get_checkpoint(f"{run}@2")
    assert [1, 1] == [one.session for one in attempts]
    assert ([1, 2], None) == ([one.attempt for one in attempts], saved[1].result) if by == "thread" else True
    prefixes = {path.name for path in (tmp_path / "step-2").iterdir() if names.is_prefix(path.name)}
    assert 2 == len(prefixes)
    refs = [f"{run}@1", f"{run}@2", str(tmp_path / "step-1"), str(tmp_path / "step-2")]
    environment = {"SHARDBOOK_SERVER": server}
    assert [{ref: [] for ref in refs}] * 2 == pool.run(jobs.load, "fsdp", refs, world_size=2, environment=environment)


class TestOneProcess:
    """What does not depend on the number of ranks."""

    def test_dcp_to_torch_save(self, offline: dcp.Session, tmp_path: Path) -> None:
        """By way of ``.metadata``; offline there is no more than the directory."""
        result = _saved(tmp_path / "step-7")
        assert (SaveState.UNREGISTERED, "mode offline", 7) == (result.state, result.reason, result.step)
        dcp_to_torch_save(tmp_path / "step-7", tmp_path / "whole.pt")
        whole = torch.load(tmp_path / "whole.pt", weights_only=True)
        assert (True, 0.5) == (torch.equal(some_state()["w"], whole["w"]), whole["lr"])
        assert loads(tmp_path / "step-7")
        assert _loads_by_torch(tmp_path / "step-7")

    def test_a_writer_and_a_reader_are_used_again(self, session: dcp.Session, tmp_path: Path) -> None:
        """With another ``checkpoint_id``, as DCP's are; the other writer keeps its options."""
        writer = dcp.ShardbookWriter(
            storage_writer=FileSystemWriter(tmp_path / "unused", thread_count=2, _extensions=[ZStandard()])
        )
        reader = dcp.ShardbookReader()
        for step in (1, 2):
            metadata = torch_save(some_state(), checkpoint_id=tmp_path / f"step-{step}", storage_writer=writer)
            assert (metadata.storage_data or {}).keys()
            assert writer.result is not None
            for target in (writer.result.ref, tmp_path / f"step-{step}"):
                state = blank_state()
                torch_load(state, checkpoint_id=target, storage_reader=reader)
                assert torch.equal(some_state()["w"], state["w"])
        assert 4 == len(list(tmp_path.rglob("*.distcp")))

    def test_a_pickled_writer(self, session: dcp.Session, tmp_path: Path) -> None:
        """Has an attempt of its own, wherever it is used, and however often the other one is meanwhile."""
        path = tmp_path / "step-1"
        writer = dcp.ShardbookWriter(path)
        copy: dcp.ShardbookWriter = pickle.loads(pickle.dumps(writer))
        results = []
        for one in (writer, copy, copy):
            torch_save(some_state(), storage_writer=one)
            assert one.result is not None
            results.append(one.result)
        assert [SaveState.COMMITTED] * 3 == [result.state for result in results]
        assert [2, 1, 3] == [result.attempt for result in results]

    def test_checksums(self, session: dcp.Session, server: str, tmp_path: Path) -> None:
        """Travel with torch's gather."""
        result = _saved(tmp_path / "step-1", checksum="crc32c")
        for target in (result.ref, tmp_path / "step-1"):
            report = verify(target, checksums=True, client=Client(server))
            assert (True, 3) == (report.is_ok, report.checked_count)

    def test_entries_that_a_load_will_refuse(self, session: dcp.Session, tmp_path: Path) -> None:
        """Named when they are saved, by torch's save as by Shardbook's."""
        writer = dcp.ShardbookWriter(tmp_path / "step-1")
        with pytest.warns(UnsafeEntryWarning, match="'odd' needs pathlib"):
            torch_save({"odd": tmp_path, "even": 2}, storage_writer=writer)

    def test_disabled(self, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other writer and nothing of ours, with ``init`` and without."""
        torch_save(some_state(), checkpoint_id=tmp_path / "plain")
        for name, has_session in (("one", True), ("two", False)):
            if has_session:
                dcp.init(run=run, mode="disabled")
            else:
                monkeypatch.setenv("SHARDBOOK_MODE", "disabled")
            writer = dcp.ShardbookWriter(tmp_path / name)
            saved: Any = torch_async_save(some_state(), storage_writer=writer)
            saved.result()
            dcp.close()
            assert (files_below(tmp_path / "plain"), None) == (files_below(tmp_path / name), writer.result)
            assert loads(tmp_path / name)


class TestGlobalPlans:
    """Planners of others, whose global plan is their own business."""

    def test_metadata_that_is_dcps(self, session: dcp.Session, server: str, tmp_path: Path) -> None:
        """It is recorded as it is, and equal saves share their structure."""

        class Own(DefaultSavePlanner):
            def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
                plans, metadata = super().create_global_plan(all_plans)
                metadata.planner_data = {**metadata.planner_data, "more": ("more",)}
                return plans, metadata

        results = [_saved(tmp_path / f"step-{step}", Own()) for step in (1, 2)]
        assert [SaveState.COMMITTED] * 2 == [result.state for result in results]
        for result in results:
            service = columns_of(CheckpointName.parse(result.ref)).to_torch()
            plain = FileSystemReader(result.path).read_metadata()
            assert ("more",) == plain.planner_data["more"]
            assert [] == differences(without_identity(plain), without_identity(service))
            assert loads(result.ref)
            assert loads(result.path)
        stored = [Client(server).get_checkpoint(result.name) for result in results]
        assert stored[0].structure_digest == stored[1].structure_digest

    def test_metadata_that_is_more_than_dcps(self, session: dcp.Session, tmp_path: Path) -> None:
        """Plain DCP gets it as ever; the catalogue cannot have it, and the result says so."""

        class More(DefaultSavePlanner):
            def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
                plans, metadata = super().create_global_plan(all_plans)
                metadata.mcore_data = {"w": 1}  # type: ignore[attr-defined]
                return plans, metadata

        result = _saved(tmp_path / "step-1", More())
        assert (SaveState.UNREGISTERED, "UNSUPPORTED_METADATA") == (result.state, result.reason.partition(":")[0])
        assert {"w": 1} == FileSystemReader(tmp_path / "step-1").read_metadata().mcore_data  # type: ignore[attr-defined]
        assert loads(tmp_path / "step-1", weights_only=False)

    def test_items_that_a_rank_leaves_out(self, session: dcp.Session, tmp_path: Path) -> None:
        """What was written is what is recorded."""

        class Dropping(DefaultSavePlanner):
            def finish_plan(self, new_plan: SavePlan) -> SavePlan:
                items = [item for item in new_plan.items if item.index.fqn != "lr"]
                return super().finish_plan(dataclasses.replace(new_plan, items=items))

        result = _saved(tmp_path / "step-1", Dropping())
        state = {"w": torch.zeros(3, 4)}
        dcp.load(state, result.ref)
        assert (SaveState.COMMITTED, "", True) == (
            result.state,
            result.reason,
            torch.equal(some_state()["w"], state["w"]),
        )


class TestWithoutTheService:
    """``finish`` never raises because of the service, unless it is asked to."""

    def test_a_server_that_is_away(
        self, make_databases: MakeDatabases, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The save ends, loadable by path; the session's next one, or a sync, records it."""
        monkeypatch.setenv("SHARDBOOK_OUTAGE_FIRST_S", "5")
        url = make_databases("sqlite").new()
        with running_server(Settings(listen="127.0.0.1:0", http_listen="", database_url=url)) as running:
            dcp.init(run=run, server=running.address)
            assert SaveState.COMMITTED == _saved(tmp_path / "step-1").state
        missed = _saved(tmp_path / "step-2")
        assert (SaveState.UNREGISTERED, str(tmp_path / "step-2")) == (missed.state, missed.ref)
        with pytest.raises(CheckpointException) as caught:
            _saved(tmp_path / "step-3", strict=True)
        assert isinstance(_of_rank_0(caught.value), UnregisteredError)
        for step in (2, 3):
            assert loads(tmp_path / f"step-{step}")
            assert _loads_by_torch(tmp_path / f"step-{step}")
        with running_server(Settings(listen=running.address, http_listen="", database_url=url)) as running:
            client = Client(running.address)
            (synced,) = sync_directory(client, tmp_path / "step-2")
            assert SyncOutcome.RECORDED == synced.outcome
            assert SaveState.COMMITTED == _saved(tmp_path / "step-4").state
            monkeypatch.setenv("SHARDBOOK_SERVER", running.address)
            assert [loads(f"{run}@{step}") for step in (1, 2, 3, 4)] == [True] * 4
            assert {1} == {client.get_checkpoint(f"{run}@{step}").session for step in (1, 2, 3, 4)}
            dcp.close()

    def test_a_session_that_the_database_forgot(
        self, make_databases: MakeDatabases, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was put back from a backup: the incarnation has another number now, in the manifest too."""
        databases = make_databases("sqlite")
        with running_server(Settings(listen="127.0.0.1:0", http_listen="", database_url=databases.new())) as running:
            numbers = [dcp.init(run=run, server=running.address, job_id="job").number for _ in range(2)]
        assert [1, 2] == numbers
        settings = Settings(listen=running.address, http_listen="", database_url=databases.new())
        with running_server(settings) as running:
            assert SaveState.COMMITTED == _saved(tmp_path / "step-1").state
            assert 1 == Client(running.address).get_checkpoint(f"{run}@latest").session
            (synced,) = sync_directory(Client(running.address), tmp_path / "step-1")
            assert (SyncOutcome.PRESENT, 1) == (synced.outcome, synced.session)
            dcp.close()

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_session_that_is_replaced_meanwhile(
        self, pool: RankPool, server: str, run: str, tmp_path: Path, strict: bool
    ) -> None:
        """The data stays, in its own directory; ``@latest`` does not move, and a sync records history."""
        path, start = str(tmp_path / "step-1"), {"run": run, "server": server}
        first, second = pool.run(entry_jobs.save_fenced, path, strict, start, world_size=2)
        if strict:  # torch tells every rank of the coordinator's
            assert [{0: "SessionFencedError"}] * 2 == [first, second]
        else:
            assert (SaveState.UNREGISTERED, "SESSION_FENCED") == (first.state, first.reason.partition(":")[0])
        assert [{path: []}] * 2 == pool.run(jobs.load, "uneven", [path], True, world_size=2)
        client = Client(server)
        with pytest.raises(NotFoundError):
            client.get_checkpoint(f"{run}@latest")
        (synced,) = sync_directory(client, path)
        assert (SyncOutcome.RECORDED, 1) == (synced.outcome, client.get_checkpoint(f"{run}@1").session)

    def test_ranks_whose_server_was_never_there(self, pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
        """Their session has no number; the directory is enough, and a sync makes it a checkpoint of the catalogue."""
        start = {"run": run, "server": "127.0.0.1:1"}
        environment = {"SHARDBOOK_OUTAGE_FIRST_S": "0.3", "SHARDBOOK_OUTAGE_LATER_S": "0.1"}
        results, _ = pool.run(
            entry_jobs.save_layouts, ["fsdp"], str(tmp_path), start, world_size=2, environment=environment
        )
        path = str(tmp_path / "fsdp")
        assert ([SaveState.UNREGISTERED] * 2, [path] * 2) == (
            [result.state for result in results],
            [result.ref for result in results],
        )
        assert {SyncOutcome.RECORDED} == {one.outcome for one in sync_directory(Client(server), path)}
        targets, environment = [path, f"{run}@1"], {"SHARDBOOK_SERVER": server}
        loaded = pool.run(jobs.load, "fsdp", targets, world_size=2, environment=environment)
        assert [{target: [] for target in targets}] * 2 == loaded


class TestRefused:
    """Before anything is written, with the reason."""

    @pytest.mark.parametrize("kind", ["hugging face", "safetensors"])
    def test_writers(self, offline: dcp.Session, tmp_path: Path, kind: str) -> None:
        """Those that Shardbook's own save refuses; and this one is not for that."""
        other: Any = (
            HuggingFaceStorageWriter(str(tmp_path))
            if kind == "hugging face"
            else FileSystemWriter(tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
        )
        with pytest.raises(UnsupportedWriterError):
            dcp.ShardbookWriter(storage_writer=other)
        with pytest.raises(UnsupportedWriterError, match=r"torch's own save"):
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", storage_writer=dcp.ShardbookWriter())

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"planner": DefaultSavePlanner(enable_plan_caching=True)}, "UNSUPPORTED_PLANNER"),
            ({"use_collectives": False}, "NO_COLLECTIVES"),
            ({"checkpoint_id": "nowhere"}, "NO_STEP"),
        ],
        ids=["caching", "no collectives", "no step"],
    )
    def test_saves(
        self,
        offline: dcp.Session,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        options: dict[str, Any],
        reason: str,
    ) -> None:
        """Where torch wraps errors, what it wraps is ours."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises((CheckpointException, ShardbookError)) as caught:
            torch_save(some_state(), **{"checkpoint_id": "1", "storage_writer": dcp.ShardbookWriter(), **options})
        error = caught.value if isinstance(caught.value, ShardbookError) else _of_rank_0(caught.value)
        assert isinstance(error, ShardbookError)
        assert (reason, []) == (error.reason, files_below(tmp_path))

    def test_without_a_session(self, tmp_path: Path) -> None:
        """Said when the writer is made; a reader needs none."""
        with pytest.raises(ShardbookError) as caught:
            dcp.ShardbookWriter(tmp_path / "step-1")
        assert "NO_SESSION" == caught.value.reason

    def test_ranks_that_would_load_different_checkpoints(self, session: dcp.Session, tmp_path: Path) -> None:
        """A save that is committed between two ranks' looks at ``@latest``."""
        plans, readers = [], []
        for step in (1, 2):
            _saved(tmp_path / f"step-{step}")
            reader = dcp.ShardbookReader(f"{session.run}@latest")
            planner = dcp.ShardbookLoadPlanner()
            metadata = reader.read_metadata()
            planner.set_up_planner(blank_state(), metadata, is_coordinator=True)
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            plans.append(reader.prepare_local_plan(planner.create_local_plan()))
            readers.append(reader)
        with pytest.raises(ShardbookError) as caught:
            readers[0].prepare_global_plan(plans)
        assert "CHECKPOINT_MOVED" == caught.value.reason
        assert 1 == len(readers[0].prepare_global_plan(plans[:1]))


def _of_rank_0(error: BaseException) -> BaseException:
    assert isinstance(error, CheckpointException)
    failed: BaseException = error.failures[0][0]
    return failed
