"""DCP's ``.metadata`` read without torch says what torch reads, and nothing in it runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from shardbook.core.pickled_metadata import pickled_metadata
from shardbook.errors import FailedPreconditionError, UnsupportedMetadataError
from shardbook.reading.chunks import TensorChunks
from shardbook.reading.plain_metadata import read_plain_metadata
from tests.unit.strategies_metadata import any_metadata, stored_columns
from tests.unit.test_pickled_metadata import Canary
from tests.unit.test_pickled_metadata import metadata as some_metadata


def facts(metadata: Metadata, fqn: str) -> Any:
    """What torch's objects say of an entry, chunk by chunk."""
    entry = metadata.state_dict_metadata[fqn]
    if not isinstance(entry, TensorStorageMetadata):
        return None
    storage = metadata.storage_data or {}
    infos = [storage[MetadataIndex(fqn, chunk.offsets)] for chunk in entry.chunks]
    return (
        entry.properties.dtype,
        str(entry.properties.layout).removeprefix("torch."),
        tuple(entry.size),
        [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks],
        [
            (info.relative_path, info.offset, info.length, tuple(getattr(info, "transform_descriptors", None) or ()))
            for info in infos
        ],
    )


def said(chunks: TensorChunks) -> Any:
    """The same of what was read."""
    if not chunks.is_tensor:
        return None
    lists = ((), *chunks.transforms)
    places = zip(
        chunks.file.tolist(),
        chunks.start.tolist(),
        chunks.length.tolist(),
        chunks.transform_index.tolist(),
        strict=True,
    )
    boxes = zip(map(tuple, chunks.offsets.tolist()), map(tuple, chunks.sizes.tolist()), strict=True)
    return (
        getattr(torch, chunks.dtype),  # some have two names
        chunks.layout,
        chunks.shape,
        list(boxes),
        [(chunks.paths[file], start, length, lists[number]) for file, start, length, number in places],
    )


@given(any_metadata())
def test_it_says_what_torch_reads(metadata: Metadata) -> None:
    """Of arbitrary metadata, as DCP pickles it and as Shardbook streams it."""
    if metadata.storage_data is None:
        return
    contents = [pickle.dumps(metadata, protocol) for protocol in (2, 4)] if _is_picklable(metadata) else []
    structure, located, header = stored_columns(metadata)
    try:
        contents.append(b"".join(pickled_metadata(structure, located, "", header)))
    except UnsupportedMetadataError:
        assert [] == contents
    for content in contents:
        found = read_plain_metadata(content, [*metadata.state_dict_metadata, "no such name"])
        assert found.pop("no such name") is None
        for fqn, chunks in found.items():
            assert chunks is not None
            assert facts(metadata, fqn) == said(chunks)


def _is_picklable(metadata: Metadata) -> bool:
    try:
        pickle.dumps(metadata)
    except (ValueError, RuntimeError):  # one memory format has no encoding
        return False
    return True


@pytest.mark.parametrize("place", ["state_dict_metadata", "planner_data", "storage_data", "version"])
def test_a_canary_in_any_place_is_never_run(place: str, tmp_path: Path) -> None:
    """The name is refused, and not looked up."""
    bad = some_metadata()
    setattr(bad, place, {"x": Canary(tmp_path / "ran")})
    with pytest.raises(FailedPreconditionError) as caught:
        read_plain_metadata(pickle.dumps(bad), ["w"])
    assert "UNSAFE_METADATA" == caught.value.reason
    assert not (tmp_path / "ran").exists()


def _unpickled_by_parts(state: object) -> bytes:
    """A pickle that writes ``state`` into the class MetadataIndex itself."""
    named = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    return b"\x80\x02" + named + pickle.dumps(state, 2)[2:-1] + b"b."


def test_a_pickle_cannot_change_this_process() -> None:
    """It may write into stand-ins; the next file gets its own."""
    content = pickle.dumps(some_metadata())
    before = read_plain_metadata(content, ["w"])["w"]
    with pytest.raises(FailedPreconditionError):
        read_plain_metadata(_unpickled_by_parts((None, {"__hash__": None, "__eq__": 7, "kind": "Metadata"})), ["w"])
    after = read_plain_metadata(content, ["w"])["w"]
    assert before is not None
    assert after is not None
    assert said(before) == said(after)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        pickle.dumps({"a": 1}),
        pickle.dumps(some_metadata())[:-20],
        pickle.dumps(os.getcwd),
        b"\x80\x02}Q.",
    ],
    ids=range(6),
)
def test_damaged_files_and_other_pickles_are_refused(content: bytes) -> None:
    """A typed error, whatever pickle raises."""
    with pytest.raises(FailedPreconditionError) as caught:
        read_plain_metadata(content, ["w"])
    assert "UNSAFE_METADATA" == caught.value.reason


@pytest.mark.parametrize(
    ("attribute", "value"), [("offset", -1), ("length", 2**63), ("offset", "9"), ("offset", None), ("length", True)]
)
def test_sizes_that_cannot_be_are_refused(attribute: str, value: Any) -> None:
    """Whoever wrote them chooses no position in a file."""
    bad = some_metadata()
    (info,) = bad.storage_data.values()
    setattr(info, attribute, value)
    with pytest.raises(FailedPreconditionError):
        read_plain_metadata(pickle.dumps(bad), ["w"])


def test_bytes_entries_are_told() -> None:
    """They have no chunks to read."""
    found = read_plain_metadata(pickle.dumps(some_metadata()), ["b", "none"])
    assert found["b"] is not None
    assert not found["b"].is_tensor
    assert found["none"] is None
