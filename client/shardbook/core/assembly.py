"""R rank structures become one checkpoint structure: merged, deduplicated, validated. numpy only.

Entries are worked on some at a time, each with all of its chunks: beside what the ranks' structures take, memory is for
a part of a large checkpoint.

Rules, where DCP's own planner decides by who comes first or not at all:

- Entries are in the order in which the ranks' tables, rank by rank, first name them.
- Shards of one tensor must agree on dtype and shape among the ranks that kept some; whole tensors need not: the
  lowest rank that kept one counts, the others are dropped and a warning is kept.
- Equal chunks count once, the lowest rank's; see ``shardbook.core.duplicates``.
- Every entry that a table declares must be there and whole, unless it has no elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

import numpy as np

from shardbook.core import limits
from shardbook.core.checkpoint import CheckpointStructure, joined
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.duplicates import counted
from shardbook.core.faults import Fault, Findings, describe_geometry, describe_unlike, faults_of
from shardbook.core.gather import Chunks, Kept, place
from shardbook.core.geometry import Sweeps, UndecidedError, Verdict, judge
from shardbook.core.grid import prove_even
from shardbook.core.head import Head
from shardbook.core.merge import World, merge_key_paths
from shardbook.core.ragged import bounds_of, part_items, rows_of, within_group
from shardbook.core.structure import RankStructure
from shardbook.core.table import EntryKind, printable
from shardbook.errors import InvalidArgumentError

#: Items that are worked on at a time, at least.
ITEMS_AT_ONCE: Final = 1 << 20


def assemble(
    structures: Sequence[RankStructure], rank_index: Int64Array, *, at_once: int = ITEMS_AT_ONCE
) -> CheckpointStructure:
    """Returns the checkpoint that the ranks' structures make together.

    Args:
        structures: The distinct structures; structures that share a table object are merged faster.
        rank_index: (R,) which of them each rank has.
        at_once: About how many items are worked on at a time; it makes no difference to what is returned.

    Raises:
        InvalidGeometryError: Chunks leave their tensor, overlap, leave a hole, or disagree on dtype or shape. At
            most 50 tensors are named, with their ranks.
        InvalidArgumentError: ``rank_index`` names no structure; or the chunks of a tensor lie so irregularly that
            telling them apart takes more than ``limits.MAX_BOX_COMPARISONS`` (reason ``LIMIT_EXCEEDED``).
    """
    assembly = Assembly(structures, rank_index, at_once=at_once)
    checkpoint = joined(list(assembly.parts()))
    return replace(checkpoint, warnings=assembly.head.warnings)


class Assembly:
    """The checkpoint that the ranks' structures make together, some entries at a time. Not thread-safe.

    Arguments and errors are those of ``assemble``.
    """

    def __init__(
        self, structures: Sequence[RankStructure], rank_index: Int64Array, *, at_once: int = ITEMS_AT_ONCE
    ) -> None:
        """Looks at what there is; nothing is judged yet."""
        world = World.of(structures, rank_index)
        self._kept = Kept.of(world)
        self._at_once = part_items(len(self._kept.row), at_once)
        self._rank_files = world.rank_files()
        self._key_paths = merge_key_paths(world)
        self._findings = Findings()
        self._warnings = _Warnings()
        self._sweeps = Sweeps()

    @property
    def head(self) -> Head:
        """What is not a matter of one entry; once all parts have been read."""
        return Head(self._rank_files, self._key_paths, self._warnings.texts)

    def parts(self) -> Iterator[CheckpointStructure]:
        """Yields the entries in order, without warnings. What was yielded is of no use when an error follows."""
        bounds = bounds_of(self._kept.counts.tolist(), self._at_once)
        for first, end in pairwise(bounds if len(bounds) > 1 else [0, 0]):
            part = self._part(first, end)
            if self._findings.are_none:
                yield part()
        self._findings.refuse()

    def _part(self, first: int, end: int) -> Callable[[], CheckpointStructure]:
        """Judges some entries; returns what makes a part of the checkpoint of them."""
        every = self._kept.part(first, end)
        unlike, disagrees = _find_unlike(every)
        self._warnings.add(every, unlike, disagrees)
        chunks = _first_of_whole(every)
        within = np.zeros(len(every.counts), dtype=np.bool_)
        within[first:end] = True
        chunks, offsets, sizes, verdict = _judge(chunks, disagrees, within, self._sweeps)

        def describe(entry: int, fault: Fault) -> str:
            if fault is Fault.DISAGREEMENT:
                return describe_unlike(every, entry, unlike)
            return describe_geometry(chunks, offsets, sizes, verdict, entry, fault)

        self._findings.add(chunks.declared.fqns, faults_of(chunks.counts, verdict, disagrees), describe)
        return lambda: self._finish(chunks, offsets, sizes, slice(first, end))

    def _finish(self, chunks: Chunks, offsets: Int64Array, sizes: Int64Array, entries: slice) -> CheckpointStructure:
        """Returns the part that ``chunks``, found valid, make."""
        declared, winner_row = chunks.declared, chunks.winner_row[entries]
        counts = chunks.counts[entries]
        table_first = declared.bases[np.searchsorted(declared.bases, winner_row, side="right") - 1]
        placement = place(chunks)
        return CheckpointStructure(
            fqns=declared.fqns[entries],
            kinds=declared.kinds[winner_row],
            dtypes=declared.dtypes[winner_row],
            layouts=declared.layouts[winner_row],
            memory_formats=declared.memory_formats[winner_row],
            ndims=declared.ndims[winner_row],
            shapes=declared.shapes[winner_row],
            winner_entry=np.where(counts > 0, winner_row - table_first, 0),
            chunk_counts=counts,
            offsets=offsets,
            sizes=sizes,
            owner=placement.owner,
            position=placement.position,
            file=placement.file,
            base=placement.base,
            var_lo=placement.var_lo,
            var_hi=placement.var_hi,
            length=placement.length,
            key_paths=self._key_paths,
            rank_files=self._rank_files,
        )


class _Warnings:
    """One text for each whole tensor of which ranks kept unlike copies; the last says how many more there are."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._count = 0

    @property
    def texts(self) -> tuple[str, ...]:
        """The warnings, at most ``limits.MAX_WARNINGS``."""
        if self._count <= limits.MAX_WARNINGS:
            return tuple(self._texts)
        more = self._count - limits.MAX_WARNINGS + 1
        return (*self._texts[:-1], f"{more} more whole tensors differ between ranks")

    def add(self, chunks: Chunks, unlike: BoolArray, disagrees: BoolArray) -> None:
        """Adds those of the entries of ``chunks``; further arguments as ``_find_unlike`` returns them."""
        tolerated = np.zeros_like(disagrees)
        tolerated[chunks.declared.entry[chunks.row[unlike[chunks.row]]]] = True
        entries = np.flatnonzero(tolerated & ~disagrees).tolist()
        self._count += len(entries)
        self._texts += (
            f"tensor '{printable(chunks.declared.fqns[entry])}': {describe_unlike(chunks, entry, unlike)}; "
            "the lowest rank's is kept"
            for entry in entries[: limits.MAX_WARNINGS - len(self._texts)]
        )


