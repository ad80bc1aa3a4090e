"""Local tensors that say which parts of a larger one they hold: what torch, from 2.14 on, saves as shards.

An older torch takes them for plain tensors, and so does Shardbook under it: everything here is compared with what
torch's own save and load do with the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from shardbook import dcp

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


def _split(rows: int, *, of: torch.Tensor | None = None) -> torch.Tensor:
    """Two parts of a tensor of 4 rows, cut behind ``rows``, in one memory that has a row of padding behind each."""
    rest = 4 - rows
    local = torch.full((6, 3), -1.0)
    if of is not None:
        local[:rows], local[rows + 1 : 5] = of[:rows], of[rows:]
    said = {
        "global_shape": (4, 3),
        "global_offsets": ((0, 0), (rows, 0)),
        "local_offsets": ((0, 0), (rows + 1, 0)),
        "local_sizes": ((rows, 3), (rest, 3)),
    }
    for name, value in said.items():
        setattr(local, name, value)
    return local


def _state(rows: int, *, filled: bool) -> dict[str, Any]:
    return {"w": _split(rows, of=torch.arange(12.0).reshape(4, 3) if filled else None), "plain": torch.ones(3)}


def _sync(path: Path) -> None:
    dcp.save(_state(1, filled=True), checkpoint_id=path)


def _async(kind: AsyncCheckpointerType, path: Path) -> None:
    response: Any = dcp.async_save(_state(1, filled=True), checkpoint_id=path, async_checkpointer_type=kind)
    response.upload_completion.result()


@pytest.mark.soak_with("process")
@pytest.mark.parametrize(
    "save",
    [
        _sync,
        lambda path: _async(AsyncCheckpointerType.THREAD, path),
        lambda path: _async(AsyncCheckpointerType.PROCESS, path),
    ],
    ids=["sync", "thread", "process"],
)
def test_saved_and_loaded_as_torch_does(offline: dcp.Session, tmp_path: Path, save: Callable[[Path], None]) -> None:
    """Rule: the same entries, and what is loaded into parts that are cut elsewhere, or of the whole, is the same."""
    torch_save(_state(1, filled=True), checkpoint_id=tmp_path / "torch-1", no_dist=True)
    save(tmp_path / "ours-1")
    described = [FileSystemReader(tmp_path / name).read_metadata() for name in ("torch-1", "ours-1")]
    entries: list[Any] = [one.state_dict_metadata for one in described]
    assert entries[0] == entries[1]
    theirs, ours = (_state(3, filled=False) for _ in range(2))
    torch_load(theirs, checkpoint_id=tmp_path / "torch-1", no_dist=True)
    dcp.load(ours, tmp_path / "ours-1")
    assert torch.equal(theirs["w"], ours["w"])
    assert torch.equal(theirs["plain"], ours["plain"])
    whole = {"w": torch.zeros(tuple(entries[0]["w"].size))}
    torch_load(whole, checkpoint_id=tmp_path / "torch-1", no_dist=True)
    again = {"w": torch.zeros_like(whole["w"])}
    dcp.load(again, tmp_path / "ours-1")
    assert torch.equal(whole["w"], again["w"])
    assert whole["w"].any()
