"""torch's save plans and write results as columns: WriteItems -> RankPlan, WriteResults -> RankStructure, Extents.

One pass over torch's own objects, everything after it is numpy. Nothing is pickled; what has no exact column is
refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.extents import NO_CHECKSUM, Extents
from shardbook.core.structure import FileName, RankPlan, RankStructure
from shardbook.core.table import EntryKind, KeyPath, KeyPaths, TensorTable, printable
from shardbook.dcp._names import dtype_code, layout_code, memory_format_code, unsupported
from shardbook.dcp._torch import StorageInfo
from shardbook.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    UnsupportedMetadataError,
    UnsupportedWriterError,
)

_KINDS: Final = {
    WriteItemType.TENSOR: EntryKind.TENSOR,
    WriteItemType.SHARD: EntryKind.SHARD,
    WriteItemType.BYTE_IO: EntryKind.BYTES,
}


@dataclass(frozen=True, eq=False)
class PlannedItems:
    """A rank's local plan as columns.

    Attributes:
        plan: Its items, in order, before deduplication.
        requires_grad: (E,) of every entry of the table.
        pin_memory: (E,) of every entry of the table.
    """

    plan: RankPlan
    requires_grad: BoolArray
    pin_memory: BoolArray


def plan_columns(items: Sequence[WriteItem], planner_data: object) -> PlannedItems:
    """Returns the columns of a local plan.

    Args:
        items: As ``create_local_plan`` made them.
        planner_data: ``SavePlan.planner_data``: the state dict's key paths, or None.

    Raises:
        UnsupportedMetadataError: Something has no exact wire form; type and fqn are named.
        InvalidArgumentError: A limit of ``shardbook.core.limits`` is passed.
    """
    entry_of: dict[str, int] = {}
    first: list[WriteItem] = []
    entry: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    for item in items:
        fqn = item.index.fqn
        number = entry_of.setdefault(fqn, len(first))
        if number == len(first):
            first.append(_checked(item))
        data = item.tensor_data
        if data is not None:
            _check_box(item, data, first[number])
            offsets.extend(data.chunk.offsets)
            sizes.extend(data.chunk.sizes)
        elif first[number].type is not WriteItemType.BYTE_IO or item is not first[number]:
            raise UnsupportedMetadataError(f"{printable(fqn)!r} is planned twice", field="metadata")
        entry.append(number)
    table = _table(tuple(entry_of), first, key_paths_of(planner_data))
    entry_column = np.array(entry, dtype=np.int64)
    real = np.arange(table.shapes.shape[1]) < table.ndims[entry_column][:, None]
    plan = RankPlan(table, entry_column, _scatter(real, offsets, 0), _scatter(real, sizes, 1))
    requires_grad, pin_memory = _volatile(first)
    return PlannedItems(plan, requires_grad, pin_memory)


def _checked(item: WriteItem) -> WriteItem:
    fqn = item.index.fqn
    if not isinstance(fqn, str):
        raise unsupported(repr(fqn), fqn, "the name")
    if item.type not in _KINDS:
        raise unsupported(fqn, item.type, "the item type")
    if (item.tensor_data is None) != (item.type is WriteItemType.BYTE_IO):
        raise unsupported(fqn, item.tensor_data, f"the tensor data of a {item.type.name} item")
    return item


def _check_box(item: WriteItem, data: TensorWriteData, first: WriteItem) -> None:
    fqn = item.index.fqn
    chunk, size = data.chunk, data.size
    if len(chunk.offsets) != len(size) or len(chunk.sizes) != len(size):
        raise UnsupportedMetadataError(f"a chunk of {printable(fqn)!r} has other dimensions than it", field="metadata")
    if item.index.offset != chunk.offsets:
        raise UnsupportedMetadataError(f"a chunk of {printable(fqn)!r} is not where its index says", field="metadata")
    if item is first:
        return
    other = first.tensor_data
    if other is None or item.type is not first.type or item.type is WriteItemType.TENSOR:
        raise UnsupportedMetadataError(f"{printable(fqn)!r} is planned twice", field="metadata")
    if other.size != size or other.properties.dtype != data.properties.dtype:
        raise UnsupportedMetadataError(f"shards of {printable(fqn)!r} disagree on size or dtype", field="metadata")


def _table(fqns: tuple[str, ...], first: Sequence[WriteItem], key_paths: KeyPaths | None) -> TensorTable:
    count = len(first)
    codes = np.zeros((4, count), dtype=np.uint8)
    codes[0] = np.fromiter((_KINDS[item.type] for item in first), np.uint8, count)
    shapes: list[torch.Size] = []
    for row, (fqn, item) in enumerate(zip(fqns, first, strict=True)):
        data = item.tensor_data
        shapes.append(torch.Size() if data is None else data.size)
        if data is not None:
            codes[1, row] = dtype_code(data.properties.dtype, fqn)
            codes[2, row] = layout_code(data.properties.layout, fqn)
            codes[3, row] = memory_format_code(data.properties.memory_format, fqn)
    ndims, padded = pad(shapes)
    return TensorTable(fqns, codes[0], codes[1], codes[2], codes[3], ndims, padded, key_paths)


def pad(shapes: Sequence[Sequence[int]]) -> tuple[Int64Array, Int64Array]:
    """Returns (ndims (N,), sizes (N, D)) of ``shapes``, padded with 1 to the largest ndim D, at least 1."""
    ndims = np.fromiter(map(len, shapes), np.int64, len(shapes))
    real = np.arange(max(int(ndims.max(initial=0)), 1)) < ndims[:, None]
    return ndims, _scatter(real, [size for shape in shapes for size in shape], 1)


def _scatter(real: BoolArray, values: Sequence[int], fill: int) -> Int64Array:
    """(N, D) matrix with ``values``, row by row, where ``real`` and ``fill`` elsewhere."""
    matrix = np.full(real.shape, fill, dtype=np.int64)
    try:
        matrix[real] = np.array(values, dtype=np.int64)
    except OverflowError:
        raise InvalidArgumentError("an offset or size is 2**63 or more", field="items") from None
    return matrix


def _volatile(first: Sequence[WriteItem]) -> tuple[BoolArray, BoolArray]:
    flags = np.zeros((2, len(first)), dtype=np.bool_)
    for row, item in enumerate(first):
        if item.tensor_data is not None:
            properties = item.tensor_data.properties
            if properties.requires_grad or properties.pin_memory:
                flags[:, row] = properties.requires_grad, properties.pin_memory
    return flags[0], flags[1]


def key_paths_of(planner_data: object) -> KeyPaths | None:
    """Returns a planner's key paths in its order, None for None; raises UnsupportedMetadataError for other data."""
    if planner_data is None:
        return None
    if type(planner_data) is not dict:
        raise unsupported("planner_data", planner_data, "the value")
    for key, path in planner_data.items():
        if type(key) is not str:
            raise unsupported(repr(key), key, "the key in planner_data")
        if type(path) is not tuple or any(type(segment) not in (str, int) for segment in path):
            raise unsupported(key, path, f"the path ({path!r:.100}) in planner_data")
        if any(type(segment) is int and not -(1 << 63) <= segment < 1 << 63 for segment in path):
            raise unsupported(key, path, "a list index in planner_data")
    paths: dict[str, KeyPath] = planner_data
    return tuple(paths.items())


