"""torch's ``Metadata`` -> columns -> payloads -> ``Metadata`` is exact; what has no exact form is refused by name."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
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

from shardbook.core.assembly import assemble
from shardbook.core.blocks import decode_blocks, encode_blocks
from shardbook.core.extents import decode_segment, encode_extents, encode_segment, encode_volatile
from shardbook.core.head import decode_head, decode_metadata_header, encode_head
from shardbook.core.locate import locate
from shardbook.core.structure import RankPlan, decode_plan, decode_structure, encode_plan, encode_structure
from shardbook.core.table import TensorTable, decode_table, encode_table
from shardbook.dcp import slices
from shardbook.dcp.metadata import build_metadata
from shardbook.errors import UnsupportedMetadataError
from tests.torch.equality import differences

_DTYPES = sorted({str(v) for v in vars(torch).values() if isinstance(v, torch.dtype)})
_LAYOUTS = sorted({str(v) for v in vars(torch).values() if isinstance(v, torch.layout)})
_FORMATS = [torch.contiguous_format, torch.channels_last, torch.preserve_format, torch.channels_last_3d]


def through_payloads(metadata: Metadata) -> Metadata:
    """Sends ``metadata`` through every stored format, as the service does, and builds it anew."""
    sliced = slices.slice_metadata(metadata)
    structures = []
    registrations = []
    for one in sliced.slices:
        table = encode_table(one.structure.plan.table)
        plan = encode_plan(one.structure.plan, table.digest)
        structure = encode_structure(one.structure, plan.digest)
        decoded_table, _ = decode_table(table.payload)
        decoded_plan, _ = decode_plan(plan.payload, _only(table.digest, decoded_table))
        decoded, _ = decode_structure(structure.payload, _only(plan.digest, decoded_plan))
        structures.append(decoded)
        registrations.append((encode_extents(one.extents), encode_volatile(one.requires_grad, one.pin_memory)))
    assembled = assemble(structures, np.arange(len(structures)))
    head = decode_head(encode_head(assembled))
    blocks = decode_blocks([block.payload for block in encode_blocks(assembled)], head.rank_files)
    located = locate(blocks, decode_segment(encode_segment(registrations)))
    object.__setattr__(blocks, "key_paths", head.key_paths)
    return build_metadata(blocks, located, "", decode_metadata_header(sliced.header))


def _only(digest: bytes, value: Any) -> Any:
    return {digest: value}.__getitem__


_names = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "a\0b", "\ud800 lone", "ü.weight", "x" * 10_000, "a/../b", "\u202e"]),
)
_flags = st.booleans()


@st.composite
def _splits(draw: st.DrawFn, size: int) -> list[int]:
    """Sizes of consecutive pieces of a dimension, empty ones among them."""
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    edges = [0, *cuts, size]
    return [after - before for before, after in pairwise(edges)]


@st.composite
def _chunks(draw: st.DrawFn, shape: tuple[int, ...]) -> list[ChunkStorageMetadata]:
    """A tiling of a tensor, in any order; none twice."""
    if not shape:
        return [ChunkStorageMetadata(torch.Size(), torch.Size())]
    dim = draw(st.integers(0, len(shape) - 1))
    boxes = []
    at = 0
    for size in draw(_splits(shape[dim])):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = at, size
        # An empty piece begins where the next one does: DCP keeps one chunk a place.
        if size or at == shape[dim]:
            boxes.append((tuple(offsets), tuple(sizes)))
        at += size
    distinct = draw(st.permutations(sorted(set(boxes))))
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in distinct]


@st.composite
def _tensors(draw: st.DrawFn) -> TensorStorageMetadata:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    empty = 0 in shape and draw(_flags)
    chunks = [] if empty else draw(_chunks(shape))
    properties = TensorProperties(
        dtype=getattr(torch, draw(st.sampled_from(_DTYPES)).removeprefix("torch.")),
        layout=getattr(torch, draw(st.sampled_from(_LAYOUTS)).removeprefix("torch.")),
        requires_grad=bool(chunks) and draw(_flags),
        memory_format=draw(st.sampled_from(_FORMATS)),
        pin_memory=bool(chunks) and draw(_flags),
    )
    return TensorStorageMetadata(properties, torch.Size(shape), chunks)


@st.composite
def _infos(draw: st.DrawFn) -> _StorageInfo:
    info = _StorageInfo(
        draw(st.sampled_from(["__0_0.distcp", "__1_0.distcp", "deep/er/__12_3.distcp", "ü ", "a\nb"])),
        draw(st.integers(0, 2**40)),
        draw(st.integers(0, 2**40)),
        draw(st.sampled_from([None, ["stream.zstd/1"], ["b", "a"], []])),
    )
    # What pickle leaves out: attributes that are None.
    return pickle.loads(pickle.dumps(info)) if draw(_flags) else info


@st.composite
def _storage_metas(draw: st.DrawFn) -> StorageMeta:
    texts = st.none() | st.text(max_size=5) | st.just("\ud800")
    meta = StorageMeta(
        checkpoint_id=draw(texts | st.just(Path("/ckpt/step-1500"))),
        save_id=draw(texts),
        load_id=draw(texts),
        modules=draw(st.lists(st.text(max_size=3), max_size=2)),
    )
    if draw(_flags):
        del meta.modules
    return meta


@st.composite
def _metadata(draw: st.DrawFn) -> Metadata:
    fqns = draw(st.lists(_names, max_size=4, unique=True))
    entries: dict[str, Any] = {fqn: draw(st.one_of(_tensors(), st.builds(BytesStorageMetadata))) for fqn in fqns}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for fqn, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            storage[MetadataIndex(fqn, index=draw(st.none() | st.integers(0, 3)))] = draw(_infos())
            continue
        for position, chunk in enumerate(entry.chunks):
            hint = draw(st.sampled_from([position, position, None, 17]))
            storage.setdefault(MetadataIndex(fqn, chunk.offsets, hint), draw(_infos()))
    segments = st.text(max_size=4) | st.integers(-5, 2**40)
    paths = st.dictionaries(_names, st.lists(segments, max_size=3).map(tuple), max_size=3)
    metadata = Metadata(
        entries,
        planner_data=draw(st.none() | paths),
        storage_data=draw(st.sampled_from([storage, storage, None])),
        storage_meta=draw(st.none() | _storage_metas()),
        version=draw(st.none() | st.text(max_size=6)),
    )
    if draw(_flags):
        del metadata.version  # as in files by older releases of torch
    return metadata


class TestExact:
    """What goes in comes out."""

    @given(_metadata())
    def test_any_metadata_comes_back_equal(self, metadata: Metadata) -> None:
        """Types, values, attributes, hints, key order and chunk order survive every stored format."""
        assert [] == differences(metadata, through_payloads(metadata))

    @given(_metadata(), st.integers(1, 3), st.integers(1, 3))
    def test_slicing_is_not_seen(self, metadata: Metadata, chunk_count: int, entry_count: int) -> None:
        """Where an import is cut into slices changes nothing."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slices, "SLICE_CHUNKS", chunk_count)
            patch.setattr(slices, "SLICE_ENTRIES", entry_count)
            assert [] == differences(metadata, through_payloads(metadata))

    @pytest.mark.parametrize("dtype", _DTYPES)
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
