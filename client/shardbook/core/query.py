"""Answers questions about chunks: which chunks the wanted boxes meet, and where their bytes are.

The same code for the service, whose blocks are in a database, and for a directory, whose blocks are in a manifest.
Whoever calls it keeps the decoded entries (``ChunkIndex``) and fetches the extents of the ranks that own what was
found: those of no other rank are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardbook.core.checkpoint import CheckpointStructure, RankFiles
from shardbook.core.chunk_index import ChunkIndex, joined, without_chunks_of
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.found import FoundPart
from shardbook.core.locate import locate
from shardbook.core.places import Places, apart, together
from shardbook.core.ragged import bounds_of, rows_of
from shardbook.core.table import EntryKind
from shardbook.core.wanted import Wanted, misfit, widened

#: Returns the (extents, volatile) payloads of ranks, which are distinct and climb, in their order.
ReadRegistrations = Callable[[Int64Array], Sequence[tuple[bytes, bytes]]]


@dataclass(frozen=True, eq=False)
class Hits:
    """Entries of one index that were asked for, P of them, and the K pairs of box and chunk found in them.

    Attributes:
        index: Where they are.
        tensor: (P,) number of each in the question; climbs.
        entry: (P,) its entry in the index.
        whole: (P,) True where every chunk was wanted, or it is no tensor.
        at: (K,) which of the P; climbs.
        box: (K,) number of the wanted box; -1 where there is none.
        row: (K,) chunk of the index.
    """

    index: ChunkIndex
    tensor: Int64Array
    entry: Int64Array
    whole: BoolArray
    at: Int64Array
    box: Int64Array
    row: Int64Array


def find(index: ChunkIndex, wanted: Wanted, tensor: Int64Array, entry: Int64Array) -> Hits:
    """Finds the chunks of some of the wanted tensors.

    Args:
        index: Entries.
        wanted: The question.
        tensor: (P,) numbers of wanted tensors that are in this index; climbing.
        entry: (P,) the entry of each.

    Raises:
        InvalidArgumentError: A box of a tensor whose shape is not stated does not fit it; the field names the box.
    """
    spec = index.spec
    is_bytes = spec.kinds[entry] == EntryKind.BYTES
    fits = ~wanted.stated[tensor] | _same_shape(spec, wanted, tensor, entry)
    whole = (wanted.whole[tensor] & fits) | is_bytes
    boxed = np.flatnonzero(fits & ~whole)
    counts = wanted.box_counts[tensor[boxed]]
    box = rows_of(wanted.firsts[tensor[boxed]], counts)
    box_at = np.repeat(boxed, counts)
    _check_boxes(spec, wanted, box, entry[box_at])
    low = wanted.offsets[box]
    which, row = index.meet(entry[box_at], low, low + wanted.sizes[box])
    complete = np.flatnonzero(whole)
    all_counts = index.counts[entry[complete]]
    at = np.concatenate([box_at[which], np.repeat(complete, all_counts)])
    box = np.concatenate([box[which], np.full(int(all_counts.sum()), -1, dtype=np.int64)])
    row = np.concatenate([row, rows_of(index.firsts[entry[complete]], all_counts)])
    if len(complete) and len(boxed):
        order = np.argsort(at, kind="stable")
        at, box, row = at[order], box[order], row[order]
    return Hits(index, tensor, entry, whole, at, box, row)


def _same_shape(spec: CheckpointStructure, wanted: Wanted, tensor: Int64Array, entry: Int64Array) -> BoolArray:
    width = max(spec.shapes.shape[1], wanted.shapes.shape[1])
    same = (widened(spec.shapes[entry], width, 1) == widened(wanted.shapes[tensor], width, 1)).all(axis=1)
    flags: BoolArray = same & (spec.ndims[entry] == wanted.ndims[tensor])
    return flags


def _check_boxes(spec: CheckpointStructure, wanted: Wanted, box: Int64Array, entry: Int64Array) -> None:
    width = max(spec.shapes.shape[1], wanted.offsets.shape[1])
    ends = widened(wanted.offsets[box] + wanted.sizes[box], width, 1)
    wrong = (ends > widened(spec.shapes[entry], width, 1)).any(axis=1)
    wrong |= wanted.ndims[wanted.tensor_of_box[box]] != spec.ndims[entry]
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        shape = spec.shapes[entry[at], : int(spec.ndims[entry[at]])].tolist()
        raise misfit(wanted, int(box[at]), tuple(shape))


def sliced(hits: Hits, limit: int) -> list[Hits]:
    """Cuts hits between tensors into some of about ``limit`` pairs each; one tensor stays together."""
    if len(hits.row) <= limit:
        return [hits]
    counts = np.bincount(hits.at, minlength=len(hits.tensor))
    ends = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return [
        Hits(
            hits.index,
            hits.tensor[first:last],
            hits.entry[first:last],
            hits.whole[first:last],
            hits.at[ends[first] : ends[last]] - first,
            hits.box[ends[first] : ends[last]],
            hits.row[ends[first] : ends[last]],
        )
        for first, last in itertools.pairwise(bounds_of(counts.tolist(), limit))
    ]


def place(parts: Sequence[Hits], rank_files: RankFiles, prefix: str, read: ReadRegistrations) -> FoundPart:
    """Joins what was found with the extents of the ranks that own it; arguments and errors as of ``place_apart``.

    Args:
        parts: What was found.
        rank_files: File names by rank.
        prefix: Directory of the attempt; empty for the checkpoint's own.
        read: Fetches extents.
    """
    return together(*place_apart(parts, rank_files, read), prefix)


def place_apart(parts: Sequence[Hits], rank_files: RankFiles, read: ReadRegistrations) -> tuple[FoundPart, Places]:
    """Returns what was found as the structure says it, and where it lies as the extents of the owners say it.

    Args:
        parts: What was found, in one index or several.
        rank_files: File names by rank.
        read: Fetches extents.

    Raises:
        InvalidArgumentError: Extents are damaged, or do not fit the structure.
    """
    found = joined([hits.index.structure_of(hits.entry, hits.at, hits.row) for hits in parts])
    ranks, owner = _distinct(found.owner)
    registrations = read(ranks)
    # Volatile properties are those of the rank that owns the entry's first chunk, which boxes may not meet.
    located = locate(replace(found, owner=owner), [(extents, b"") for extents, _ in registrations])
    requires_grad, pin_memory = _properties(parts, found, owner, registrations)
    paths, file = _paths(rank_files, found.owner, found.file)
    part = FoundPart(
        tensor=_concatenated(hits.tensor for hits in parts),
        kinds=found.kinds,
        dtypes=found.dtypes,
        layouts=found.layouts,
        memory_formats=found.memory_formats,
        ndims=found.ndims,
        shapes=found.shapes,
        chunk_counts=_concatenated(hits.index.counts[hits.entry] for hits in parts),
        requires_grad=requires_grad,
        pin_memory=pin_memory,
        at=np.repeat(np.arange(found.entry_count, dtype=np.int64), found.chunk_counts),
        box=_concatenated(hits.box for hits in parts),
        index=_concatenated(hits.row - hits.index.firsts[hits.entry[hits.at]] for hits in parts),
        offsets=found.offsets,
        sizes=found.sizes,
        file=file,
        start=located.start,
        length=located.length,
        transform_index=located.transform_index,
        hints=located.hints,
        attributes=located.attributes,
        checksum=located.checksum,
        paths=paths,
        transforms=located.transforms,
    )
    return apart(part, found.base, found.length)


def _concatenated(columns: Iterable[Int64Array]) -> Int64Array:
    return np.concatenate([np.zeros(0, dtype=np.int64), *columns])


def _properties(
    parts: Sequence[Hits], found: CheckpointStructure, owner: Int64Array, registrations: Sequence[tuple[bytes, bytes]]
) -> tuple[BoolArray, BoolArray]:
    """requires_grad and pin_memory of the entries that are there with all of their chunks; False for others."""
    requires_grad, pin_memory = np.zeros((2, found.entry_count), dtype=np.bool_)
    whole = np.concatenate([np.zeros(0, dtype=np.bool_), *(hits.whole for hits in parts)])
    if whole.any() and any(volatile for _, volatile in registrations):
        held = whole & (found.chunk_counts > 0)
        # Entries that are not whole are taken for ones without chunks: their properties are nobody's.
        located = locate(without_chunks_of(~held, replace(found, owner=owner)), registrations)
        requires_grad, pin_memory = located.requires_grad, located.pin_memory
    return requires_grad, pin_memory


def _paths(rank_files: RankFiles, owner: Int64Array, file: Int64Array) -> tuple[tuple[str, ...], Int64Array]:
    """Returns distinct paths relative to the attempt's directory, and which of them each chunk lies in."""
    width = int(file.max(initial=0)) + 1
    used, index = _distinct(owner * width + file)
    ranks, numbers = np.divmod(used, width)
    pairs = zip(ranks.tolist(), numbers.tolist(), strict=True)
    return tuple(rank_files.path(rank, number) for rank, number in pairs), index


def _distinct(values: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Returns the distinct values, which climb, and which of them each is; without sorting where all are the same.

    A rank that loads what it saved finds one rank's chunks in one file.
    """
    if len(values) and (values == values[0]).all():
        return values[:1], np.zeros(len(values), dtype=np.int64)
    found, which = np.unique(values, return_inverse=True)
    return found.astype(np.int64, copy=False), which.astype(np.int64, copy=False)
