"""torch's ``Metadata`` -> columns -> payloads -> ``Metadata`` is exact; what has no exact form is refused by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
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

from shardbook.core.structure import RankPlan
from shardbook.core.table import TensorTable
from shardbook.dcp import slices
from shardbook.dcp.metadata import build_metadata
from shardbook.errors import UnsupportedMetadataError
from tests.torch.equality import differences
from tests.unit.strategies_metadata import DTYPES, any_metadata, stored_columns


def through_payloads(metadata: Metadata) -> Metadata:
    """Sends ``metadata`` through every stored format, and builds it anew."""
    structure, located, header = stored_columns(metadata)
    return build_metadata(structure, located, "", header)


class TestExact:
    """What goes in comes out."""

    @given(any_metadata())
    def test_any_metadata_comes_back_equal(self, metadata: Metadata) -> None:
        """Types, values, attributes, hints, key order and chunk order survive every stored format."""
        assert [] == differences(metadata, through_payloads(metadata))

    @given(any_metadata(), st.integers(1, 3), st.integers(1, 3))
    def test_slicing_is_not_seen(self, metadata: Metadata, chunk_count: int, entry_count: int) -> None:
        """Where an import is cut into slices changes nothing."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slices, "SLICE_CHUNKS", chunk_count)
            patch.setattr(slices, "SLICE_ENTRIES", entry_count)
            assert [] == differences(metadata, through_payloads(metadata))

    @given(any_metadata(), st.integers(1, 3))
    def test_how_much_is_made_at_a_time_is_not_seen(self, metadata: Metadata, page_chunks: int) -> None:
        """Where the chunks of which objects are made are cut into pages changes nothing."""
        structure, located, header = stored_columns(metadata)
        assert [] == differences(metadata, build_metadata(structure, located, "", header, page_chunks=page_chunks))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype(self, dtype: str) -> None:
        """Every dtype of this torch has a code."""
        metadata = _one_tensor()
        metadata.state_dict_metadata["w"].properties.dtype = getattr(torch, dtype.removeprefix("torch."))  # type: ignore[union-attr]
        assert [] == differences(metadata, through_payloads(metadata))

    def test_what_dcp_itself_writes(self, tmp_path: Path) -> None:
        """A checkpoint by torch's own save, as its reader sees it."""
        state = {"a": torch.arange(6.0).reshape(2, 3), "n": {"lr": 0.1, "l": [torch.ones(()), {"deep": 3}]}}
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(state, checkpoint_id=tmp_path)
        metadata = dcp.FileSystemReader(tmp_path).read_metadata()
        assert [] == differences(metadata, through_payloads(metadata))

    def test_chunks_are_objects_of_their_own(self) -> None:
        """Planners edit chunks in place, so no two share an object; sizes cannot be edited and may be shared."""
        metadata = through_payloads(_one_tensor())
        first, second = metadata.state_dict_metadata["w"].chunks  # type: ignore[union-attr]
        assert first is not second

    def test_the_garbage_collector_is_left_as_it_was(self) -> None:
        """Building pauses it, whatever happens."""
        import gc

        through_payloads(_one_tensor())
        assert gc.isenabled()


def _one_tensor() -> Metadata:
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16),
        torch.Size((4, 3)),
        [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 3))) for row in (0, 2)],
    )
    storage = {
        MetadataIndex("w", chunk.offsets, at): _StorageInfo("__0_0.distcp", 10 * at, 10)
        for at, chunk in enumerate(entry.chunks)
    }
    return Metadata({"w": entry}, planner_data={"w": ("w",)}, storage_data=storage, storage_meta=StorageMeta())


class _Str(str):
    __slots__ = ()


