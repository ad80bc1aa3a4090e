"""``save`` in one process: what comes back, where things lie, which step and attempt a save is."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from shardbook import Client, dcp
from shardbook.core import directory as names
from shardbook.core.exported import Fingerprint
from shardbook.dcp import SaveState
from shardbook.dcp.runtime import current
from shardbook.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    UnregisteredError,
)
from tests.behaviour.rpc.api import wait_until
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.harness import files_below

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


class SlowStager(BlockingAsyncStager):
    """Copies the state dict when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """Returns a future, as DefaultStager does in the background."""
        copied = super().stage(state_dict)
        return self._thread.submit(lambda: self.go.wait(30) and copied)


class TestResult:
    """What comes back, and where things lie."""

    def test_a_save_is_committed(self, session: dcp.Session, tmp_path: Path) -> None:
        """It is loadable by ref and by path, and says what it did."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "step-1500")
        assert (SaveState.COMMITTED, f"{session.run}@1500", "", 1500) == (
            result.state,
            result.ref,
            result.reason,
            result.step,
        )
        assert (3, 3) == (result.stats.planned_count, result.stats.written_count)
        assert 0 < result.stats.sent_bytes < 2000
        assert loads(result.ref)
        assert loads(result.path)
        assert loads(f"{session.run}@latest")
        assert loads(result.name)

    def test_what_the_service_does_not_take_is_saved_all_the_same(self, session: dcp.Session, tmp_path: Path) -> None:
        """An fqn beyond the service's limit: its refusal is the reason, and the directory loads."""
        state = {"n" * 70_000: torch.arange(4.0)}
        result = dcp.save(state, checkpoint_id=tmp_path / "1")
        assert SaveState.UNREGISTERED == result.state
        assert "the limit is 65536" in result.reason
        blank = {name: torch.zeros(4) for name in state}
        dcp.load(blank, result.path)
        assert torch.equal(torch.arange(4.0), next(iter(blank.values())))

    def test_files_lie_in_the_attempts_directory(self, session: dcp.Session, tmp_path: Path) -> None:
        """Data below the prefix, manifests beside it, records gone, nothing else."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        assert f"{session.incarnation.hex()[:12]}-a1" == result.prefix
        exported = (tmp_path / "1" / names.DCP_METADATA).read_bytes()
        mark = names.mark_path(result.prefix, Fingerprint.of(len(exported), exported).mark)
        expected = [names.DCP_METADATA, mark, names.MANIFEST, names.manifest_path(result.prefix)]
        assert sorted([*expected, f"{result.prefix}/__0_0.distcp"]) == files_below(tmp_path / "1")

    def test_the_second_save_sends_digests(self, session: dcp.Session, tmp_path: Path) -> None:
        """The structure travels once."""
        first, second = (dcp.save(some_state(), checkpoint_id=tmp_path / f"step-{step}") for step in (1, 2))
        assert second.stats.sent_bytes < first.stats.sent_bytes
        assert second.stats.sent_bytes < 350

    def test_async_save_has_two_futures(self, session: dcp.Session, tmp_path: Path) -> None:
        """It is DCP's response, and can be waited for as the one future that DCP sometimes returns."""
        response = dcp.async_save(some_state(), checkpoint_id=tmp_path / "step-3")
        assert isinstance(response, AsyncSaveResponse)
        assert response.staging_completion.result(20) is None
        assert SaveState.COMMITTED == response.upload_completion.result(20).state == response.result(20).state
        assert response.done()
        assert response.exception() is None

    def test_a_writer_of_a_save_in_the_background_is_not_taken_from_it(
        self, session: dcp.Session, tmp_path: Path
    ) -> None:
        """Writers and planners hold one checkpoint's state: its bytes would go into the other one."""
        writer, planner = FileSystemWriter(tmp_path / "step-1"), DefaultSavePlanner()
        stager = SlowStager()
        first = dcp.async_save(
            some_state(), checkpoint_id=tmp_path / "step-1", storage_writer=writer, planner=planner, async_stager=stager
        )
        for shared in ({"storage_writer": writer}, {"planner": planner}):
            with pytest.raises(FailedPreconditionError) as caught:
                dcp.save(some_state(), checkpoint_id=tmp_path / "step-2", **shared)
            assert "STILL_IN_USE" == caught.value.reason
        stager.go.set()
        assert SaveState.COMMITTED is first.result(30).state
        again = dcp.save(some_state(), checkpoint_id=tmp_path / "step-2", storage_writer=writer, planner=planner)
        assert loads(again.path)
        assert loads(first.result().path)

    def test_a_background_save_that_fails_is_logged(
        self, session: dcp.Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also where nobody asks for its result."""
        response = dcp.async_save({"f": lambda: 1}, checkpoint_id=tmp_path / "step-3")
        assert response.exception(30) is not None
        wait_until(lambda: any("background save of step 3" in one.getMessage() for one in caplog.records))

    def test_async_save_copies_first(self, session: dcp.Session, tmp_path: Path) -> None:
        """What is changed after the copy is not saved."""
        state = some_state()
        response = dcp.async_save(state, checkpoint_id=tmp_path / "step-3")
        response.staging_completion.result(20)
        state["w"].zero_()
        assert loads(response.result(20).ref)

    def test_a_stager_of_the_callers(self, session: dcp.Session, tmp_path: Path) -> None:
        """An asynchronous stager's copy is waited for; the caller closes it."""
        stager = DefaultStager(StagingOptions(False, False, True, False))
        response = dcp.async_save(some_state(), checkpoint_id=tmp_path / "3", async_stager=stager)
        assert response.staging_completion.result(20) is None
        assert SaveState.COMMITTED == response.result(20).state
        stager.close()

    def test_stateful_objects(self, session: dcp.Session, tmp_path: Path) -> None:
        """Their state dicts are saved, and loaded back into them."""
        model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        result = dcp.save({"model": model}, checkpoint_id=tmp_path / "1")
        dcp.load({"model": other}, result.ref)
        assert torch.equal(model.weight, other.weight)


class TestStep:
    """Which step a save is."""

    @pytest.mark.parametrize(
        ("path", "step"), [("step-1500", 1500), ("7", 7), ("run3/step_0042", 42), ("a1/b2-c3/", 3), ("v2-000", 0)]
    )
    def test_the_last_number_of_the_last_component(
        self, offline: dcp.Session, tmp_path: Path, path: str, step: int
    ) -> None:
        """Unless ``step`` says otherwise."""
        assert step == dcp.save(some_state(), checkpoint_id=f"{tmp_path}/{path}").step
        assert 99 == dcp.save(some_state(), checkpoint_id=f"{tmp_path}/{path}", step=99).step

    @pytest.mark.parametrize("step", [None, -1, True, 1.5, "7", 2**63])
    def test_no_step_is_an_error_before_anything_is_written(
        self, offline: dcp.Session, tmp_path: Path, step: Any
    ) -> None:
        """A checkpoint that cannot be found again by step is not made."""
        with pytest.raises(InvalidArgumentError) as caught:
            dcp.save(some_state(), checkpoint_id=tmp_path / "final", step=step)
        assert "step" == caught.value.violations[0].field
        assert [] == files_below(tmp_path)


class TestAttempts:
    """No attempt overwrites another one's files, and none takes another one's number."""

    def test_saving_a_step_again(self, session: dcp.Session, tmp_path: Path) -> None:
        """The second attempt takes the first one's place in the catalogue; both sets of files stay."""
        state = some_state()
        first = dcp.save(state, checkpoint_id=tmp_path / "step-1")
        state["w"] += 1
        second = dcp.save(state, checkpoint_id=tmp_path / "step-1")
        assert ([1, 2], [True, True]) == (
            [first.attempt, second.attempt],
            [(tmp_path / "step-1" / one.prefix).is_dir() for one in (first, second)],
        )
        for target in (first.ref, tmp_path / "step-1"):
            loaded = blank_state()
            dcp.load(loaded, target)
            assert torch.equal(state["w"], loaded["w"])
        assert loads(first.name)

    def test_two_parts_in_one_directory(self, session: dcp.Session, tmp_path: Path) -> None:
        """They do not share a prefix."""
        first = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        second = dcp.save(some_state(), checkpoint_id=tmp_path / "1", part="optim")
        assert first.prefix != second.prefix
        assert f"{session.run}:optim@1" == second.ref
        assert loads(second.ref)
        assert loads(first.ref)

    def test_one_step_in_two_directories(self, session: dcp.Session, tmp_path: Path) -> None:
        """They do not share a number: both are in the catalogue."""
        first, second = (dcp.save(some_state(), checkpoint_id=tmp_path / name, step=1) for name in "ab")
        assert [1, 2] == [first.attempt, second.attempt]
        assert loads(first.name)

    def test_a_session_carried_over_a_restart(self, session: dcp.Session, tmp_path: Path) -> None:
        """Its attempts would be counted anew and overwrite its files: refused, and the files are untouched."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        before = (tmp_path / "1" / result.prefix / "__0_0.distcp").stat().st_mtime_ns
        dcp.close()
        dcp.init(session=session)
        with pytest.raises(FailedPreconditionError) as caught:
            dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        assert "ATTEMPT_EXISTS" == caught.value.reason
        assert before == (tmp_path / "1" / result.prefix / "__0_0.distcp").stat().st_mtime_ns


class TestModes:
    """With and without a service."""

    def test_offline(self, offline: dcp.Session, tmp_path: Path) -> None:
        """The directory is enough."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        assert (SaveState.UNREGISTERED, str(tmp_path / "1"), "mode offline") == (
            result.state,
            result.ref,
            result.reason,
        )
        assert loads(result.ref)

    def test_strict(self, offline: dcp.Session, tmp_path: Path) -> None:
        """Raises, and the data is there all the same."""
        with pytest.raises(UnregisteredError, match="shardbook sync"):
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", strict=True)
        assert loads(tmp_path / "1")

    def test_disabled(self, run: str, tmp_path: Path) -> None:
        """DCP's own save, and nothing of Shardbook's in the directory."""
        dcp.init(run=run, mode="disabled")
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "any")
        saved = dcp.async_save(some_state(), checkpoint_id=tmp_path / "other").result(20)
        dcp.close()
        assert [SaveState.UNREGISTERED] * 2 == [result.state, saved.state]
        assert [".metadata", "__0_0.distcp"] == files_below(tmp_path / "any")
        assert loads(tmp_path / "any")
        assert loads(tmp_path / "other")

    def test_without_metadata_export(self, offline: dcp.Session, tmp_path: Path) -> None:
        """It warns, and the manifest is enough for Shardbook."""
        with pytest.warns(UserWarning, match="export_metadata"):
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", export_metadata=False)
        assert not (tmp_path / "1" / ".metadata").exists()
        assert loads(tmp_path / "1")


