"""DCP's ``.metadata`` is read without running anything that it holds."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

import shardbook.dcp as dcp
from shardbook.dcp.pickled import read_pickled_metadata
from shardbook.errors import FailedPreconditionError


def metadata() -> Metadata:
    """Metadata with one of everything that DCP writes."""
    size = torch.Size([4, 2])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    properties = TensorProperties(dtype=torch.bfloat16, layout=torch.sparse_coo)
    return Metadata(
        {"w": TensorStorageMetadata(properties, size, [chunk]), "b": BytesStorageMetadata()},
        planner_data={"w": ("model", 0, "w")},
        storage_data={MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 9, ["stream.zstd/1"])},
        storage_meta=StorageMeta(PosixPath("/ckpt"), "save", None, ["model"]),
        version="1.0.0",
    )


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_what_dcp_writes_is_read_exactly() -> None:
    """The same objects that pickle.load gives."""
    content = pickle.dumps(metadata())
    assert pickle.loads(content) == read_pickled_metadata(io.BytesIO(content))


def test_paths_of_python_3_13_are_read() -> None:
    """It pickles them under the name of a private module that other releases lack."""
    content = pickle.dumps(metadata(), protocol=2)
    newer = content.replace(b"cpathlib\n", b"cpathlib._local\n")
    assert content != newer
    assert pickle.loads(content) == read_pickled_metadata(io.BytesIO(newer))


@pytest.mark.parametrize("place", ["state_dict_metadata", "planner_data", "storage_data", "version"])
def test_a_canary_in_any_place_is_never_run(place: str, tmp_path: Path) -> None:
    """The name is refused before it is looked up; torch's own load would run it."""
    bad = metadata()
    setattr(bad, place, {"x": Canary(tmp_path / "ran")})
    with pytest.raises(FailedPreconditionError) as caught:
        read_pickled_metadata(io.BytesIO(pickle.dumps(bad)))
    assert caught.value.reason == "UNSAFE_METADATA"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"a": 1}), pickle.dumps(metadata())[:-20]])
def test_damaged_files_and_other_pickles_are_refused(content: bytes) -> None:
    """A typed error, whatever pickle raises."""
    with pytest.raises(FailedPreconditionError) as caught:
        read_pickled_metadata(io.BytesIO(content))
    assert caught.value.reason == "UNSAFE_METADATA"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_load_of_a_plain_dcp_directory_never_runs_its_pickle(tmp_path: Path) -> None:
    """A checkpoint by DCP loads; the same directory with a canary in its .metadata does not, unless it is trusted."""
    state = {"w": torch.arange(6.0)}
    torch_dcp.save(state, checkpoint_id=tmp_path / "step-1")
    loaded = {"w": torch.zeros(6)}
    dcp.load(loaded, tmp_path / "step-1")
    assert torch.equal(state["w"], loaded["w"])

    path = tmp_path / "step-1" / ".metadata"
    bad = pickle.loads(path.read_bytes())
    bad.planner_data = {**bad.planner_data, "x": Canary(tmp_path / "ran")}
    path.write_bytes(pickle.dumps(bad))
    with pytest.raises(FailedPreconditionError) as caught:
        dcp.load({"w": torch.zeros(6)}, tmp_path / "step-1")
    assert caught.value.reason == "UNSAFE_METADATA"
    assert not (tmp_path / "ran").exists()
    dcp.load({"w": torch.zeros(6)}, tmp_path / "step-1", weights_only=False)
    assert (tmp_path / "ran").exists()
