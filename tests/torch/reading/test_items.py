"""Items of data files: every dtype, cut and strided in any way, as torch wrote them; and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._extension import ZStandard

from shardbook.core.box import Box
from shardbook.errors import CorruptDataError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook.reading import filling, torch_save, transforms
from shardbook.reading.ranges import range_reader
from tests.torch.reading.written import (
    DTYPES,
    NOT_IN_SAFETENSORS,
    CountingReader,
    chunks_of_items,
    filled,
    in_safetensors,
    noise,
    one_item,
    same_bits,
    saved,
    touched,
)
from tests.unit.test_pickled_metadata import Canary

# torch says it once a process, with the first complex32 tensor that it makes.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's directory."""
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (2, 3, 4)], ids=str)
def test_every_dtype_has_the_bits_that_torch_has(folder: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As ``torch.save`` writes it, and in a safetensors file; NaNs keep their payloads."""
    tensor = noise(shape, dtype)
    assert same_bits(tensor, filled(one_item(tensor, saved(tensor), folder / "a"), folder))
    if dtype not in NOT_IN_SAFETENSORS:
        # DCP says that such an item is as long as its values.
        chunks = one_item(tensor, in_safetensors(tensor), folder / "b", lengths=[tensor.nbytes])
        assert same_bits(tensor, filled(chunks, folder))


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Box], tuple[slice | int, ...]]:
    """A tensor, strided in any way, boxes that make it up, and a region."""
    shape = draw(st.lists(st.integers(0, 6), max_size=3))
    tensor = noise(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    boxes = [Box((0,) * tensor.ndim, tuple(tensor.shape))]
    for _ in range(draw(st.integers(0, 4)) if tensor.ndim else 0):
        boxes.sort(key=lambda box: draw(st.integers(0, 3)))
        box, dim = boxes.pop(), draw(st.integers(0, tensor.ndim - 1))
        at = draw(st.integers(0, box.sizes[dim]))
        first, second = list(box.sizes), list(box.sizes)
        first[dim], second[dim] = at, box.sizes[dim] - at
        moved = list(box.offsets)
        moved[dim] += at
        boxes += [Box(box.offsets, tuple(first)), Box(tuple(moved), tuple(second))]
    bound = st.none() | st.integers(-7, 7)
    region = []
    for size in tensor.shape:
        index: st.SearchStrategy[slice | int] = st.builds(slice, bound, bound)
        region.append(draw(index | st.integers(-size, size - 1)) if size else draw(index))
    return tensor, boxes, tuple(region)


@given(
    case=cut_tensors(), is_small=st.booleans(), is_distant=st.booleans(), in_flight=st.sampled_from([1, 4000, 1 << 20])
)
def test_any_region_of_any_cut_is_what_torch_has(
    case: tuple[torch.Tensor, list[Box], tuple[slice | int, ...]], is_small: bool, is_distant: bool, in_flight: int
) -> None:
    """Irregular chunks, memory that is not row-major, both ways to read an item, any number of batches."""
    tensor, boxes, region = case
    pieces = [tensor[tuple(slice(*pair) for pair in zip(box.offsets, box.ends, strict=True))] for box in boxes]
    # As DCP writes them: a view of a larger memory is cloned.
    items = [saved(one.clone() if one.untyped_storage().size() != one.nbytes else one) for one in pieces]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "SMALL_BYTES", filling.SMALL_BYTES if is_small else 0)
        patch.setattr(filling, "IN_FLIGHT_BYTES", in_flight)
        patch.setattr(torch_save, "HEAD_BYTES", 700)
        patch.setattr(torch_save, "TAIL_BYTES", 400)
        folder = Path(name)
        reader = CountingReader(range_reader(name), is_distant=is_distant)
        array = filled(chunks_of_items(tensor, boxes, items, folder / "data"), folder, region, reader)
    assert same_bits(tensor[region], array)
    assert array.flags.c_contiguous
    assert array.flags.writeable


def test_conjugates_and_negatives_are_resolved(folder: Path) -> None:
    """torch keeps them as a bit beside the memory."""
    tensor = noise((3, 4), torch.complex64)
    for lazy in (tensor.conj(), tensor.conj().imag, tensor.conj().t()):
        kept = lazy if lazy.untyped_storage().size() == lazy.nbytes else lazy.clone()
        assert same_bits(lazy, filled(one_item(kept, saved(kept), folder / "a"), folder))


def repacked(tensor: torch.Tensor, **records: bytes | None) -> bytes:
    """What ``torch.save`` writes, with other records: ``data``, ``byteorder``, ``pickle``; None leaves one out."""
    names = {"data": "archive/data/0", "byteorder": "archive/byteorder", "pickle": "archive/data.pkl"}
    changed = {names[name]: content for name, content in records.items()}
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = changed.get(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return out.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.int16, torch.bool], ids=str)
def test_a_big_endian_file_is_turned(folder: Path, dtype: torch.dtype) -> None:
    """As torch does, by the file's record; without one it is little-endian."""
    tensor = noise((4, 3), dtype)
    width = dtype.itemsize // (2 if dtype.is_complex else 1)
    swapped = np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().tobytes(), np.uint8).reshape(-1, width)[
        :, ::-1
    ]
    content = repacked(tensor, data=swapped.tobytes(), byteorder=b"big")
    assert same_bits(torch.load(io.BytesIO(content)), filled(one_item(tensor, content, folder / "a"), folder))
    assert same_bits(tensor, filled(one_item(tensor, content, folder / "a"), folder))
    assert same_bits(tensor, filled(one_item(tensor, repacked(tensor, byteorder=None), folder / "b"), folder))


