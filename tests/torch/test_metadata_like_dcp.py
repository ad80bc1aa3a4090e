"""The metadata of a save, from the service and in ``.metadata``, is what DCP would have written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.names import CheckpointName
from shardbook.dcp.loading import columns_of, directory_metadata
from tests.torch import jobs
from tests.torch.equality import differences, without_identity
from tests.torch.harness import RankPool

#: What is made of a service's answer has nothing to do with the kind of database.
pytestmark = pytest.mark.soak_with("postgres")


def _all_four(server: str, run: str, path: Path) -> dict[str, Metadata]:
    """From the service, from the manifest, as DCP reads it, and as the service exports it; without identities."""
    service = columns_of(CheckpointName.parse(f"{run}@1"), ClientConfig(server=server)).to_torch()
    manifest = directory_metadata(FileSystemReader(path))
    plain = FileSystemReader(path).read_metadata()
    exported = pickle.loads(b"".join(Client(server).get_metadata(f"{run}@1").dcp_metadata(str(path))))
    found = {"service": service, "manifest": manifest, ".metadata": plain, "exported": exported}
    return {source: without_identity(metadata) for source, metadata in found.items()}


def _canonical(metadata: Metadata) -> Metadata:
    """Makes metadata comparable that two deduplications made: who wrote a replicated item is anyone's choice.

    Key order, chunk order, file and place follow from that choice; hints follow from the chunk order and are checked
    against it here.
    """
    storage: dict[MetadataIndex, Any] = metadata.storage_data
    hints = {(index.fqn, index.offset): index.index for index in storage}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            assert hints[fqn, None] is None
            continue
        assert list(range(len(entry.chunks))) == [hints[fqn, chunk.offsets] for chunk in entry.chunks]
        entry.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
    metadata.state_dict_metadata = dict(sorted(metadata.state_dict_metadata.items()))
    metadata.planner_data = dict(sorted(metadata.planner_data.items()))
    metadata.storage_data = {
        MetadataIndex(index.fqn, index.offset): {**vars(info), "relative_path": "", "offset": 0}
        for index, info in storage.items()
    }
    return metadata


@pytest.mark.parametrize(
    "layout", ["fsdp", "hsdp", "tensor_parallel", "pipeline", "uneven", "sharded_tensor", "objects"]
)
def test_many_ranks(pool: RankPool, server: str, run: str, tmp_path: Path, layout: str) -> None:
    """Every attribute of every object agrees, but for who wrote what more than one could write."""
    ours, theirs = tmp_path / "ours-1", tmp_path / "theirs-1"
    pool.run(jobs.save_twice, layout, str(ours), str(theirs), {"run": run, "server": server}, world_size=4)
    found = _all_four(server, run, ours)
    assert [] == differences(found[".metadata"], found["service"])
    assert [] == differences(found[".metadata"], found["manifest"])
    assert [] == differences(found[".metadata"], found["exported"])
    expected = without_identity(FileSystemReader(theirs).read_metadata())
    assert [] == differences(_canonical(expected), _canonical(found["service"]))


@pytest.mark.parametrize("layout", ["plain", "pipeline_whole", "objects"])
def test_one_rank(pool: RankPool, server: str, run: str, tmp_path: Path, layout: str) -> None:
    """With nothing to choose, everything agrees: order, files and places too."""
    ours, theirs = tmp_path / "ours-1", tmp_path / "theirs-1"
    pool.run(jobs.save_twice, layout, str(ours), str(theirs), {"run": run, "server": server}, world_size=1)
    expected = without_identity(FileSystemReader(theirs).read_metadata())
    for source, metadata in _all_four(server, run, ours).items():
        assert [] == differences(expected, metadata), source


def test_dcp_unpickles_plain_objects(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """``.metadata`` holds DCP's own classes and nothing of Shardbook's: machines without it can read it."""
    pool.run(
        jobs.save_twice, "fsdp", str(tmp_path / "1"), str(tmp_path / "2"), {"run": run, "server": server}, world_size=2
    )
    content = (tmp_path / "1" / ".metadata").read_bytes()
    assert b"shardbook" not in content
    assert isinstance(pickle.loads(content), Metadata)
