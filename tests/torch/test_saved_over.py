"""Plain DCP saves into a directory that Shardbook saved into before: whoever loads gets what was saved last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from shardbook import Client, dcp
from shardbook.core import directory as names
from shardbook.dcp.directory import read_attempt
from shardbook.dcp.writer import CheckpointFiles
from shardbook.sync import sync_directories
from tests.torch import jobs
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.harness import RankPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]


def others() -> dict[str, Any]:
    """What plain DCP saves."""
    return {key: value + 100 for key, value in some_state().items()}


def loaded(path: Path) -> float:
    """Returns the number in what a load finds."""
    state = blank_state()
    dcp.load(state, path)
    return float(state["lr"])


def test_the_last_save_counts(offline: dcp.Session, tmp_path: Path) -> None:
    """Ours, then plain DCP's, then ours again."""
    path = tmp_path / "step-1"
    dcp.save(some_state(), checkpoint_id=path)
    assert loads(path)
    torch_save(others(), checkpoint_id=path)
    assert others()["lr"] == loaded(path)
    dcp.save(some_state(), checkpoint_id=path)
    assert loads(path)


def test_a_copy_is_known_again(offline: dcp.Session, tmp_path: Path) -> None:
    """Shardbook's own export stays its own, whatever a copy makes of the times."""
    path, copy = tmp_path / "step-1", tmp_path / "copied" / "step-1"
    dcp.save(some_state(), checkpoint_id=path)
    shutil.copytree(path, copy)
    os.utime(copy / names.MANIFEST, (1.0, 1.0))
    found = read_attempt(CheckpointFiles.of(FileSystemReader(copy)))
    assert found is not None
    assert found.manifest.identity.incarnation == offline.incarnation
    torch_save(others(), checkpoint_id=copy)
    assert others()["lr"] == loaded(copy)


def test_an_older_foreign_save_does_not_count(offline: dcp.Session, tmp_path: Path) -> None:
    """Also when Shardbook exports nothing itself."""
    path = tmp_path / "step-1"
    torch_save(others(), checkpoint_id=path)
    with pytest.warns(UserWarning, match="export_metadata=False"):
        dcp.save(some_state(), checkpoint_id=path, export_metadata=False)
    assert loads(path)


def test_sync_leaves_a_younger_foreign_save_alone(
    pool: RankPool, server: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that nobody had folded are recorded in the catalogue; the directory goes on meaning the last save."""
    path = tmp_path / "step-1"
    pool.run(jobs.save_unfolded, "uneven", str(path), {"run": run, "mode": "offline"}, world_size=3)
    torch_save(others(), checkpoint_id=path)
    before = (path / names.DCP_METADATA).read_bytes()
    done = list(sync_directories(Client(server), [str(path)], export=lambda *_: [b"never"]))
    assert ["recorded"] == [one.outcome for one in done]
    assert before == (path / names.DCP_METADATA).read_bytes()
    assert others()["lr"] == loaded(path)
