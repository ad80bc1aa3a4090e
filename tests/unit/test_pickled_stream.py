"""DCP's ``.metadata``, written from columns: unpickled, it is what DCP would have written, whoever unpickles it."""

from __future__ import annotations

import io
import pickle
import pickletools
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from benchmarks.simulated import rank_structures
from benchmarks.workload import Workload
from shardbook.core import pickled_chunks
from shardbook.core.assembly import assemble
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.head import DCP_VERSION, MetadataHeader, default_header
from shardbook.core.locate import Located, locate
from shardbook.core.pickle_rows import START, STOP, framed, integers, rows, text, tuple_of
from shardbook.core.pickled_metadata import pickled_metadata
from shardbook.dcp.headers import plain_storage_meta
from shardbook.dcp.metadata import build_metadata
from shardbook.dcp.pickled import read_pickled_metadata
from shardbook.errors import UnsupportedMetadataError
from tests.torch.equality import differences
from tests.unit.strategies_metadata import DTYPES, LAYOUTS, any_metadata, stored_columns


def written(metadata: Metadata) -> bytes:
    """Returns the file that is written of the columns of ``metadata``."""
    structure, located, header = stored_columns(metadata)
    return b"".join(pickled_metadata(structure, located, "", header))


def is_picklable(metadata: Metadata) -> bool:
    """DCP has no encoding of one memory format."""
    entries = metadata.state_dict_metadata.values()
    tensors = (entry for entry in entries if isinstance(entry, TensorStorageMetadata))
    return all(entry.properties.memory_format is not torch.channels_last_3d for entry in tensors)


def one_tensor(**properties: Any) -> Metadata:
    """Metadata of a tensor of one chunk."""
    torch_properties = torch.distributed.checkpoint.metadata.TensorProperties(**properties)
    return Metadata({"w": TensorStorageMetadata(torch_properties, torch.Size([0]), [])}, storage_data={})


def simulated(workload: Workload) -> tuple[CheckpointStructure, Located]:
    """Returns the columns of a checkpoint of equal shards."""
    structures = list(rank_structures(workload))
    structure = assemble(structures, np.arange(len(structures)))
    return structure, locate(structure, [(encode_extents(Extents()), b"")] * len(structures))


class TestExact:
    """What pickle.load returns is what DCP's own file would have returned."""

    @given(any_metadata(), st.integers(1, 3) | st.just(8192), st.integers(1, 3) | st.just(4096))
    def test_any_metadata_is_written_as_dcp_writes_it(
        self, metadata: Metadata, block_chunks: int, block_entries: int
    ) -> None:
        """Types, values, attributes, hints, key order and chunk order, wherever blocks end; for three unpicklers."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pickled_chunks, "BLOCK_CHUNKS", block_chunks)
            patch.setattr(pickled_chunks, "BLOCK_ENTRIES", block_entries)
            if not is_picklable(metadata):
                with pytest.raises(RuntimeError):
                    pickle.dumps(metadata)
                with pytest.raises(UnsupportedMetadataError):
                    written(metadata)
                return
            content = written(metadata)
        expected = pickle.loads(pickle.dumps(metadata))
        assert [] == differences(expected, pickle.loads(content))
        assert [] == differences(expected, pickle._Unpickler(io.BytesIO(content)).load())
        if expected.storage_meta is None:
            expected.storage_meta = StorageMeta()  # as DCP's own reader does
        assert [] == differences(expected, read_pickled_metadata(io.BytesIO(content)))
        pickletools.dis(content, io.StringIO())  # raises where stack or memo are not what they should be

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype(self, dtype: str) -> None:
        """torch's own object."""
        metadata = one_tensor(dtype=getattr(torch, dtype.removeprefix("torch.")))
        assert [] == differences(metadata, pickle.loads(written(metadata)))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout(self, layout: str) -> None:
        """torch's own object."""
        metadata = one_tensor(dtype=torch.int8, layout=getattr(torch, layout.removeprefix("torch.")))
        assert [] == differences(metadata, pickle.loads(written(metadata)))

    @pytest.mark.parametrize("layout", ["row", "grid"])
    def test_many_shards(self, layout: Any) -> None:
        """More chunks than a block holds, in tensors that begin in one and end in the next."""
        structure, located = simulated(Workload(64, 210, 64, layout))
        header = default_header("/ckpt/step-1", "0102-a1")
        content = b"".join(pickled_metadata(structure, located, "0102-a1", header))
        built = build_metadata(structure, located, "0102-a1", header)
        assert [] == differences(built, pickle.loads(content))
        assert list(built.storage_data) == list(pickle.loads(content).storage_data)

    def test_objects_that_planners_edit_are_objects_of_their_own(self) -> None:
        """Chunks, properties and lists are not shared; sizes and names cannot be edited and may be."""
        metadata = one_tensor(dtype=torch.int8)
        metadata.state_dict_metadata["v"] = metadata.state_dict_metadata["w"]
        one, other = pickle.loads(written(metadata)).state_dict_metadata.values()
        assert one.properties is not other.properties
        assert one.chunks is not other.chunks

    def test_version_is_what_dcp_writes(self) -> None:
        """A new version of DCP's format is to be looked at, not to be copied."""
        assert CURRENT_DCP_VERSION == DCP_VERSION

    def test_a_writers_own_storage_meta_costs_nobody_the_file(self) -> None:
        """DCP's fields are kept, in DCP's class; what a subclass adds is not."""

        class OwnMeta(StorageMeta):
            extra = 1

        structure, located, header = stored_columns(one_tensor(dtype=torch.int8))
        header = replace(header, storage_meta=plain_storage_meta(OwnMeta("s3://b/c", "save", None, ["m"])))
        found = pickle.loads(b"".join(pickled_metadata(structure, located, "", header))).storage_meta
        assert [] == differences(StorageMeta("s3://b/c", "save", None, ["m"]), found)