def kept_items(planned: Sequence[WriteItem], written: Sequence[WriteItem]) -> Int64Array | None:
    """Returns which items of ``planned`` were given to the writer; None when it got items that were not planned.

    A planner's ``finish_plan`` may return other items than it was given; those make a plan of their own.
    """
    number = {id(item): row for row, item in enumerate(planned)}
    rows = [number.get(id(item), -1) for item in written]
    kept = np.unique(np.array(rows, dtype=np.int64))
    return kept if len(kept) == len(rows) and (len(kept) == 0 or kept[0] >= 0) else None


def structure_columns(
    plan: RankPlan,
    kept: Int64Array,
    items: Sequence[WriteItem],
    results: Sequence[WriteResult],
    *,
    rank: int,
    prefix: str,
    checksums: Int64Array | None = None,
) -> tuple[RankStructure, Extents]:
    """Returns what a rank wrote and where.

    Args:
        plan: The plan before deduplication.
        kept: (K,) the items of it that were written.
        items: The K items, in the same order.
        results: What the storage writer reported, in any order.
        rank: Rank of the caller.
        prefix: Directory of the attempt, below which every file must lie.
        checksums: Of the results, in the same order; NO_CHECKSUM where there is none.

    Raises:
        UnsupportedWriterError: A result cannot be located, or lies outside the attempt's directory.
        FailedPreconditionError: Items were not written; torch's writer loses errors of its threads.
    """
    at = _match(items, results)
    infos = [_located(results[row], prefix) for row in at.tolist()]
    starts = np.array([info.offset for info in infos], dtype=np.int64)
    lengths = np.array([info.length for info in infos], dtype=np.int64)
    names = [info.relative_path[len(prefix) + 1 :] for info in infos]
    paths, file = np.unique(np.array(names, dtype=object), return_inverse=True) if names else (names, starts)
    order = np.lexsort((np.arange(len(infos)), lengths, starts, file)).astype(np.int64)
    files = tuple(FileName.of(path, rank) for path in paths)
    file_items = np.bincount(file, minlength=len(files)).astype(np.int64)
    transforms, transform_index = _transforms([info.transform_descriptors for info in infos])
    variable = plan.variable[kept]
    transformed = transform_index is not None
    expected = np.where(variable | transformed, 0, lengths).astype(np.int64)
    structure = RankStructure(plan, kept, files, file_items, order, expected)
    if checksums is not None:
        in_file_order = checksums[at][order]
        checksums = in_file_order if (in_file_order != NO_CHECKSUM).any() else None
    if transformed or not follows(file[order], starts[order], lengths[order]):
        index = None if transform_index is None else transform_index[order]
        return structure, Extents(
            lengths=lengths[order],
            starts=starts[order],
            transforms=transforms,
            transform_index=index,
            checksums=checksums,
        )
    return structure, Extents(variable_lengths=lengths[order][variable[order]], checksums=checksums)


