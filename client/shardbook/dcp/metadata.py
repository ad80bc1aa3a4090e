"""Columns of a checkpoint as torch's ``Metadata``, object by object and exactly as DCP would have made it.

This is what a loader waits for, so objects are made by C loops over whole columns, without their ``__init__`` (which
would only repeat the assignments) and with the garbage collector paused: none of them is garbage, and collecting
while a million of them grow is most of what unpickling ``.metadata`` costs.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardbook.core.checkpoint import CheckpointStructure, RankFiles
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.extents import ATTRIBUTE_NULL_TRANSFORMS, HINT_NONE, HINT_POSITION
from shardbook.core.found import FoundChunks
from shardbook.core.head import MetadataHeader
from shardbook.core.locate import Located, pages_of
from shardbook.core.table import EntryKind
from shardbook.dcp._names import dtype_of, layout_of, memory_format_of
from shardbook.dcp._torch import StorageInfo
from shardbook.dcp.headers import storage_meta_of

#: Objects of a class share the names of their attributes when one that had them was there before: with a dict each,
#: those that are made by thousands before any has an attribute would take three times the memory.
_FIRST: Final = (
    ChunkStorageMetadata(offsets=torch.Size(), sizes=torch.Size()),
    MetadataIndex("", torch.Size(), 0),
    StorageInfo("", 0, 0),
)
#: Chunks of which objects are made at a time.
_PAGE_CHUNKS: Final = 1 << 16


@contextmanager
def paused_gc() -> Iterator[None]:
    """Pauses the cyclic garbage collector; nested and concurrent uses resume it when the last one ends at latest."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def build_metadata(
    structure: CheckpointStructure,
    located: Located,
    prefix: str,
    header: MetadataHeader,
    *,
    page_chunks: int = _PAGE_CHUNKS,
) -> Metadata:
    """Returns torch's metadata of a checkpoint.

    Args:
        structure: Entries and chunks.
        located: Where they lie.
        prefix: Directory of the data files, relative to the checkpoint's; empty when they lie in it.
        header: What belongs to the whole.
        page_chunks: Chunks of which objects are made at a time, about: what it takes beside the objects themselves.

    Raises:
        UnsupportedMetadataError: A dtype or layout that this torch lacks.
    """
    entries: dict[str, STORAGE_TYPES] = {}
    storage: dict[MetadataIndex, StorageInfo] = {}
    with paused_gc():
        names, number = _paths(structure, prefix) if header.has_storage_data else ([], structure.file)
        for rows, part, places in pages_of(structure, located, page_chunks):
            offsets = _sizes(part.offsets, part)
            entries.update(_entries(part, places, offsets))
            if header.has_storage_data:
                storage.update(_storage(part, places, map(names.__getitem__, number[rows].tolist()), offsets))
        fields: dict[str, Any] = {
            "state_dict_metadata": entries,
            "planner_data": None if structure.key_paths is None else dict(structure.key_paths),
            "storage_data": storage if header.has_storage_data else None,
            "storage_meta": storage_meta_of(header.storage_meta),
            "version": header.version,
        }
        metadata = Metadata.__new__(Metadata)
        for name in header.attributes:
            setattr(metadata, name, fields[name])
    return metadata


def found_entries(found: FoundChunks) -> tuple[dict[str, STORAGE_TYPES], dict[MetadataIndex, StorageInfo]]:
    """Returns torch's metadata of the entries that were wanted whole and found, and of all of their chunks.

    Raises:
        UnsupportedMetadataError: A dtype or layout that this torch lacks.
    """
    structure, located = _as_columns(found)
    with paused_gc():
        offsets = _sizes(structure.offsets, structure)
        paths = map(found.paths.__getitem__, found.file.tolist())
        return _entries(structure, located, offsets), _storage(structure, located, paths, offsets)


