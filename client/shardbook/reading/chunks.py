"""Chunks of tensors as columns, wherever they come from, and which of them a box touches. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardbook.core.box import Box
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.columns import Int64Array
from shardbook.core.dtype import dtype_name, layout_name
from shardbook.core.found import FoundChunks
from shardbook.core.locate import Located
from shardbook.core.table import EntryKind


@dataclass(frozen=True, eq=False)
class TensorChunks:
    """A tensor and N chunks of it, D dimensions.

    Attributes:
        fqn: Name.
        is_tensor: False for an entry that is bytes, which has no dtype, shape and chunks.
        dtype: torch's name.
        layout: torch's name.
        shape: (D,) elements.
        offsets: (N, D) elements.
        sizes: (N, D) elements.
        paths: Distinct data files, relative to the checkpoint's directory.
        file: (N,) index of the chunk's file in ``paths``.
        start: (N,) first byte in the file.
        length: (N,) bytes.
        transforms: Distinct lists of transform descriptors.
        transform_index: (N,) 0 for no transforms, else 1 + index into ``transforms``.
    """

    fqn: str
    is_tensor: bool
    dtype: str
    layout: str
    shape: tuple[int, ...]
    offsets: Int64Array
    sizes: Int64Array
    paths: tuple[str, ...]
    file: Int64Array
    start: Int64Array
    length: Int64Array
    transforms: tuple[tuple[str, ...], ...]
    transform_index: Int64Array

    def touching(self, box: Box) -> Int64Array:
        """Returns the rows of the chunks that have cells in common with a box, in order."""
        if box.is_empty:
            return np.zeros(0, np.int64)
        begins = np.array(box.offsets, np.int64)
        ends = np.array(box.ends, np.int64)
        common = np.minimum(self.offsets + self.sizes, ends) > np.maximum(self.offsets, begins)
        return np.flatnonzero(common.all(1)).astype(np.int64, copy=False)


def bytes_entry(fqn: str) -> TensorChunks:
    """Returns an entry that is no tensor."""
    none = np.zeros(0, np.int64)
    boxes = np.zeros((0, 0), np.int64)
    return TensorChunks(fqn, False, "", "", (), boxes, boxes, (), none, none, none, (), none)


def of_columns(structure: CheckpointStructure, located: Located, prefix: str, row: int) -> TensorChunks:
    """Returns one entry of a checkpoint.

    Args:
        structure: Entries and chunks.
        located: Where they lie.
        prefix: Directory of the data files, relative to the checkpoint's; empty when they lie in it.
        row: Which entry.
    """
    fqn = structure.fqns[row]
    if structure.kinds[row] == EntryKind.BYTES:
        return bytes_entry(fqn)
    ndim = int(structure.ndims[row])
    rows = slice(int(structure.firsts[row]), int(structure.firsts[row + 1]))
    written = np.stack([structure.owner[rows], structure.file[rows]], axis=1)
    distinct, file = np.unique(written, axis=0, return_inverse=True)
    head = f"{prefix}/" if prefix else ""
    return TensorChunks(
        fqn=fqn,
        is_tensor=True,
        dtype=dtype_name(int(structure.dtypes[row])),
        layout=layout_name(int(structure.layouts[row])),
        shape=tuple(structure.shapes[row, :ndim].tolist()),
        offsets=structure.offsets[rows, :ndim],
        sizes=structure.sizes[rows, :ndim],
        paths=tuple(head + structure.rank_files.path(rank, number) for rank, number in distinct.tolist()),
        file=file.reshape(-1),
        start=located.start[rows],
        length=located.length[rows],
        transforms=located.transforms,
        transform_index=located.transform_index[rows],
    )


def of_found(found: FoundChunks, tensor: int) -> TensorChunks | None:
    """Returns one entry that was asked for, by its number in the question; None where the checkpoint lacks it."""
    fqn = found.wanted.fqns[tensor]
    if not found.found[tensor]:
        return None
    if found.is_bytes[tensor]:
        return bytes_entry(fqn)
    ndim = int(found.ndims[tensor])
    rows = slice(*np.searchsorted(found.tensor, [tensor, tensor + 1]).tolist())
    distinct, file = np.unique(found.file[rows], return_inverse=True)
    return TensorChunks(
        fqn=fqn,
        is_tensor=True,
        dtype=dtype_name(int(found.dtypes[tensor])),
        layout=layout_name(int(found.layouts[tensor])),
        shape=found.shape_of(tensor),
        offsets=found.offsets[rows, :ndim],
        sizes=found.sizes[rows, :ndim],
        paths=tuple(found.paths[at] for at in distinct.tolist()),
        file=file.reshape(-1),
        start=found.start[rows],
        length=found.length[rows],
        transforms=found.transforms,
        transform_index=found.transform_index[rows],
    )


__all__ = ["TensorChunks", "bytes_entry", "of_columns", "of_found"]
