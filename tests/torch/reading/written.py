"""Data files and chunks as tests cut them, and what they should read as."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from shardbook.core.box import Box
from shardbook.reading.chunks import TensorChunks
from shardbook.reading.filling import Filler
from shardbook.reading.finding import WantedTensor
from shardbook.reading.ranges import Buffer, ByteRange, RangeReader, range_reader
from shardbook.reading.region import Region, select
from shardbook.reading.stored import Array
from tests.torch.layouts import bytes_of

#: Every dtype that becomes an array.
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.complex32, torch.complex64),
    *(torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    torch.float8_e8m0fnu,
)
#: Those that safetensors files cannot hold.
NOT_IN_SAFETENSORS = (torch.complex32, torch.complex128, torch.float8_e8m0fnu)


def noise(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Returns a tensor of arbitrary bits, NaNs with payloads included."""
    count = int(np.prod(shape)) * dtype.itemsize
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype is torch.bool:
        bits %= 2
    return bits.view(dtype).reshape(tuple(shape))


def same_bits(expected: torch.Tensor, actual: Array) -> bool:
    """Returns True for the same shape, dtype and bits."""
    # A copy: of a dimension of one element torch keeps any stride, and calls it contiguous.
    plain = expected.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    name = str(plain.dtype).removeprefix("torch.")
    return (tuple(plain.shape), name, bytes_of(plain)) == (actual.shape, actual.dtype.name, actual.tobytes())


def saved(tensor: torch.Tensor, **options: Any) -> bytes:
    """Returns what ``torch.save`` writes of a tensor."""
    stream = io.BytesIO()
    torch.save(tensor, stream, **options)
    return stream.getvalue()


def in_safetensors(tensor: torch.Tensor, fqn: str = "w") -> bytes:
    """Returns a safetensors file of a tensor."""
    return safetensors.torch.save({fqn: tensor.contiguous()})


def chunks_of_items(
    tensor: torch.Tensor,
    boxes: Sequence[Box],
    items: Sequence[bytes],
    path: Path,
    *,
    transforms: tuple[str, ...] = (),
    lengths: Sequence[int] | None = None,
) -> TensorChunks:
    """Writes items into one file, with bytes between them that belong to nobody, and returns where they are."""
    starts, content = [], b""
    for item in items:
        content += b"?" * 7
        starts.append(len(content))
        content += item
    path.write_bytes(content)
    count, ndim = len(boxes), tensor.ndim
    return TensorChunks(
        fqn="w",
        is_tensor=True,
        dtype=str(tensor.dtype).removeprefix("torch."),
        layout="strided",
        shape=tuple(tensor.shape),
        offsets=np.array([box.offsets for box in boxes], np.int64).reshape(count, ndim),
        sizes=np.array([box.sizes for box in boxes], np.int64).reshape(count, ndim),
        paths=(path.name,),
        file=np.zeros(count, np.int64),
        start=np.array(starts, np.int64),
        length=np.array([len(item) for item in items] if lengths is None else lengths, np.int64),
        transforms=(transforms,) if transforms else (),
        transform_index=np.full(count, bool(transforms), np.int64),
    )


def one_item(tensor: torch.Tensor, item: bytes, path: Path, **options: Any) -> TensorChunks:
    """The same of a tensor that is one chunk."""
    return chunks_of_items(tensor, [Box((0,) * tensor.ndim, tuple(tensor.shape))], [item], path, **options)


class CountingReader:
    """A reader that keeps what was asked of it."""

    def __init__(self, reader: RangeReader, *, is_distant: bool = False) -> None:
        self.asked: list[list[ByteRange]] = []
        self.is_distant = is_distant
        self._reader = reader

    def fetch(self, ranges: Sequence[ByteRange]) -> list[Buffer]:
        """Reads and counts."""
        self.asked.append(list(ranges))
        return self._reader.fetch(ranges)

    def fill(self, wanted: Sequence[tuple[ByteRange, memoryview]]) -> None:
        """Reads and counts."""
        self.asked.append([one for one, _ in wanted])
        self._reader.fill(wanted)

    def size(self, path: str) -> int:
        """Returns a file's size."""
        return self._reader.size(path)

    @property
    def read_bytes(self) -> int:
        """Bytes that were read."""
        return sum(one.length for ranges in self.asked for one in ranges)


def touched(asked: Sequence[Sequence[ByteRange]]) -> list[int]:
    """How many ranges each request had that had any."""
    return [len(ranges) for ranges in asked if ranges]


def filled(chunks: TensorChunks, folder: Path, region: Region = None, reader: RangeReader | None = None) -> Array:
    """Reads a region."""
    wanted = WantedTensor(chunks, select(region, chunks.shape))
    (array,) = Filler(range_reader(str(folder)) if reader is None else reader).fill([wanted])
    return array
