"""``load`` in one process: what can be loaded, and how it fails."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta

from shardbook import Client, dcp
from shardbook.errors import NotFoundError, UnavailableError
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
        monkeypatch.setattr("shardbook.dcp.loading.Client", partial(Client, outage_s=0.5))
        with pytest.raises(UnavailableError, match="can be loaded without a server"):
            dcp.load(blank_state(), f"{run}@1")

    def test_an_unknown_ref(self, session: dcp.Session) -> None:
        """As the catalogue says."""
        with pytest.raises(NotFoundError):
            dcp.load(blank_state(), f"{session.run}@77")

    def test_keys_that_do_not_fit(self, session: dcp.Session, tmp_path: Path) -> None:
        """torch's own errors, not wrapped into anything that is no Exception."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        with pytest.raises(RuntimeError, match="Missing key"):
            dcp.load({**blank_state(), "more": 1}, result.ref)
        with pytest.raises(ValueError, match="Size mismatch"):
            dcp.load({**blank_state(), "w": torch.zeros(4, 4)}, result.ref)

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
