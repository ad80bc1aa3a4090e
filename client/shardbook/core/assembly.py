"""R rank structures become one checkpoint structure: merged, deduplicated, validated. numpy only.

Rules, where DCP's own planner decides by who comes first or not at all:

- Entries are in the order in which the ranks' tables, rank by rank, first name them.
- Shards of one tensor must agree on dtype and shape among the ranks that kept some; whole tensors need not: the
  lowest rank that kept one counts, the others are dropped and a warning is kept.
- Equal chunks count once, the lowest rank's; see ``shardbook.core.duplicates``.
- Every entry that a table declares must be there and whole, unless it has no elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardbook.core import limits
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.duplicates import counted
from shardbook.core.faults import Fault, describe_geometry, describe_unlike, faults_of, refuse
from shardbook.core.gather import Chunks, place
from shardbook.core.geometry import UndecidedError, Verdict, judge
from shardbook.core.grid import prove_even
from shardbook.core.merge import World, merge_key_paths
from shardbook.core.ragged import rows_of, within_group
from shardbook.core.structure import RankStructure
from shardbook.core.table import EntryKind, printable
from shardbook.errors import InvalidArgumentError


def assemble(structures: Sequence[RankStructure], rank_index: Int64Array) -> CheckpointStructure:
    """Returns the checkpoint that the ranks' structures make together.

    Args:
        structures: The distinct structures; structures that share a table object are merged faster.
        rank_index: (R,) which of them each rank has.

    Raises:
        InvalidGeometryError: Chunks leave their tensor, overlap, leave a hole, or disagree on dtype or shape. At
            most 50 tensors are named, with their ranks.
        InvalidArgumentError: ``rank_index`` names no structure; or the chunks of a tensor lie so irregularly that
            telling them apart takes more than ``limits.MAX_BOX_COMPARISONS`` (reason ``LIMIT_EXCEEDED``).
    """
    every = Chunks.of(World.of(structures, rank_index))
    unlike, disagrees = _find_unlike(every)
    warnings = _warnings(every, unlike, disagrees)
    chunks = _first_of_whole(every)
    chunks, offsets, sizes, verdict = _judge(chunks, disagrees)

    def describe(entry: int, fault: Fault) -> str:
        if fault is Fault.DISAGREEMENT:
            return describe_unlike(every, entry, unlike)
        return describe_geometry(chunks, offsets, sizes, verdict, entry, fault)

    refuse(chunks.declared.fqns, faults_of(chunks.counts, verdict, disagrees), describe)
    return _finish(chunks, offsets, sizes, warnings)


def _find_unlike(chunks: Chunks) -> tuple[BoolArray, BoolArray]:
    """Returns (all items,) which items are declared unlike their entry's winner, and (T,) where that is refused."""
    declared = chunks.declared
    winner_row = chunks.winner_row[declared.entry]
    unlike_row = declared.differs(np.arange(len(winner_row)), winner_row)
    # Two whole tensors: DCP lets one rank's count, and so do we.
    whole_row = (declared.kinds == EntryKind.TENSOR) & (declared.kinds[winner_row] == EntryKind.TENSOR)
    refused_row = unlike_row & ~whole_row
    disagrees = np.zeros(len(chunks.counts), dtype=np.bool_)
    disagrees[declared.entry[chunks.row[refused_row[chunks.row]]]] = True
    return unlike_row[chunks.row], disagrees


def _warnings(chunks: Chunks, unlike: BoolArray, disagrees: BoolArray) -> tuple[str, ...]:
    """Returns one text for each whole tensor of which ranks kept unlike copies."""
    tolerated = np.zeros_like(disagrees)
    tolerated[chunks.declared.entry[chunks.row[unlike]]] = True
    entries = np.flatnonzero(tolerated & ~disagrees).tolist()
    texts = [
        f"tensor '{printable(chunks.declared.fqns[entry])}': {describe_unlike(chunks, entry, unlike)}; "
        "the lowest rank's is kept"
        for entry in entries[: limits.MAX_WARNINGS]
    ]
    if len(entries) > limits.MAX_WARNINGS:
        texts[-1] = f"{len(entries) - limits.MAX_WARNINGS + 1} more whole tensors differ between ranks"
    return tuple(texts)


def _first_of_whole(chunks: Chunks) -> Chunks:
    """Returns ``chunks`` with only the lowest rank's item of entries that are written whole: TENSOR and BYTES."""
    whole = (chunks.declared.kinds[chunks.winner_row] != EntryKind.SHARD) & (chunks.counts > 1)
    if not whole.any():
        return chunks
    return chunks.only(~np.repeat(whole, chunks.counts) | (within_group(chunks.counts) == 0))


def _judge(chunks: Chunks, disagrees: BoolArray) -> tuple[Chunks, Int64Array, Int64Array, Verdict]:
    """Returns the chunks that count, their offsets and sizes, and the verdict on them.

    Entries that ranks disagree about are not judged: there is no shape to judge them by.
    """
    offsets, sizes = chunks.boxes()
    # Where no two chunks are the same cell of a grid, none is a duplicate: the proof settles both questions.
    settled = disagrees | prove_even(chunks.counts, chunks.shapes, offsets, sizes).tiled
    rest = np.flatnonzero(~settled)
    rows = rows_of(chunks.firsts[rest], chunks.counts[rest])
    keep = np.ones(len(offsets), dtype=np.bool_)
    keep[rows] = counted(np.repeat(rest, chunks.counts[rest]), offsets[rows], sizes[rows])
    if not keep.all():
        chunks, offsets, sizes = chunks.only(keep), offsets[keep], sizes[keep]
    try:
        verdict = judge(chunks.counts, chunks.shapes, offsets, sizes, settled=settled)
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


def _finish(chunks: Chunks, offsets: Int64Array, sizes: Int64Array, warnings: tuple[str, ...]) -> CheckpointStructure:
    """Returns the checkpoint that ``chunks``, found valid, make."""
    declared, winner_row = chunks.declared, chunks.winner_row
    table_first = declared.bases[np.searchsorted(declared.bases, winner_row, side="right") - 1]
    placement = place(chunks)
    return CheckpointStructure(
        fqns=declared.fqns,
        kinds=declared.kinds[winner_row],
        dtypes=declared.dtypes[winner_row],
        layouts=declared.layouts[winner_row],
        memory_formats=declared.memory_formats[winner_row],
        ndims=declared.ndims[winner_row],
        shapes=declared.shapes[winner_row],
        winner_entry=np.where(chunks.counts > 0, winner_row - table_first, 0),
        chunk_counts=chunks.counts,
        offsets=offsets,
        sizes=sizes,
        owner=placement.owner,
        position=placement.position,
        file=placement.file,
        base=placement.base,
        var_lo=placement.var_lo,
        var_hi=placement.var_hi,
        length=placement.length,
        key_paths=merge_key_paths(chunks.world),
        rank_files=chunks.world.rank_files(),
        warnings=warnings,
    )
