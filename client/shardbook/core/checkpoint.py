"""The assembled structure of a checkpoint: the validated, deduplicated union of its ranks' structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.structure import FileName
from shardbook.core.table import EntryKind, KeyPaths, UInt8Array
from shardbook.errors import InvalidArgumentError

#: Columns of a ``CheckpointStructure``: of its entries, besides their names; of a chunk's box; of a chunk besides it.
ENTRY_COLUMNS: Final = (
    "kinds",
    "dtypes",
    "layouts",
    "memory_formats",
    "ndims",
    "shapes",
    "winner_entry",
    "chunk_counts",
)
BOX_COLUMNS: Final = ("offsets", "sizes")
CHUNK_COLUMNS: Final = ("owner", "position", "file", "base", "var_lo", "var_hi", "length")


@dataclass(frozen=True, eq=False)
class RankFiles:
    """Names of the data files of every rank; ranks with equal names share one list.

    Attributes:
        distinct: Distinct lists of file names.
        index: (R,) which list a rank has.
    """

    distinct: tuple[tuple[FileName, ...], ...]
    index: Int64Array

    def path(self, rank: int, file: int) -> str:
        """Returns the path below the attempt's prefix of the ``file``-th file of ``rank``."""
        return self.distinct[int(self.index[rank])][file].path(rank)


@dataclass(frozen=True, eq=False)
class CheckpointStructure:
    """Entries of a checkpoint in state-dict order, and their chunks.

    Geometry is padded to D dimensions as in ``shardbook.core.table``. Chunks are tensor-major; inside a tensor by
    (rank, plan order), which is the order of DCP's chunk list. A BYTES entry has one chunk of no dimensions.

    Attributes:
        fqns: (T,) names.
        kinds: (T,) EntryKind.
        dtypes: (T,) codes, 0 for BYTES.
        layouts: (T,) codes.
        memory_formats: (T,) codes.
        ndims: (T,) dimensions.
        shapes: (T, D) elements.
        winner_entry: (T,) index of the entry in the table of the rank that owns its first chunk, whose volatile
            properties count; 0 without chunks.
        chunk_counts: (T,) chunks of each entry.
        offsets: (N, D) elements.
        sizes: (N, D) elements.
        owner: (N,) rank that wrote the chunk.
        position: (N,) file position of the chunk in its owner's structure.
        file: (N,) index of its file in its owner's structure.
        base: (N,) start in the file, bytes, not counting variable-length items before it.
        var_lo: (N,) index, in the owner's variable lengths, of the first variable item of the file.
        var_hi: (N,) the same of the first variable item at or after the chunk.
        length: (N,) expected length, bytes; 0 for BYTES.
        key_paths: DCP's planner_data, merged; None when no rank had any.
        rank_files: File names by rank.
        warnings: Facts worth a person's attention.
    """

    fqns: tuple[str, ...]
    kinds: UInt8Array
    dtypes: UInt8Array
    layouts: UInt8Array
    memory_formats: UInt8Array
    ndims: Int64Array
    shapes: Int64Array
    winner_entry: Int64Array
    chunk_counts: Int64Array
    offsets: Int64Array
    sizes: Int64Array
    owner: Int64Array
    position: Int64Array
    file: Int64Array
    base: Int64Array
    var_lo: Int64Array
    var_hi: Int64Array
    length: Int64Array
    key_paths: KeyPaths | None
    rank_files: RankFiles
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if int(self.chunk_counts.sum()) != len(self.owner):
            raise InvalidArgumentError("chunk counts do not add up to the chunks", field="chunk_counts")

    @property
    def entry_count(self) -> int:
        """Number of entries, T."""
        return len(self.fqns)

    @property
    def bytes_entry_count(self) -> int:
        """Number of entries that are not tensors."""
        return int((self.kinds == EntryKind.BYTES).sum())

    @property
    def tensor_count(self) -> int:
        """Number of tensors."""
        return self.entry_count - self.bytes_entry_count

    @property
    def chunk_count(self) -> int:
        """Number of chunks of tensors."""
        return int(self.chunk_counts[self.kinds != EntryKind.BYTES].sum())

    @property
    def firsts(self) -> Int64Array:
        """(T + 1,) index of each entry's first chunk, and N."""
        return np.concatenate([[0], np.cumsum(self.chunk_counts)]).astype(np.int64)


def chosen(columns: object, names: Sequence[str], rows: slice | BoolArray) -> dict[str, Any]:
    """Returns some rows of the columns ``names``, as ``dataclasses.replace`` takes them; of a slice they are views."""
    return {name: getattr(columns, name)[rows] for name in names}


def joined(parts: Sequence[CheckpointStructure]) -> CheckpointStructure:
    """Returns the entries of ``parts``, one or more that follow each other in one checkpoint, as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    names = (*ENTRY_COLUMNS, *BOX_COLUMNS, *CHUNK_COLUMNS)
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(first, fqns=tuple(fqn for part in parts for fqn in part.fqns), **columns)