def check_results(items: Sequence[WriteItem], results: Sequence[WriteResult], prefix: str) -> None:
    """Refuses what a storage writer reports that cannot be located; arguments and errors as ``structure_columns``."""
    for row in _match(items, results).tolist():
        _located(results[row], prefix)


def _match(items: Sequence[WriteItem], results: Sequence[WriteResult]) -> Int64Array:
    """(K,) index of each item's result. Writers hand back the item's own index object, or an equal one."""
    by_identity = {id(result.index): row for row, result in enumerate(results)}
    at = np.array([by_identity.get(id(item.index), -1) for item in items], dtype=np.int64)
    if len(at) and int(at.min()) < 0:
        by_value: dict[MetadataIndex, int] = {result.index: row for row, result in enumerate(results)}
        at = np.array([by_value.get(item.index, -1) for item in items], dtype=np.int64)
    missing = np.flatnonzero(at < 0)
    if len(missing):
        raise FailedPreconditionError(
            f"the storage writer reported nothing for {len(missing)} of {len(items)} items, the first is "
            f"{printable(items[int(missing[0])].index.fqn)!r}: one of its threads failed, see its traceback",
            reason="WRITE_INCOMPLETE",
        )
    if len(np.unique(at)) != len(results):
        raise UnsupportedWriterError("the storage writer reported items that it was not given", field="storage_writer")
    return at


def _located(result: WriteResult, prefix: str) -> StorageInfo:
    info = result.storage_data
    if type(info) is not StorageInfo:
        raise UnsupportedWriterError(
            f"the storage writer reports {type(info).__qualname__}, not where {printable(result.index.fqn)!r} lies",
            field="storage_writer",
        )
    if not info.relative_path.startswith(prefix + "/"):
        raise UnsupportedWriterError(
            f"the storage writer put {printable(result.index.fqn)!r} into {info.relative_path!r}, outside the "
            f"attempt's own directory {prefix!r}: a straggler of an older job could overwrite it",
            field="storage_writer",
        )
    return info


def _transforms(
    descriptors: Sequence[Sequence[str] | None],
) -> tuple[tuple[tuple[str, ...], ...], npt.NDArray[np.int64] | None]:
    """Distinct descriptor lists, and (K,) 0 for none, else 1 + index into them; None when all are none."""
    distinct: dict[tuple[str, ...], int] = {}
    index = [0 if names is None else 1 + distinct.setdefault(tuple(names), len(distinct)) for names in descriptors]
    return tuple(distinct), np.array(index, dtype=np.int64) if distinct else None


def follows(file: Int64Array, starts: Int64Array, lengths: Int64Array) -> bool:
    """Whether items, sorted by (file, start), fill every file from its front without a gap."""
    if len(file) == 0:
        return True
    begins = np.concatenate([[True], file[1:] != file[:-1]])
    before = np.concatenate([[0], (starts + lengths)[:-1]])
    return bool((starts == np.where(begins, 0, before)).all())
