"""Directories of safetensors files, as torch's ``HuggingFaceStorageWriter`` and Hugging Face's tools leave them.

Their headers are all the metadata there is: names, dtypes, shapes, and in sharded files where each chunk lies in its
tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from shardbook._side_by_side import side_by_side
from shardbook.errors import CorruptDataError
from shardbook.reading.chunks import TensorChunks
from shardbook.reading.ranges import RangeReader
from shardbook.reading.safetensors_file import HeaderEntry, read_header
from shardbook.reading.window import Window

SUFFIX: Final = ".safetensors"


def read_folder(reader: RangeReader, names: Sequence[str], fqns: Iterable[str]) -> dict[str, TensorChunks | None]:
    """Returns entries of a directory by name; None for a name that it lacks.

    Args:
        reader: Reads the directory.
        names: Its safetensors files.
        fqns: What is wanted.

    Raises:
        CorruptDataError: A header is damaged, or chunks of one tensor disagree.
    """
    headers = side_by_side(lambda name: read_header(Window(reader, name, 0, reader.size(name))), names)
    by_file = dict(zip(names, headers, strict=True))
    return {fqn: _entry(fqn, {name: header[fqn] for name, header in by_file.items() if fqn in header}) for fqn in fqns}


def _entry(fqn: str, chunks: Mapping[str, HeaderEntry]) -> TensorChunks | None:
    if not chunks:
        return None
    entries = list(chunks.values())
    first = entries[0]
    if any(entry.dtype != first.dtype or len(entry.shape) != len(first.shape) for entry in entries):
        raise CorruptDataError(f"the files {', '.join(map(ascii, chunks))} disagree about {fqn!a}")
    ndim, count = len(first.shape), len(entries)
    offsets = np.array([entry.offsets for entry in entries], np.int64).reshape(count, ndim)
    sizes = np.array([entry.shape for entry in entries], np.int64).reshape(count, ndim)
    return TensorChunks(
        fqn=fqn,
        is_tensor=True,
        dtype=first.dtype,
        layout="strided",
        # Nobody wrote down how large the whole is: as far as its chunks reach.
        shape=tuple((offsets + sizes).max(0).tolist()),
        offsets=offsets,
        sizes=sizes,
        paths=tuple(chunks),
        file=np.arange(count, dtype=np.int64),
        start=np.zeros(count, np.int64),
        length=np.array([entry.size_bytes for entry in entries], np.int64),
        transforms=(),
        transform_index=np.zeros(count, np.int64),
    )


__all__ = ["SUFFIX", "read_folder"]
