"""safetensors files: their header, which says where every tensor lies, and writing one.

By hand, since the ``safetensors`` package reads whole files of this machine and no ranges; the tests compare with it.
The format: eight bytes with the header's length, little-endian; the header, a JSON object of names; the data, which
is little-endian and row-major.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shardbook.errors import InvalidArgumentError
from shardbook.reading.dtypes import from_safetensors, to_safetensors
from shardbook.reading.stored import Array, StoredTensor, row_major
from shardbook.reading.window import Window

_LENGTH: Final = struct.Struct("<Q")
#: What the format itself allows.
_MAX_HEADER_BYTES: Final = 100_000_000
#: The header's entry that is no tensor, and where torch's Hugging Face writer keeps a chunk's place in its tensor.
_METADATA: Final = "__metadata__"
_SHARDING: Final = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor, or a chunk of one, in a safetensors file.

    Attributes:
        dtype: torch's name.
        shape: Elements.
        start: First byte, counted from the beginning of the file.
        size_bytes: Bytes.
        offsets: Of the chunk in its tensor, elements; zeros where the file does not say.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int
    offsets: tuple[int, ...]


def is_safetensors(beginning: bytes) -> bool:
    """Returns True when an item that begins with these bytes, at least nine, is a safetensors file."""
    return len(beginning) > _LENGTH.size and beginning[_LENGTH.size] == ord("{")


def read_header(window: Window) -> dict[str, HeaderEntry]:
    """Returns the tensors of a file by name.

    Raises:
        CorruptDataError: The header is damaged, or says what cannot be.
    """
    (length,) = _LENGTH.unpack(window.read(0, _LENGTH.size))
    if length > min(_MAX_HEADER_BYTES, window.size):
        raise window.corrupt("its safetensors header is too long")
    content = bytes(window.read(_LENGTH.size, length))
    try:
        fields = json.loads(content)
        extra = fields.pop(_METADATA, None) or {}
        sharding = json.loads(extra[_SHARDING]) if _SHARDING in extra else {}
        first = _LENGTH.size + length
        found = {name: _entry(field, sharding.get(name), first) for name, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise window.corrupt(f"its safetensors header is damaged ({error})") from error
    if any(entry.start + entry.size_bytes > window.size for entry in found.values()):
        raise window.corrupt("it ends before its tensors do")
    return found


def stored_tensor(
    window: Window, entry: HeaderEntry | None, fqn: str, shape: tuple[int, ...], dtype: str
) -> StoredTensor:
    """Returns where a file has a tensor.

    Args:
        window: The file.
        entry: What its header says of the tensor.
        fqn: Name of the tensor.
        shape: What the checkpoint's metadata says of the chunk, elements.
        dtype: torch's name, likewise.

    Raises:
        CorruptDataError: It holds no such tensor, or another one.
    """
    if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
        found = "nothing" if entry is None else f"{entry.dtype} of {list(entry.shape)}"
        raise window.corrupt(f"it holds {found} as {fqn!a}, the checkpoint's metadata says {dtype} of {list(shape)}")
    return StoredTensor(entry.start, entry.size_bytes, 0, row_major(shape))


def safetensors_blocks(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Returns the content of a safetensors file in blocks.

    Args:
        tensors: By name, in this machine's byte order.
        metadata: What the header says besides.

    Raises:
        InvalidArgumentError: Reason ``UNSUPPORTED_DTYPE``: the format lacks a tensor's dtype; or ``UNSUPPORTED_FQN``:
            a name is no Unicode. Before the first block.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        code = to_safetensors(tensor.dtype.name)
        if code is None:
            raise InvalidArgumentError(
                f"{name!a} is {tensor.dtype.name}, which safetensors files cannot hold: write .npy",
                reason="UNSUPPORTED_DTYPE",
                field="fqn",
            )
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": (at, at + tensor.nbytes)}
        at += tensor.nbytes
    try:
        packed = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"a name is no Unicode, which safetensors files need: {error.object!a:.80}",
            reason="UNSUPPORTED_FQN",
            field="fqn",
        ) from error
    packed += b" " * (-len(packed) % 8)
    return _blocks(packed, tensors)


def _blocks(header: bytes, tensors: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    yield _LENGTH.pack(len(header)) + header
    for tensor in tensors.values():
        if tensor.size:
            plain = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
            if sys.byteorder == "big":
                plain = plain.reshape(tensor.size, -1)[:, ::-1].reshape(-1)
            yield plain.data


def _entry(field: dict[str, Any], sharding: dict[str, Any] | None, first: int) -> HeaderEntry:
    shape = _sizes(field["shape"])
    begin, end = _sizes(field["data_offsets"])
    offsets = (0,) * len(shape) if sharding is None else _sizes(sharding["saved_offsets"])
    if end < begin or len(offsets) != len(shape):
        raise ValueError("impossible offsets")
    dtype = from_safetensors(field["dtype"]) or f"safetensors' {field['dtype']}"
    return HeaderEntry(dtype, shape, first + begin, end - begin, offsets)


def _sizes(values: list[int]) -> tuple[int, ...]:
    sizes = tuple(values)
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes) or math.prod(sizes) >= 1 << 62:
        raise ValueError("impossible sizes")
    return sizes


__all__ = ["HeaderEntry", "is_safetensors", "read_header", "safetensors_blocks", "stored_tensor"]
