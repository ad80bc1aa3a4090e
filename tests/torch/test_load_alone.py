"""``load`` in one process: what can be loaded, and how it fails."""

from __future__ import annotations

import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta

from shardbook import Client, dcp
from shardbook.errors import CheckpointMismatchError, Mismatch, MismatchKind, NotFoundError, UnavailableError
from tests.torch.alone import blank_state, loads, some_state

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


class OwnMeta(StorageMeta):
    """A class that no other machine has."""


class OwnMetaWriter(FileSystemWriter):
    """A writer that says more of itself than DCP's."""

    def storage_meta(self) -> StorageMeta:
        """Returns an instance of a class of its own."""
        return OwnMeta(checkpoint_id=str(self.path), save_id="mine")


def different(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """Returns the keys whose values differ."""
    pairs = {key: (torch.as_tensor(value), torch.as_tensor(actual[key])) for key, value in expected.items()}
    return [key for key, (one, other) in pairs.items() if not torch.equal(one, other)]


class TestLoad:
    """What can be loaded, and how it fails."""

    def test_a_plain_dcp_checkpoint(self, tmp_path: Path) -> None:
        """Neither a session nor a server is needed."""
        from torch.distributed.checkpoint.state_dict_saver import save as torch_save

        torch_save(some_state(), checkpoint_id=tmp_path / "1")
        assert loads(tmp_path / "1")
        assert loads(tmp_path / "1", no_dist=True)

    def test_a_moved_directory(self, offline: dcp.Session, tmp_path: Path) -> None:
        """Paths in it are relative."""
        dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        (tmp_path / "1").rename(tmp_path / "moved")
        assert loads(tmp_path / "moved")

    @pytest.mark.parametrize("from_catalogue", [True, False])
    def test_a_save_by_plain_dcp_and_its_tools(
        self, session: dcp.Session, server: str, tmp_path: Path, from_catalogue: bool
    ) -> None:
        """From ``.metadata`` alone: the one that the save left, or one that was exported from the catalogue."""
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
        from torch.distributed.checkpoint.state_dict_loader import load as torch_load

        path = tmp_path / "1"
        dcp.save(some_state(), checkpoint_id=path)
        if from_catalogue:
            (path / ".metadata").unlink()
            blocks = Client(server).get_metadata(f"{session.run}@1").dcp_metadata()
            (path / ".metadata").write_bytes(b"".join(blocks))
        shutil.rmtree(path / ".shardbook")
        state = blank_state()
        torch_load(state, checkpoint_id=path)
        assert [] == different(some_state(), state)
        dcp_to_torch_save(path, tmp_path / "whole.pt")
        assert [] == different(some_state(), torch.load(tmp_path / "whole.pt"))

    def test_a_writer_with_a_storage_meta_of_its_own(self, offline: dcp.Session, tmp_path: Path) -> None:
        """Plain DCP loads what it writes through Shardbook, too; what a subclass adds is not in the file."""
        dcp.save(some_state(), storage_writer=OwnMetaWriter(tmp_path / "1"), checkpoint_id=tmp_path / "1")
        assert StorageMeta is type(FileSystemReader(tmp_path / "1").read_metadata().storage_meta)

    def test_nothing_there(self, tmp_path: Path) -> None:
        """A path without a checkpoint, and a ref without one."""
        with pytest.raises(NotFoundError):
            dcp.load(blank_state(), tmp_path)

    def test_a_run_without_a_checkpoint(self, session: dcp.Session) -> None:
        """What is missing is named, rather than a file that nobody spoke of."""
        with pytest.raises(NotFoundError, match=f"{session.run}@latest"):
            dcp.load(blank_state(), session.run)

    def test_a_server_that_is_away(self, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Said soon, with the way around it."""
        monkeypatch.setenv("SHARDBOOK_SERVER", "127.0.0.1:1")
        monkeypatch.setattr("shardbook._answers.Client", partial(Client, outage_s=0.5))
        with pytest.raises(UnavailableError, match="can be loaded without a server"):
            dcp.load(blank_state(), f"{run}@1")

    def test_an_unknown_ref(self, session: dcp.Session) -> None:
        """As the catalogue says."""
        with pytest.raises(NotFoundError):
            dcp.load(blank_state(), f"{session.run}@77")

    @pytest.mark.parametrize("by_path", [False, True])
    def test_keys_that_do_not_fit(self, session: dcp.Session, tmp_path: Path, by_path: bool) -> None:
        """All of them at once, and nothing is read; an error that handlers of DCP's own know."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        target = tmp_path / "1" if by_path else result.ref
        state: dict[str, Any] = {
            **blank_state(),
            "w": torch.zeros(4, 4),
            "b": torch.zeros((), dtype=torch.int32),
            "more": 1,
        }
        with pytest.raises(CheckpointMismatchError) as caught:
            dcp.load(state, target)
        assert isinstance(caught.value, RuntimeError)
        assert isinstance(caught.value, ValueError)
        assert [
            Mismatch("b", MismatchKind.DTYPE, "int32 ()", "float32 ()"),
            Mismatch("more", MismatchKind.MISSING, "no tensor"),
            Mismatch("w", MismatchKind.SHAPE, "float32 (4, 4)", "float32 (3, 4)"),
        ] == list(caught.value.mismatches)
        assert (0.0, 0, 1) == (state["lr"], int(state["b"]), state["more"])
        assert caught.value.mismatches == pickle.loads(pickle.dumps(caught.value)).mismatches

    def test_what_fits_when_not_strict(self, session: dcp.Session, tmp_path: Path) -> None:
        """Loaded; converted where the dtype differs; the rest is left alone and reported."""
        result = dcp.save({**some_state(), "t": torch.ones(2)}, checkpoint_id=tmp_path / "1")
        state: dict[str, Any] = {"w": torch.full((4, 4), 7.0), "b": torch.zeros((), dtype=torch.int32)}
        state |= {"more": 1, "lr": 0, "t": "text"}
        report = dcp.load(state, result.ref, strict=False)
        kinds = {one.fqn: one.kind for one in report.mismatches}
        expected = {"b": "dtype", "more": "missing", "w": "shape", "t": "kind"}
        assert (expected, ("more",), False, 2) == (kinds, report.missing, report.is_exact, report.entry_count)
        assert (7.0, 1, 1, 0.5, "text") == (
            float(state["w"][0, 0]),
            int(state["b"]),
            *[state[k] for k in ("more", "lr", "t")],
        )

    def test_a_partial_load(self, session: dcp.Session, tmp_path: Path) -> None:
        """``allow_partial_load`` is about names alone, as in DCP; the report says which."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        planner = dcp.ShardbookLoadPlanner(allow_partial_load=True)
        state = {**blank_state(), "more": 1}
        assert ("more",) == dcp.load(state, result.ref, planner=planner).missing
        assert torch.equal(some_state()["w"], state["w"])
        with pytest.raises(CheckpointMismatchError) as caught:
            dcp.load({"more": 1, "w": torch.zeros(1)}, result.ref, planner=planner)
        assert ("w",) == tuple(one.fqn for one in caught.value.mismatches)

    def test_a_dtype_that_may_change(self, session: dcp.Session, tmp_path: Path) -> None:
        """As DCP has it, on request."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        state = {"w": torch.zeros(3, 4, dtype=torch.bfloat16)}
        assert ("w",) == dcp.load(state, result.ref, allow_dtype_change=True).of(MismatchKind.DTYPE)
        assert torch.equal(some_state()["w"].to(torch.bfloat16), state["w"])

    def test_entries_that_the_state_dict_lacks(self, session: dcp.Session, tmp_path: Path) -> None:
        """No matter, as in DCP, unless somebody asks."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        for target in (result.ref, tmp_path / "1"):
            state = {"b": torch.zeros(())}
            assert dcp.load(state, target).is_exact
            with pytest.raises(CheckpointMismatchError) as caught:
                dcp.load(state, target, planner=dcp.ShardbookLoadPlanner(refuse_unexpected=True))
            assert {"w", "lr"} == set(caught.value.of(MismatchKind.UNEXPECTED))

    def test_part_of_a_state_dict(self, session: dcp.Session, tmp_path: Path) -> None:
        """Only what is asked for is read."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        state = {"b": torch.zeros(())}
        dcp.load(state, result.ref)
        assert {"b": torch.ones(())} == state

    def test_a_damaged_data_file(self, session: dcp.Session, tmp_path: Path) -> None:
        """An Exception, never CheckpointException, which no handler expects."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        (tmp_path / "1" / result.prefix / "__0_0.distcp").write_bytes(b"")
        with pytest.raises(EOFError):
            dcp.load(blank_state(), result.ref)