def _as_columns(found: FoundChunks) -> tuple[CheckpointStructure, Located]:
    held = np.flatnonzero(found.found)
    none = np.zeros(len(found.tensor), dtype=np.int64)
    structure = CheckpointStructure(
        fqns=tuple(found.wanted.fqns[at] for at in held.tolist()),
        kinds=found.kinds[held],
        dtypes=found.dtypes[held],
        layouts=found.layouts[held],
        memory_formats=found.memory_formats[held],
        ndims=found.ndims[held],
        shapes=found.shapes[held],
        winner_entry=np.zeros(len(held), dtype=np.int64),
        chunk_counts=np.diff(found.firsts)[held],
        offsets=found.offsets,
        sizes=found.sizes,
        owner=none,
        position=none,
        file=none,
        base=none,
        var_lo=none,
        var_hi=none,
        length=none,
        key_paths=None,
        rank_files=RankFiles((), none[:0]),
    )
    located = Located(
        start=found.start,
        length=found.length,
        transforms=found.transforms,
        transform_index=found.transform_index,
        hints=found.hints,
        attributes=found.attributes,
        checksum=found.checksum,
        requires_grad=found.requires_grad[held],
        pin_memory=found.pin_memory[held],
    )
    return structure, located


def _sizes(matrix: Int64Array, structure: CheckpointStructure) -> list[torch.Size]:
    """(N,) one ``torch.Size`` a chunk, cut to the entry's own dimensions; equal neighbours share one object."""
    return sizes_of(matrix, np.repeat(structure.ndims, structure.chunk_counts))


def sizes_of(matrix: Int64Array, ndims: Int64Array) -> list[torch.Size]:
    """Returns one ``torch.Size`` a row of (N, D) integers, cut to its own dimensions; equal neighbours share one."""
    if len(ndims) == 0:
        return []
    same = np.concatenate([[False], (matrix[1:] == matrix[:-1]).all(1) & (ndims[1:] == ndims[:-1])])
    rows = np.flatnonzero(~same)
    cut = ndims[rows]
    distinct: list[torch.Size] = [torch.Size()] * len(rows)
    for ndim in set(cut.tolist()):
        at = np.flatnonzero(cut == ndim)
        made = map(torch.Size, matrix[rows[at], :ndim].tolist())
        if len(at) == len(rows):
            distinct = list(made)
        else:
            for place, size in zip(at.tolist(), made, strict=True):
                distinct[place] = size
    if len(rows) == len(ndims):
        return distinct
    return list(map(distinct.__getitem__, (np.cumsum(~same) - 1).tolist()))


def run(calls: Iterable[object]) -> None:
    """Exhausts a ``map`` at C speed."""
    deque(calls, maxlen=0)


def _entries(structure: CheckpointStructure, located: Located, offsets: list[torch.Size]) -> dict[str, STORAGE_TYPES]:
    sizes = _sizes(structure.sizes, structure)
    chunks = list(map(ChunkStorageMetadata.__new__, repeat(ChunkStorageMetadata, len(offsets))))
    run(map(setattr, chunks, repeat("offsets"), offsets))
    run(map(setattr, chunks, repeat("sizes"), sizes))
    entries: dict[str, STORAGE_TYPES] = {}
    firsts = structure.firsts.tolist()
    kinds, ndims, shapes = structure.kinds.tolist(), structure.ndims.tolist(), structure.shapes.tolist()
    for row, fqn in enumerate(structure.fqns):
        if kinds[row] == EntryKind.BYTES:
            entries[fqn] = BytesStorageMetadata()
        else:
            entries[fqn] = TensorStorageMetadata(
                properties=_properties(structure, located, row),
                size=torch.Size(shapes[row][: ndims[row]]),
                chunks=chunks[firsts[row] : firsts[row + 1]],
            )
    return entries


def _properties(structure: CheckpointStructure, located: Located, row: int) -> TensorProperties:
    fqn = structure.fqns[row]
    return TensorProperties(
        dtype=dtype_of(int(structure.dtypes[row]), fqn),
        layout=layout_of(int(structure.layouts[row]), fqn),
        requires_grad=bool(located.requires_grad[row]),
        memory_format=memory_format_of(int(structure.memory_formats[row]), fqn),
        pin_memory=bool(located.pin_memory[row]),
    )