def _entry(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["w"]


def _info(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


_REFUSED: dict[str, Callable[[Any], object]] = {
    "a name that is no plain str": lambda m: m.state_dict_metadata.update({_Str("v"): BytesStorageMetadata()}),
    "an entry of another class": lambda m: m.state_dict_metadata.update(v=object()),
    "an entry with another attribute": lambda m: setattr(_entry(m), "extra", 1),
    "properties with another attribute": lambda m: setattr(_entry(m).properties, "extra", 1),
    "a flag that is no bool": lambda m: setattr(_entry(m).properties, "requires_grad", 1),
    "a dtype that is none": lambda m: setattr(_entry(m).properties, "dtype", "float32"),
    "a size that is a tuple": lambda m: setattr(_entry(m), "size", (4, 3)),
    "chunks that are a tuple": lambda m: setattr(_entry(m), "chunks", tuple(_entry(m).chunks)),
    "offsets that are a list": lambda m: setattr(_entry(m).chunks[0], "offsets", [0, 0]),
    "a chunk of other dimensions": lambda m: setattr(_entry(m).chunks[0], "sizes", torch.Size((2,))),
    "two chunks in one place": lambda m: _entry(m).chunks.append(_entry(m).chunks[0]),
    "a chunk without extent": lambda m: m.storage_data.popitem(),
    "an extent without chunk": lambda m: m.storage_data.update({MetadataIndex("x"): _StorageInfo("f", 0, 1)}),
    "storage data of another class": lambda m: m.storage_data.update({MetadataIndex("w", (0, 0)): object()}),
    "storage data with another attribute": lambda m: setattr(_info(m), "extra", 1),
    "transforms that are a tuple": lambda m: setattr(_info(m), "transform_descriptors", ("a",)),
    "a path that leaves the checkpoint": lambda m: setattr(_info(m), "relative_path", "../other/f"),
    "an absolute path": lambda m: setattr(_info(m), "relative_path", "/etc/passwd"),
    "a negative start": lambda m: setattr(_info(m), "offset", -1),
    "a length of 2**63": lambda m: setattr(_info(m), "length", 2**63),
    "planner data of another class": lambda m: setattr(m, "planner_data", [("w",)]),
    "a path of planner data with a float": lambda m: m.planner_data.update(w=(1.5,)),
    "a path of planner data with a bool": lambda m: m.planner_data.update(w=(True,)),
    "planner data that is an OrderedDict": lambda m: setattr(m, "planner_data", OrderedDict(m.planner_data)),
    "another attribute": lambda m: setattr(m, "extra", 1),
    "a version that is a number": lambda m: setattr(m, "version", 1),
    "a checkpoint id that is bytes": lambda m: setattr(m.storage_meta, "checkpoint_id", b"x"),
    "modules that are a tuple": lambda m: setattr(m.storage_meta, "modules", ("x",)),
}


class TestRefused:
    """What would come out changed does not go in."""

    @pytest.mark.parametrize("what", _REFUSED)
    def test_what_has_no_exact_form_is_refused(self, what: str) -> None:
        """Nothing comes back slightly different: it is refused, by type and name."""
        metadata = _one_tensor()
        _REFUSED[what](metadata)
        with pytest.raises(UnsupportedMetadataError) as caught:
            slices.slice_metadata(metadata)
        assert "UNSUPPORTED_METADATA" == caught.value.reason

    def test_the_message_names_type_and_fqn(self) -> None:
        """A person can find the culprit."""
        metadata = _one_tensor()
        metadata.state_dict_metadata["w"].chunks[0].offsets = [0, 0]  # type: ignore[union-attr]
        with pytest.raises(UnsupportedMetadataError, match=r"'w' is a builtins\.list") as caught:
            slices.slice_metadata(metadata)
        assert {"fqn": "w", "type": "builtins.list"} == caught.value.metadata


def test_columns_of_a_table_and_plan_are_typed() -> None:
    """A slice is made of the same columns as a rank's registration."""
    one = slices.slice_metadata(_one_tensor()).slices[0]
    assert (TensorTable, RankPlan) == (type(one.structure.plan.table), type(one.structure.plan))
