"""Writes arrays to a file of this machine: ``.safetensors`` or ``.npy``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

import numpy as np

from shardbook.errors import InvalidArgumentError, StorageError
from shardbook.reading.dtypes import is_plain
from shardbook.reading.safetensors_file import safetensors_blocks
from shardbook.reading.stored import Array

#: What the name of the file may end in.
SUFFIXES: Final = (".safetensors", ".npy")


def check_output(path: Path, tensor_count: int) -> None:
    """Raises InvalidArgumentError when so many tensors cannot be written to such a file."""
    if path.suffix not in SUFFIXES:
        raise InvalidArgumentError(f"{path} ends in neither {' nor '.join(SUFFIXES)}", field="output")
    if path.suffix == ".npy" and tensor_count != 1:
        raise InvalidArgumentError(
            f"{path} can hold one tensor, not {tensor_count}: write .safetensors", field="output"
        )


def write_arrays(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Writes arrays by name, in place of an older file; the file is there as a whole or not at all.

    Args:
        path: See ``check_output``.
        arrays: By name, which ``.npy`` files do not keep.
        metadata: What a safetensors file says besides.

    Raises:
        InvalidArgumentError: The format lacks a dtype (reason ``UNSUPPORTED_DTYPE``) or a name (``UNSUPPORTED_FQN``).
        StorageError: It cannot be written.
    """
    check_output(path, len(arrays))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            if path.suffix == ".npy":
                _write_npy(file, *arrays.items())
            else:
                file.writelines(safetensors_blocks(arrays, metadata))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_npy(file: IO[bytes], item: tuple[str, Array]) -> None:
    name, array = item
    if not is_plain(array.dtype):
        raise InvalidArgumentError(
            f"{name!a} is {array.dtype.name}, which .npy files cannot hold: write .safetensors",
            reason="UNSUPPORTED_DTYPE",
            field="fqn",
        )
    np.lib.format.write_array(file, array, allow_pickle=False)


__all__ = ["SUFFIXES", "check_output", "write_arrays"]
