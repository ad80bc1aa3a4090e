"""safetensors files are what the format's own library reads and writes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from shardbook.errors import CorruptDataError, InvalidArgumentError
from shardbook.reading.files import write_arrays
from shardbook.reading.ranges import range_reader
from shardbook.reading.safetensors_file import read_header
from shardbook.reading.window import Window

_PLAIN = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32")


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of many dtypes and shapes."""
    made = {name: np.arange(6).astype(name).reshape(2, 3) for name in (*_PLAIN, "float64", "complex64")}
    return {**made, "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3)), "ü\0 ": np.arange(3).T[::-1]}


def header_of(path: Path) -> Any:
    """Returns the header of a file of this machine."""
    return read_header(Window(range_reader(str(path.parent)), path.name, 0, path.stat().st_size))


def test_its_own_library_reads_what_is_written(tmp_path: Path) -> None:
    """Names, shapes, values, and what the header says besides; nothing is left behind."""
    write_arrays(tmp_path / "x.safetensors", arrays(), {"format": "pt", "ref": "a/b@1"})
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert {"format": "pt", "ref": "a/b@1"} == file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    assert arrays().keys() == found.keys()
    for name, array in arrays().items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            found[name].dtype,
            found[name].shape,
            found[name].tobytes(),
        )
    assert ["x.safetensors"] == [path.name for path in tmp_path.iterdir()]


def test_headers_of_its_own_library_are_read(tmp_path: Path) -> None:
    """dtype, shape and place of every tensor."""
    path = tmp_path / "x.safetensors"
    plain = {name: np.ascontiguousarray(array) for name, array in arrays().items()}
    safetensors.numpy.save_file(plain, path, {"a": "b"})
    found, content = header_of(path), path.read_bytes()
    assert plain.keys() == found.keys()
    for name, array in plain.items():
        entry = found[name]
        assert (array.dtype.name, array.shape) == (entry.dtype, entry.shape)
        assert array.tobytes() == content[entry.start : entry.start + entry.size_bytes]


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff",
        json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}).encode(),
        json.dumps({"w": {"shape": [2], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"w": 3}).encode(),
        b"[" * 100_000,
    ],
    ids=range(9),
)
def test_damaged_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    """A typed error that names the file."""
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CorruptDataError) as caught:
        header_of(tmp_path / "x")
    assert "x" == caught.value.metadata["file"]


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    """Before memory is taken for it."""
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CorruptDataError, match="too long"):
        header_of(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "dtype", "suffix"),
    [("w", "complex128", ".safetensors"), ("\ud800", "float32", ".safetensors"), ("w", ml_dtypes.bfloat16, ".npy")],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, name: str, dtype: Any, suffix: str) -> None:
    """A typed error, and no file."""
    with pytest.raises(InvalidArgumentError) as caught:
        write_arrays(tmp_path / f"x{suffix}", {name: np.zeros(2, dtype)}, {})
    assert caught.value.reason in ("UNSUPPORTED_DTYPE", "UNSUPPORTED_FQN")
    assert [] == list(tmp_path.iterdir())