class TestSession:
    """Sessions of one process."""

    def test_a_second_init_is_a_new_incarnation(self, session: dcp.Session, server: str, run: str) -> None:
        """It does not stand in its own way."""
        again = dcp.init(run=run, server=server)
        assert session.number + 1 == again.number
        assert session.incarnation != again.incarnation

    def test_close_ends_the_lease(self, session: dcp.Session, server: str, run: str) -> None:
        """Another job may start at once."""
        dcp.close()
        assert not Client(server).get_run(run).parts[0].writing

    def test_latest_is_told(self, session: dcp.Session, server: str, run: str, tmp_path: Path) -> None:
        """A restarted job learns what to resume from."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "5")
        assert result.name == dcp.init(run=run, server=server).latest

    def test_a_rollback_is_not_undone(self, session: dcp.Session, server: str, run: str, tmp_path: Path) -> None:
        """``resumed_from`` moves ``@latest`` back."""
        for step in (1, 2):
            dcp.save(some_state(), checkpoint_id=tmp_path / f"step-{step}")
        dcp.init(run=run, server=server, resumed_from=f"{run}@1")
        assert 1 == Client(server).get_checkpoint(f"{run}@latest").step

    def test_counts_are_the_sessions_own(self, session: dcp.Session, tmp_path: Path) -> None:
        """A runtime is what init made; attempts are counted in it."""
        assert session is current().session
        assert [1, 2] == [current().next_attempt("default", 9, "/x") for _ in range(2)]
        assert 3 == current().next_attempt("default", 10, "/x")
        assert 3 == current().next_attempt("default", 9, "/y")


def test_futures_are_the_standard_librarys(offline: dcp.Session, tmp_path: Path) -> None:
    """What DCP's callers wait for."""
    response = dcp.async_save(some_state(), checkpoint_id=tmp_path / "1")
    assert isinstance(response.upload_completion, Future)
    response.result(20)