_EDGES = [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**39 - 1, 2**39, 2**47 - 1, 2**47, 2**63 - 1]


class TestRows:
    """Columns of numbers, at every width that they may have."""

    @pytest.mark.parametrize("largest", [*_EDGES, -1, -(2**31), -(2**31) - 1, -(2**63)])
    @pytest.mark.parametrize("ndim", range(6))
    def test_numbers_come_back(self, largest: int, ndim: int) -> None:
        """A tuple of as many numbers as there are dimensions, the same form in all rows."""
        smaller = [0] if largest < 0 else [edge for edge in _EDGES if edge <= largest]
        matrix = np.array([[value] * ndim for value in (*smaller, largest)], dtype=np.int64)
        columns = [integers(matrix[:, dim]) for dim in range(ndim)]
        made = rows((*tuple_of(columns), b"0"), len(matrix))
        width = len(made) // len(matrix)
        found = [pickle.loads(START + made[at : at + width - 1] + STOP) for at in range(0, len(made), width)]
        assert list(map(tuple, matrix.tolist())) == found

    @given(st.text(st.characters() | st.sampled_from("\0\ud800\udfff"), max_size=300))
    def test_text_comes_back(self, value: str) -> None:
        """Short and long, lone surrogates too."""
        assert value == pickle.loads(START + framed((text(value), STOP)))


class TestRefused:
    """What the file cannot hold is refused before the first block."""

    @pytest.mark.parametrize("column", ["dtypes", "layouts", "memory_formats"])
    def test_codes_of_a_newer_release(self, column: str) -> None:
        """By name, with the fqn."""
        structure, located, header = stored_columns(one_tensor(dtype=torch.int8))
        changed: dict[str, Any] = {column: np.array([250], dtype=np.uint8)}
        newer = replace(structure, **changed)
        with pytest.raises(UnsupportedMetadataError, match=r"'w' has the .* code 250") as caught:
            pickled_metadata(newer, located, "", header)
        assert "w" == caught.value.metadata["fqn"]

    def test_unknown_attributes(self) -> None:
        """Of a header that a newer release wrote."""
        structure, located, _ = stored_columns(one_tensor(dtype=torch.int8))
        with pytest.raises(UnsupportedMetadataError, match="mesh"):
            pickled_metadata(structure, located, "", MetadataHeader(attributes=("state_dict_metadata", "mesh")))


class _Counting(io.RawIOBase):
    """A stream as object stores have it: no peek, and every read counts."""

    def __init__(self, content: bytes) -> None:
        self._stream = io.BytesIO(content)
        self.calls = 0

    def read(self, size: int = -1) -> bytes:
        self.calls += 1
        return self._stream.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        self.calls += 1
        return self._stream.readline(-1 if size is None else size)


class TestCost:
    """A stream of blocks, whatever the checkpoint's size."""

    def test_memory_is_a_block_and_no_object_stands_for_a_chunk(self) -> None:
        """256,000 chunks: the peak is far below the file, and below 16 bytes a chunk: the head of one Python object."""
        workload = Workload(256, 1000, 256)
        structure, located = simulated(workload)
        header = default_header("/ckpt/step-1", "0102-a1")
        tracemalloc.start()
        try:
            blocks = list(map(len, pickled_metadata(structure, located, "0102-a1", header)))
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert sum(blocks) > 80 * workload.chunk_count
        assert max(blocks) < 2 << 20
        assert peak_bytes < 16 * workload.chunk_count

    def test_it_is_read_frame_by_frame(self) -> None:
        """Three reads a block, not one an opcode: what a stream without peek costs."""
        structure, located = simulated(Workload(64, 210, 64))
        blocks = list(pickled_metadata(structure, located, "", MetadataHeader()))
        stream = _Counting(b"".join(blocks))
        assert isinstance(pickle.load(stream), Metadata)
        assert stream.calls <= 4 * len(blocks) + 4

    def test_blocks_are_whole_opcodes(self) -> None:
        """Each block but the first begins with its frame, and frames end where blocks do."""
        structure, located = simulated(Workload(64, 210, 64))
        blocks = list(pickled_metadata(structure, located, "", MetadataHeader()))
        assert _starts(blocks) == [at for op, _, at in pickletools.genops(b"".join(blocks)) if op.name == "FRAME"]


def _starts(blocks: Sequence[bytes]) -> list[int]:
    begins = np.cumsum([0, *map(len, blocks)])[:-1].tolist()
    return [len(START), *begins[1:]]