def test_checksums_that_torch_left_out_are_not_missed(folder: Path) -> None:
    """Such archives are broken for other programs, and torch reads them."""
    tensor = noise((5,), torch.float32)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = saved(tensor)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same_bits(tensor, filled(one_item(tensor, content, folder / "a"), folder))


class TestCost:
    """Only what is needed is read."""

    @pytest.fixture
    def tensor(self) -> torch.Tensor:
        """Sixteen megabytes."""
        return noise((4096, 1024), torch.float32)

    def test_rows_cost_their_bytes(self, folder: Path, tensor: torch.Tensor) -> None:
        """The two ends of the item, and exactly the rows."""
        reader = CountingReader(range_reader(str(folder)))
        array = filled(one_item(tensor, saved(tensor), folder / "a"), folder, slice(2000, 2010), reader)
        assert same_bits(tensor[2000:2010], array)
        assert [2, 1] == touched(reader.asked)
        assert 10 * 4096 + 8192 == reader.read_bytes

    def test_rows_of_a_safetensors_file_cost_their_bytes(self, folder: Path, tensor: torch.Tensor) -> None:
        """The same, whatever the file has before and behind."""
        reader = CountingReader(range_reader(str(folder)))
        chunks = one_item(tensor, in_safetensors(tensor), folder / "a", lengths=[tensor.nbytes])
        assert same_bits(tensor[5, 7:9], filled(chunks, folder, (5, slice(7, 9)), reader))
        assert reader.read_bytes < 10_000

    def test_a_whole_chunk_of_a_distant_store_is_one_range(self, folder: Path, tensor: torch.Tensor) -> None:
        """A second request would cost more than it spares."""
        reader = CountingReader(range_reader(str(folder)), is_distant=True)
        item = saved(tensor)
        assert same_bits(tensor, filled(one_item(tensor, item, folder / "a"), folder, None, reader))
        assert [[len(item)]] == [[one.length for one in ranges] for ranges in reader.asked if ranges]

    def test_a_whole_chunk_of_this_machine_is_read_into_its_place(self, folder: Path, tensor: torch.Tensor) -> None:
        """The ends, and the values with no copy between file and result; memory of another order takes one."""
        for one in (tensor, tensor.t()):
            reader = CountingReader(range_reader(str(folder)))
            assert same_bits(one, filled(one_item(one, saved(one), folder / "a"), folder, None, reader))
            assert [2, 1] == touched(reader.asked)
            assert tensor.nbytes + 8192 == reader.read_bytes

    def test_nothing_is_read_of_nothing(self, folder: Path, tensor: torch.Tensor) -> None:
        """An empty region needs no file."""
        reader = CountingReader(range_reader(str(folder)))
        assert (0, 1024) == filled(one_item(tensor, b"", folder / "a"), folder, slice(3, 3), reader).shape
        assert 0 == reader.read_bytes


