"""What cannot be saved is refused by name before anything is written; nothing that is read is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan

from shardbook import Client, dcp
from shardbook.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    UnsupportedMetadataError,
    UnsupportedPlannerError,
    UnsupportedWriterError,
)
from tests.torch.alone import some_state
from tests.torch.harness import files_below

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


class _Straying(FileSystemWriter):
    """Writes where it likes."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        return super().write_data(dataclasses.replace(plan, storage_data=type(plan.storage_data)("__0_")), planner)


class _Forgetful(FileSystemWriter):
    """Reports one item too few, as torch's writer does when one of its threads fails."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        shorter: torch.futures.Future[Any] = torch.futures.Future()
        shorter.set_result(done.value()[:-1])
        return shorter


class _Global(DefaultSavePlanner):
    """Plans globally."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        return super().create_global_plan(all_plans)


class TestRefused:
    """What cannot be saved so is refused with the reason, before anything is written."""

    @pytest.mark.parametrize("kind", ["hugging face", "safetensors"])
    def test_writers(self, offline: dcp.Session, tmp_path: Path, kind: str) -> None:
        """Their extents say nothing."""
        path = tmp_path / "1"
        writer: FileSystemWriter = (
            HuggingFaceStorageWriter(str(path))
            if kind == "hugging face"
            else FileSystemWriter(path, serialization_format=SerializationFormat.SAFETENSORS)
        )
        with pytest.raises(UnsupportedWriterError):
            dcp.save(some_state(), storage_writer=writer)
        assert [] == files_below(tmp_path)

    @pytest.mark.parametrize(
        "planner", [_Global(), DefaultSavePlanner(enable_plan_caching=True)], ids=["global", "caching"]
    )
    def test_planners(self, offline: dcp.Session, tmp_path: Path, planner: DefaultSavePlanner) -> None:
        """They need what nobody has."""
        with pytest.raises(UnsupportedPlannerError):
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", planner=planner)
        assert [] == files_below(tmp_path)

    def test_a_writer_that_strays_from_its_directory(self, session: dcp.Session, tmp_path: Path) -> None:
        """A straggler could overwrite such files: the attempt fails."""
        with pytest.raises(UnsupportedWriterError, match="outside"):
            dcp.save(some_state(), storage_writer=_Straying(tmp_path / "1"))
        failed = next(Client(session.server).list_checkpoints(session.run, show_all=True))
        assert "FAILED" == failed.state

    def test_a_writer_that_loses_items(self, offline: dcp.Session, tmp_path: Path) -> None:
        """Torch's writer swallows errors of its threads: a hole in the checkpoint is noticed here."""
        with pytest.raises(FailedPreconditionError) as caught:
            dcp.save(some_state(), storage_writer=_Forgetful(tmp_path / "1"))
        assert "WRITE_INCOMPLETE" == caught.value.reason

    def test_metadata_without_a_wire_form(self, offline: dcp.Session, tmp_path: Path) -> None:
        """Named before anything is written."""

        class Odd(DefaultSavePlanner):
            def create_local_plan(self) -> SavePlan:
                return dataclasses.replace(super().create_local_plan(), planner_data={"w": ["w"]})

        with pytest.raises(UnsupportedMetadataError, match="'w' is a builtins"):
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", planner=Odd())
        assert [] == [name for name in files_below(tmp_path) if name.endswith(".distcp")]

    def test_no_session(self, tmp_path: Path) -> None:
        """The message has the line that is missing."""
        with pytest.raises(FailedPreconditionError, match=r"shardbook\.dcp\.init"):
            dcp.save(some_state(), checkpoint_id=tmp_path / "1")

    def test_an_executor_that_is_none(self, offline: dcp.Session, tmp_path: Path) -> None:
        """There is THREAD and PROCESS."""
        unknown: Any = "process"
        with pytest.raises(InvalidArgumentError) as caught:
            dcp.async_save(some_state(), checkpoint_id=tmp_path / "1", async_checkpointer_type=unknown)
        assert "UNSUPPORTED_EXECUTOR" == caught.value.reason

    def test_a_wait_that_is_none(self, offline: dcp.Session, tmp_path: Path) -> None:
        """Misspelt options are no options."""
        with pytest.raises(InvalidArgumentError):
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", wait="forever")


class _Canary:
    """Runs code when it is unpickled."""

    ran: list[int] = []  # noqa: RUF012 - shared on purpose

    def __reduce__(self) -> Any:
        return _Canary.ran.append, (1,)


class TestBytesEntries:
    """What is not a tensor is plain data, or says so."""

    def test_a_hazard_is_noticed_at_save_and_refused_at_load(self, session: dcp.Session, tmp_path: Path) -> None:
        """The warning names the entry, once; nothing of it ever runs."""
        state = {"w": torch.ones(1), "bad.entry": _Canary()}
        with pytest.warns(dcp.UnsafeEntryWarning, match=r"'bad\.entry'"):
            result = dcp.save(state, checkpoint_id=tmp_path / "1")
        dcp.save(state, checkpoint_id=tmp_path / "2")
        with pytest.raises(FailedPreconditionError, match=r"'bad\.entry'") as caught:
            dcp.load({"w": torch.zeros(1), "bad.entry": None}, result.ref)
        assert ("UNSAFE_ENTRY", []) == (caught.value.reason, _Canary.ran)

    def test_who_trusts_the_writer_may_load_it(self, session: dcp.Session, tmp_path: Path) -> None:
        """``weights_only=False`` is DCP's own behaviour."""
        with pytest.warns(dcp.UnsafeEntryWarning):
            result = dcp.save({"path": Path("/x")}, checkpoint_id=tmp_path / "1")
        state: dict[str, Any] = {"path": None}
        dcp.load(state, result.ref, weights_only=False)
        assert {"path": Path("/x")} == state
