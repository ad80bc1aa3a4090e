"""Any torch ``Metadata`` as consecutive slices that ``RecordCheckpoint`` takes, exactly.

An import has no ranks. Its entries are cut into slices in state-dict order, and the slices stand where ranks would
stand; files keep their literal names, key paths travel in the first slice, and what belongs to the whole travels in
the metadata header. ``shardbook.dcp.metadata`` turns the result back into an equal object.

Whatever is not exactly one of DCP's own classes, with exactly its own attributes, is refused by type and name: a
value that would come back slightly different is worse than one that is refused. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardbook.core import limits
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.extents import ATTRIBUTE_NULL_TRANSFORMS, HINT_NONE, HINT_POSITION, Extents
from shardbook.core.head import encode_metadata_header
from shardbook.core.structure import FileName, RankPlan, RankStructure
from shardbook.core.table import EntryKind, KeyPaths, TensorTable, printable
from shardbook.dcp._names import dtype_code, layout_code, memory_format_code, unsupported
from shardbook.dcp._torch import StorageInfo
from shardbook.dcp.headers import header_of
from shardbook.dcp.items import key_paths_of, pad
from shardbook.errors import InvalidArgumentError, UnsupportedMetadataError

#: Most chunks of one slice; keeps a slice's blobs far below the limits of one call.
SLICE_CHUNKS: Final = 1 << 16
#: Most entries of one slice.
SLICE_ENTRIES: Final = 1 << 14
#: File that the chunks of metadata without storage data are said to lie in; nobody reads it.
_NO_FILE: Final = FileName(False, "-")

_PROPERTIES: Final = frozenset(("dtype", "layout", "requires_grad", "memory_format", "pin_memory"))
_INFO: Final = frozenset(("relative_path", "offset", "length"))


@dataclass(frozen=True, eq=False)
class MetadataSlice:
    """Consecutive entries of a checkpoint, standing where a rank would stand.

    Attributes:
        structure: Its entries and chunks; everything is kept.
        extents: Where they lie.
        requires_grad: (E,) of its table's entries.
        pin_memory: (E,) of its table's entries.
    """

    structure: RankStructure
    extents: Extents
    requires_grad: BoolArray
    pin_memory: BoolArray


@dataclass(frozen=True, eq=False)
class SlicedMetadata:
    """A whole ``Metadata`` as columns.

    Attributes:
        slices: At least one, in state-dict order.
        header: What belongs to the whole, encoded for RecordCheckpointRequest.metadata_header.
    """

    slices: tuple[MetadataSlice, ...]
    header: bytes


@dataclass(eq=False)
class _Open:
    """The slice that is being filled."""

    fqns: list[str] = field(default_factory=list)
    codes: list[tuple[int, int, int, int]] = field(default_factory=list)
    shapes: list[Sequence[int]] = field(default_factory=list)
    flags: list[tuple[bool, bool]] = field(default_factory=list)
    entry: list[int] = field(default_factory=list)
    offsets: list[Sequence[int]] = field(default_factory=list)
    sizes: list[Sequence[int]] = field(default_factory=list)
    infos: list[StorageInfo | None] = field(default_factory=list)
    hints: list[int] = field(default_factory=list)


def slice_metadata(metadata: Metadata) -> SlicedMetadata:
    """Returns ``metadata`` as slices.

    Raises:
        UnsupportedMetadataError: Something has no exact wire form; type and fqn are named.
        InvalidArgumentError: A limit of ``shardbook.core.limits`` is passed.
    """
    header = header_of(metadata)
    key_paths = key_paths_of(getattr(metadata, "planner_data", None))
    storage = _storage_by_key(metadata)
    entries = metadata.state_dict_metadata
    if type(entries) is not dict:
        raise unsupported("state_dict_metadata", entries, "the value")
    slices: list[MetadataSlice] = []
    for filled in _fill(entries, storage):
        slices.append(_close(filled, None if slices else key_paths))
    if storage:
        index = next(iter(storage))
        raise UnsupportedMetadataError(
            f"storage_data knows {printable(index[0])!r} at {index[1]}, which state_dict_metadata does not",
            field="metadata",
        )
    return SlicedMetadata(tuple(slices), encode_metadata_header(header))


_Key = tuple[str, torch.Size | None]
_Stored = dict[_Key, tuple[MetadataIndex, StorageInfo]]


def _storage_by_key(metadata: Metadata) -> _Stored | None:
    """Extents by (fqn, offset); None without storage data. Entries are taken out as they are used."""
    data = getattr(metadata, "storage_data", None)
    if data is None:
        return None
    if type(data) is not dict:
        raise unsupported("storage_data", data, "the value")
    stored: _Stored = {}
    for index, info in data.items():
        if type(index) is not MetadataIndex or not index.__dict__.keys() <= {"fqn", "index", "offset"}:
            raise unsupported(str(getattr(index, "fqn", index)), index, "the key in storage_data")
        if type(index.fqn) is not str or type(index.offset) not in (torch.Size, type(None)):
            raise unsupported(str(index.fqn), index.offset, "the offset of a key in storage_data")
        if index.offset is None and "offset" in index.__dict__:
            raise UnsupportedMetadataError(
                f"the key of {printable(index.fqn)!r} in storage_data has an offset that is None", field="metadata"
            )
        if type(info) is not StorageInfo or not _INFO <= info.__dict__.keys() <= {*_INFO, "transform_descriptors"}:
            raise unsupported(index.fqn, info, "the storage data")
        stored[index.fqn, index.offset] = index, info
    return stored


def _fill(entries: Mapping[str, object], storage: _Stored | None) -> Iterator[_Open]:
    """Yields full slices; at least one, be it empty."""
    out = _Open()
    yielded = False
    for fqn, entry in entries.items():
        if type(fqn) is not str:
            raise unsupported(repr(fqn), fqn, "the name")
        if len(out.fqns) >= SLICE_ENTRIES or len(out.entry) >= SLICE_CHUNKS:
            yield out
            out, yielded = _Open(), True
        _add_entry(out, fqn, entry)
        if type(entry) is not TensorStorageMetadata:
            _add_chunk(out, fqn, (), (), storage, -1)
            continue
        seen: set[torch.Size] = set()
        for position, chunk in enumerate(entry.chunks):
            if len(out.entry) >= SLICE_CHUNKS:
                yield out
                out, yielded = _Open(), True
                _add_entry(out, fqn, entry)
            offsets, sizes = _box(fqn, entry, chunk)
            if offsets in seen:  # DCP has one storage entry for each (fqn, offset)
                raise UnsupportedMetadataError(
                    f"two chunks of {printable(fqn)!r} begin at {list(offsets)}", field="metadata"
                )
            seen.add(offsets)
            _add_chunk(out, fqn, offsets, sizes, storage, position)
    if out.fqns or not yielded:
        yield out


def _add_entry(out: _Open, fqn: str, entry: object) -> None:
    out.fqns.append(fqn)
    if type(entry) is BytesStorageMetadata and not entry.__dict__:
        out.codes.append((EntryKind.BYTES, 0, 0, 0))
        out.shapes.append(())
        out.flags.append((False, False))
        return
    if type(entry) is not TensorStorageMetadata or entry.__dict__.keys() != {"properties", "size", "chunks"}:
        raise unsupported(fqn, entry, "the entry")
    properties = entry.properties
    if type(properties) is not TensorProperties or properties.__dict__.keys() != _PROPERTIES:
        raise unsupported(fqn, properties, "the properties object")
    if type(entry.size) is not torch.Size:
        raise unsupported(fqn, entry.size, "the size")
    if type(entry.chunks) is not list:
        raise unsupported(fqn, entry.chunks, "the chunk list")
    for flag in (properties.requires_grad, properties.pin_memory):
        if type(flag) is not bool:
            raise unsupported(fqn, flag, "a flag in the properties")
    if not entry.chunks and (properties.requires_grad or properties.pin_memory):
        raise UnsupportedMetadataError(
            f"{printable(fqn)!r} has no chunk, but requires_grad or pin_memory", field="metadata"
        )
    out.codes.append(
        (
            EntryKind.SHARD,
            dtype_code(properties.dtype, fqn),
            layout_code(properties.layout, fqn),
            memory_format_code(properties.memory_format, fqn),
        )
    )
    out.shapes.append(entry.size)
    out.flags.append((properties.requires_grad, properties.pin_memory))


def _box(fqn: str, entry: TensorStorageMetadata, chunk: object) -> tuple[torch.Size, torch.Size]:
    if type(chunk) is not ChunkStorageMetadata or chunk.__dict__.keys() != {"offsets", "sizes"}:
        raise unsupported(fqn, chunk, "a chunk")
    for value in (chunk.offsets, chunk.sizes):
        if type(value) is not torch.Size:
            raise unsupported(fqn, value, "an offset or size of a chunk")
        if len(value) != len(entry.size):
            raise UnsupportedMetadataError(
                f"a chunk of {printable(fqn)!r} has other dimensions than it", field="metadata"
            )
    return chunk.offsets, chunk.sizes


def _add_chunk(
    out: _Open, fqn: str, offsets: Sequence[int], sizes: Sequence[int], storage: _Stored | None, position: int
) -> None:
    out.entry.append(len(out.fqns) - 1)
    out.offsets.append(offsets)
    out.sizes.append(sizes)
    if storage is None:
        out.infos.append(None)
        out.hints.append(HINT_POSITION)
        return
    is_bytes = position < 0
    found = storage.pop((fqn, None if is_bytes else torch.Size(offsets)), None)
    if found is None:
        raise UnsupportedMetadataError(
            f"storage_data does not say where {printable(fqn)!r} at {list(offsets)} lies", field="metadata"
        )
    index, info = found
    out.infos.append(_checked_info(fqn, info))
    out.hints.append(_hint(fqn, index.index, None if is_bytes else position))


def _checked_info(fqn: str, info: StorageInfo) -> StorageInfo:
    for value in (info.offset, info.length):
        if type(value) is not int or not 0 <= value <= limits.INT64_MAX:
            raise unsupported(fqn, value, f"a start or length ({value}) in storage_data")
    if type(info.relative_path) is not str:
        raise unsupported(fqn, info.relative_path, "the path")
    names = info.transform_descriptors
    if names is not None and (type(names) is not list or any(type(name) is not str for name in names)):
        raise unsupported(fqn, names, "the list of transform descriptors")
    return info


def _hint(fqn: str, hint: object, usual: int | None) -> int:
    if hint == usual and type(hint) is type(usual):
        return HINT_POSITION
    if hint is None:
        return HINT_NONE
    if type(hint) is not int or not 0 <= hint <= limits.INT64_MAX - 2:
        raise unsupported(fqn, hint, f"the index hint ({hint})")
    return hint + 2


def _close(out: _Open, key_paths: KeyPaths | None) -> MetadataSlice:
    codes = np.array(out.codes, dtype=np.uint8).reshape(-1, 4).T
    ndims, shapes = pad(out.shapes)
    table = TensorTable(tuple(out.fqns), codes[0], codes[1], codes[2], codes[3], ndims, shapes, key_paths)
    entry = np.array(out.entry, dtype=np.int64)
    plan = RankPlan(table, entry, *_boxes(out, ndims[entry], shapes.shape[1]))
    structure, extents = _lie(plan, out)
    flags = np.array(out.flags, dtype=np.bool_).reshape(-1, 2).T
    return MetadataSlice(structure, extents, flags[0], flags[1])


def _boxes(out: _Open, ndims: Int64Array, width: int) -> tuple[Int64Array, Int64Array]:
    offsets = np.zeros((len(ndims), width), dtype=np.int64)
    sizes = np.ones((len(ndims), width), dtype=np.int64)
    real = np.arange(width) < ndims[:, None]
    try:
        offsets[real] = np.array([value for box in out.offsets for value in box], dtype=np.int64)
        sizes[real] = np.array([value for box in out.sizes for value in box], dtype=np.int64)
    except OverflowError:
        raise InvalidArgumentError("an offset or size is 2**63 or more", field="metadata") from None
    return offsets, sizes


def _lie(plan: RankPlan, out: _Open) -> tuple[RankStructure, Extents]:
    """A slice sees parts of files only, so starts and lengths are explicit."""
    kept = np.arange(plan.item_count, dtype=np.int64)
    infos = [info for info in out.infos if info is not None]
    if len(infos) < len(out.infos):  # there is no storage data at all
        files = (_NO_FILE,) if len(kept) else ()
        counts = np.array([len(kept)] if len(kept) else [], dtype=np.int64)
        zeros = np.zeros(len(kept), dtype=np.int64)
        return RankStructure(plan, kept, files, counts, kept, zeros), Extents(lengths=zeros, starts=zeros)
    number: dict[str, int] = {}
    file = np.array([number.setdefault(info.relative_path, len(number)) for info in infos], dtype=np.int64)
    starts = np.array([info.offset for info in infos], dtype=np.int64)
    lengths = np.array([info.length for info in infos], dtype=np.int64)
    order = np.lexsort((kept, starts, file)).astype(np.int64)
    names = [info.transform_descriptors for info in infos]
    distinct: dict[tuple[str, ...], int] = {}
    index = np.array(
        [0 if one is None else 1 + distinct.setdefault(tuple(one), len(distinct)) for one in names], dtype=np.int64
    )
    attributes = np.array(
        [
            ATTRIBUTE_NULL_TRANSFORMS if one is None and "transform_descriptors" in info.__dict__ else 0
            for one, info in zip(names, infos, strict=True)
        ],
        dtype=np.int64,
    )
    hints = np.array(out.hints, dtype=np.int64)
    structure = RankStructure(
        plan,
        kept,
        tuple(_file_name(path) for path in number),
        np.bincount(file, minlength=len(number)).astype(np.int64),
        order,
        np.where(plan.variable | bool(distinct), 0, lengths).astype(np.int64),
    )
    return structure, Extents(
        lengths=lengths[order],
        starts=starts[order],
        transforms=tuple(distinct),
        transform_index=index[order] if distinct else None,
        hints=hints[order] if hints.any() else None,
        attributes=attributes[order] if attributes.any() else None,
    )


def _file_name(path: str) -> FileName:
    try:
        return FileName(False, path)
    except InvalidArgumentError as exc:
        raise UnsupportedMetadataError(
            f"storage_data names the file {printable(path)!r}, which is not below the checkpoint", field="metadata"
        ) from exc