class TestTransforms:
    """Items that a writer's extension compressed."""

    @staticmethod
    def compressed(content: bytes) -> bytes:
        """What DCP's own extension makes of it."""
        stream = io.BytesIO()
        stream.close = lambda: None  # type: ignore[method-assign]
        with ZStandard().transform_to(stream) as out:
            out.write(content)
        return stream.getvalue()

    def test_zstd_is_undone(self, folder: Path) -> None:
        """For a part, too."""
        tensor = noise((20, 30), torch.float32)
        item = self.compressed(saved(tensor))
        chunks = one_item(tensor, item, folder / "a", transforms=(ZStandard().get_descriptor(),))
        assert same_bits(tensor[3:5], filled(chunks, folder, slice(3, 5)))

    def test_another_transform_is_refused(self, folder: Path) -> None:
        """Before anything is read; the error names it."""
        chunks = one_item(torch.zeros(3), b"", folder / "a", transforms=("stream.rot13@here/1",))
        with pytest.raises(InvalidArgumentError, match="rot13") as caught:
            filled(chunks, folder)
        assert "UNSUPPORTED_TRANSFORM" == caught.value.reason

    def test_a_bomb_does_not_go_off(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing inflates to much more than the values."""
        monkeypatch.setattr(transforms, "_ROOM_BYTES", 1000)
        item = self.compressed(bytes(10 << 20))
        chunks = one_item(torch.zeros(3), item, folder / "a", transforms=("stream.zstd/1",))
        with pytest.raises(CorruptDataError, match="inflates"):
            filled(chunks, folder)

    def test_a_damaged_stream_is_told(self, folder: Path) -> None:
        """With the file."""
        chunks = one_item(torch.zeros(3), b"junk" * 20, folder / "a", transforms=("stream.zstd/1",))
        with pytest.raises(CorruptDataError, match="damaged") as caught:
            filled(chunks, folder)
        assert "a" == caught.value.metadata["file"]


def tensor_pickle(tensor: torch.Tensor) -> bytes:
    """The description of a tensor in what ``torch.save`` writes."""
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as archive:
        return archive.read("archive/data.pkl")


class TestRefused:
    """What is no plain tensor, or damaged: a typed error, and nothing is executed."""

    def test_an_item_that_would_run_a_program(self, folder: Path, tmp_path: Path) -> None:
        """The canary's name is not looked up."""
        tensor = torch.zeros(3)
        content = repacked(tensor, pickle=pickle.dumps(Canary(tmp_path / "ran"), 2))
        with pytest.raises(FailedPreconditionError, match="mkdir") as caught:
            filled(one_item(tensor, content, folder / "a"), folder)
        assert "UNSAFE_ENTRY" == caught.value.reason
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: [1, 2],
            lambda: {"a": torch.zeros(3)},
            lambda: torch.zeros(3).to_sparse(),
            lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
            lambda: torch.nn.Linear(1, 1),
            lambda: os.getcwd,
        ],
        ids=["list", "dict", "sparse", "quantized", "module", "function"],
    )
    @pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
    def test_what_is_no_strided_tensor(self, folder: Path, make: Callable[[], Any]) -> None:
        """Whatever else torch can save."""
        with pytest.raises(FailedPreconditionError) as caught:
            filled(one_item(torch.zeros(3), saved(make()), folder / "a"), folder)
        assert "UNSAFE_ENTRY" == caught.value.reason

    @given(st.data())
    def test_arbitrary_damage(self, data: st.DataObject) -> None:
        """Of any byte: the values come out in the right shape, or a typed error does."""
        tensor = noise((3, 2), torch.float32)
        item = bytearray(saved(tensor) if data.draw(st.booleans()) else in_safetensors(tensor))
        length = len(item)
        for _ in range(data.draw(st.integers(1, 4))):
            item[data.draw(st.integers(0, len(item) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del item[data.draw(st.integers(0, len(item) - 1)) :]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            chunks = one_item(tensor, bytes(item), folder / "a", lengths=[length])
            try:
                array = filled(chunks, folder)
            except (CorruptDataError, FailedPreconditionError, InvalidArgumentError):
                return
        assert (3, 2) == array.shape

    @given(st.binary(max_size=40), st.integers(0, 200))
    def test_arbitrary_pickles(self, inserted: bytes, at: int) -> None:
        """Opcodes put into a tensor's description, anywhere."""
        tensor = noise((3, 2), torch.float32)
        good = tensor_pickle(tensor)
        content = repacked(tensor, pickle=good[:at] + inserted + good[at:])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                array = filled(one_item(tensor, content, folder / "a"), folder)
            except (CorruptDataError, FailedPreconditionError):
                return
        assert (3, 2) == array.shape

    def test_a_pickle_cannot_change_this_process(self, folder: Path) -> None:
        """What it writes into a name that it gets is gone with it."""
        tensor = noise((3,), torch.float32)
        named = b"ctorch._utils\n_rebuild_tensor_v2\n"
        good = tensor_pickle(tensor)
        state = pickle.dumps((None, {"__defaults__": (1, 2), "names": ("torch", "Size")}), 2)[2:-1]
        content = repacked(tensor, pickle=good[:2] + named + state + b"b0" + good[2:])
        assert same_bits(tensor, filled(one_item(tensor, content, folder / "a"), folder))
        assert same_bits(tensor, filled(one_item(tensor, saved(tensor), folder / "b"), folder))

    def test_another_tensor_than_the_metadata_says(self, folder: Path) -> None:
        """Shape and dtype are compared; the error names the file."""
        for other in (torch.zeros(4), torch.zeros(3, dtype=torch.int32)):
            with pytest.raises(CorruptDataError, match="metadata says") as caught:
                filled(one_item(torch.zeros(3), saved(other), folder / "a"), folder)
            assert {"file": "a", "offset": "7"} == caught.value.metadata

    def test_memory_that_is_too_short(self, folder: Path) -> None:
        """Values outside of it are never read."""
        tensor = torch.zeros(30)
        with pytest.raises(CorruptDataError, match="ends before"):
            filled(one_item(tensor, repacked(tensor, data=bytes(12)), folder / "a"), folder)

    def test_the_format_before_torch_1_6(self, folder: Path) -> None:
        """A pickle from end to end: named, not read."""
        tensor = torch.zeros(30)
        content = saved(tensor, _use_new_zipfile_serialization=False)
        with pytest.raises(InvalidArgumentError, match=r"1\.6") as caught:
            filled(one_item(tensor, content, folder / "a"), folder)
        assert "UNSUPPORTED_FORMAT" == caught.value.reason

    def test_a_compressed_archive(self, folder: Path) -> None:
        """torch does not write one, and does not read it by range."""
        out = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(saved(torch.zeros(99)))) as old,
            zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        with pytest.raises(InvalidArgumentError, match="compressed") as caught:
            filled(one_item(torch.zeros(99), out.getvalue(), folder / "a"), folder)
        assert "UNSUPPORTED_FORMAT" == caught.value.reason

    @pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "a//b", "x:y", "", "a\0b", ".."])
    def test_a_file_elsewhere(self, folder: Path, path: str) -> None:
        """Whoever wrote the metadata chooses no file outside of the checkpoint."""
        chunks = one_item(torch.zeros(3), saved(torch.zeros(3)), folder / "a")
        object.__setattr__(chunks, "paths", (path,))
        with pytest.raises(CorruptDataError, match="leaves"):
            filled(chunks, folder)

    def test_a_file_that_is_gone(self, folder: Path) -> None:
        """Named."""
        chunks = one_item(torch.zeros(3), b"", folder / "gone.distcp")
        (folder / "gone.distcp").unlink()
        with pytest.raises(NotFoundError, match=r"gone\.distcp") as caught:
            filled(chunks, folder)
        assert "NO_DATA_FILE" == caught.value.reason

    def test_a_file_that_ends_early(self, folder: Path) -> None:
        """No memory is taken for what the metadata claims."""
        chunks = one_item(torch.zeros(3), saved(torch.zeros(3)), folder / "a", lengths=[1 << 60])
        with pytest.raises(CorruptDataError, match="ends before"):
            filled(chunks, folder)

    def test_chunks_that_leave_cells_out(self, folder: Path) -> None:
        """Also where others are there twice."""
        tensor = torch.arange(6.0)
        box = Box((0,), (3,))
        for boxes in ([box], [box, box]):
            chunks = chunks_of_items(tensor, boxes, [saved(tensor[:3].clone())] * len(boxes), folder / "a")
            with pytest.raises(CorruptDataError, match="leave out 3"):
                filled(chunks, folder)
            assert same_bits(tensor[:3], filled(chunks, folder, slice(0, 3)))

    @pytest.mark.parametrize("dtype", ["qint8", "quint4x2", "float4_e2m1fn_x2", "int4", "bits8"])
    def test_a_dtype_that_numpy_lacks(self, folder: Path, dtype: str) -> None:
        """The way around it is named."""
        chunks = one_item(torch.zeros(3), b"", folder / "a")
        object.__setattr__(chunks, "dtype", dtype)
        with pytest.raises(InvalidArgumentError, match=r"shardbook\.dcp") as caught:
            filled(chunks, folder)
        assert "UNSUPPORTED_DTYPE" == caught.value.reason