def _storage(
    structure: CheckpointStructure, located: Located, paths: Iterable[str], offsets: list[torch.Size]
) -> dict[MetadataIndex, StorageInfo]:
    count = len(offsets)
    keys = _keys(structure, located, offsets)
    infos = list(map(StorageInfo.__new__, repeat(StorageInfo, count)))
    run(map(setattr, infos, repeat("relative_path"), paths))
    run(map(setattr, infos, repeat("offset"), located.start.tolist()))
    run(map(setattr, infos, repeat("length"), located.length.tolist()))
    set_transforms(infos, located)
    return dict(zip(keys, infos, strict=True))


def set_transforms(infos: list[StorageInfo], columns: Located | FoundChunks) -> None:
    """Gives each of N places its transform descriptors, where it has any or says that it has none."""
    for row in np.flatnonzero(columns.transform_index).tolist():
        infos[row].transform_descriptors = list(columns.transforms[int(columns.transform_index[row]) - 1])
    null = (columns.attributes & ATTRIBUTE_NULL_TRANSFORMS != 0) & (columns.transform_index == 0)
    for row in np.flatnonzero(null).tolist():
        infos[row].transform_descriptors = None


def _keys(structure: CheckpointStructure, located: Located, offsets: list[torch.Size]) -> list[MetadataIndex]:
    """(N,) lookup keys, with the attributes that ``MetadataIndex.__init__`` sets and in its order."""
    count = len(offsets)
    entry = np.repeat(np.arange(structure.entry_count), structure.chunk_counts)
    keys = list(map(MetadataIndex.__new__, repeat(MetadataIndex, count)))
    put = object.__setattr__  # the class is frozen
    run(map(put, keys, repeat("fqn"), map(structure.fqns.__getitem__, entry.tolist())))
    run(map(put, keys, repeat("index"), _hints(structure, located)))
    is_tensor = structure.kinds[entry] != EntryKind.BYTES
    if is_tensor.all():
        run(map(put, keys, repeat("offset"), offsets))
    else:
        for row in np.flatnonzero(is_tensor).tolist():
            put(keys[row], "offset", offsets[row])
    return keys


def _hints(structure: CheckpointStructure, located: Located) -> list[int | None]:
    """(N,) index hints: the position in the chunk list unless the writer said otherwise; None for bytes entries."""
    counts = structure.chunk_counts
    position = np.arange(len(located.hints)) - np.repeat(structure.firsts[:-1], counts)
    is_bytes: BoolArray = np.repeat(structure.kinds == EntryKind.BYTES, counts)
    hints: list[int | None] = np.where(located.hints == HINT_POSITION, position, located.hints - 2).tolist()
    none = (located.hints == HINT_NONE) | ((located.hints == HINT_POSITION) & is_bytes)
    for row in np.flatnonzero(none).tolist():
        hints[row] = None
    return hints


def _paths(structure: CheckpointStructure, prefix: str) -> tuple[list[str], Int64Array]:
    """Paths relative to the checkpoint, and (N,) which of them each chunk lies in."""
    file_counts = np.array([len(files) for files in structure.rank_files.distinct], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(file_counts[structure.rank_files.index])]).astype(np.int64)
    file = first[structure.owner] + structure.file
    used = np.bincount(file, minlength=int(first[-1])) > 0
    numbers = np.flatnonzero(used)
    ranks = np.searchsorted(first, numbers, side="right") - 1
    head = f"{prefix}/" if prefix else ""
    names = [
        head + structure.rank_files.path(rank, number)
        for rank, number in zip(ranks.tolist(), (numbers - first[ranks]).tolist(), strict=True)
    ]
    return names, (np.cumsum(used) - 1)[file]


@dataclass(frozen=True, eq=False)
class CheckpointColumns:
    """A checkpoint as columns, from the service or from a directory, and where its files are.

    Attributes:
        structure: Entries and chunks.
        located: Where they lie.
        prefix: Directory of the data files, relative to ``location``.
        location: Directory or URL.
        header: What belongs to the whole.
    """

    structure: CheckpointStructure
    located: Located
    prefix: str
    location: str
    header: MetadataHeader

    def to_torch(self) -> Metadata:
        """Returns the same as torch's ``Metadata``."""
        return build_metadata(self.structure, self.located, self.prefix, self.header)


__all__ = ["CheckpointColumns", "build_metadata", "found_entries", "paused_gc", "run", "set_transforms", "sizes_of"]