def _find_unlike(chunks: Chunks) -> tuple[BoolArray, BoolArray]:
    """Returns (declared rows,) which are unlike their entry's winner, and (T,) where ranks kept one that is refused."""
    declared = chunks.declared
    winner_row = chunks.winner_row[declared.entry]
    unlike_row = declared.differs(np.arange(len(winner_row)), winner_row)
    # Two whole tensors: DCP lets one rank's count, and so do we.
    whole_row = (declared.kinds == EntryKind.TENSOR) & (declared.kinds[winner_row] == EntryKind.TENSOR)
    disagrees = np.zeros(len(chunks.counts), dtype=np.bool_)
    disagrees[declared.entry[chunks.row[(unlike_row & ~whole_row)[chunks.row]]]] = True
    return unlike_row, disagrees


def _first_of_whole(chunks: Chunks) -> Chunks:
    """Returns ``chunks`` with only the lowest rank's item of entries that are written whole: TENSOR and BYTES."""
    whole = (chunks.declared.kinds[chunks.winner_row] != EntryKind.SHARD) & (chunks.counts > 1)
    if not whole.any():
        return chunks
    return chunks.only(~np.repeat(whole, chunks.counts) | (within_group(chunks.counts) == 0))


def _judge(
    chunks: Chunks, disagrees: BoolArray, within: BoolArray, sweeps: Sweeps
) -> tuple[Chunks, Int64Array, Int64Array, Verdict]:
    """Returns the chunks that count, their offsets and sizes, and the verdict on the entries ``within`` (T,) the part.

    Entries that ranks disagree about are not judged: there is no shape to judge them by.
    """
    offsets, sizes = chunks.boxes()
    # Where no two chunks are the same cell of a grid, none is a duplicate: the proof settles both questions.
    settled = ~within | disagrees | prove_even(chunks.counts, chunks.shapes, offsets, sizes).tiled
    rest = np.flatnonzero(~settled)
    rows = rows_of(chunks.firsts[rest], chunks.counts[rest])
    keep = np.ones(len(offsets), dtype=np.bool_)
    keep[rows] = counted(np.repeat(rest, chunks.counts[rest]), offsets[rows], sizes[rows])
    if not keep.all():
        chunks, offsets, sizes = chunks.only(keep), offsets[keep], sizes[keep]
    try:
        verdict = judge(chunks.counts, chunks.shapes, offsets, sizes, settled=settled, sweeps=sweeps)
    except UndecidedError as error:
        name = printable(chunks.declared.fqns[error.tensor])
        raise InvalidArgumentError(
            f"tensor '{name}': its {error.chunk_count} chunks lie so irregularly that telling them apart takes more "
            f"than {limits.MAX_BOX_COMPARISONS} comparisons, the limit for a checkpoint",
            reason="LIMIT_EXCEEDED",
            field=name,
            metadata={"tensor": name, "limit": str(limits.MAX_BOX_COMPARISONS)},
        ) from error
    return chunks, offsets, sizes, verdict
