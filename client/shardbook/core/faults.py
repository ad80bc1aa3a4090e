"""What assembly finds wrong, said so that a person can act: which tensor, which ranks, how many more."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from shardbook.core import limits
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.gather import Chunks
from shardbook.core.geometry import NONE, Verdict, covered, volumes
from shardbook.core.table import UInt8Array, printable
from shardbook.errors import FieldViolation, InvalidGeometryError


class Fault(IntEnum):
    """What is wrong with an entry; of several faults of one entry the lowest number is told."""

    NONE = 0
    DISAGREEMENT = 1
    OUT_OF_BOUNDS = 2
    OVERLAP = 3
    HOLE = 4

    @property
    def reason(self) -> str:
        """ErrorInfo reason of the fault."""
        return f"GEOMETRY_{self.name}"


def name_ranks(ranks: Int64Array) -> str:
    """Returns ``rank 3``, ``ranks 0, 3``, or the first 50 of more and their number; ``ranks`` are sorted."""
    named = ", ".join(map(str, ranks[: limits.MAX_NAMED_RANKS].tolist()))
    if len(ranks) > limits.MAX_NAMED_RANKS:
        named += f", ... ({len(ranks)} ranks)"
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"


class Findings:
    """What is wrong with a checkpoint, part by part; as much of it is kept as an error may name."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self._violations: list[FieldViolation] = []
        self._count = 0

    @property
    def are_none(self) -> bool:
        """True while nothing is wrong."""
        return not self._count

    def add(self, fqns: tuple[str, ...], faults: UInt8Array, describe: Callable[[int, Fault], str]) -> None:
        """Adds the entries of a part that have a fault.

        Args:
            fqns: (T,) names.
            faults: (T,) Fault of each entry.
            describe: Says what is wrong with an entry; asked for as many as an error may name.
        """
        at_fault = np.flatnonzero(faults)
        self._count += len(at_fault)
        for entry in at_fault[: limits.MAX_VIOLATIONS - len(self._violations)].tolist():
            fault = Fault(int(faults[entry]))
            self._violations.append(FieldViolation(printable(fqns[entry]), f"{fault.reason}: {describe(entry, fault)}"))

    def refuse(self) -> None:
        """Raises InvalidGeometryError when an entry has a fault; reason and message are those of the first that has."""
        if self.are_none:
            return
        first = self._violations[0]
        metadata = {"tensor": first.field, "tensor_count": str(self._count)}
        if self._count > len(self._violations):
            metadata["truncated"] = "true"
        reason, _, description = first.description.partition(": ")
        others = f"; {self._count - 1} more tensors are at fault" if self._count > 1 else ""
        raise InvalidGeometryError(
            f"tensor '{first.field}': {description}{others}",
            reason=reason,
            violations=self._violations,
            metadata=metadata,
        )


def describe_unlike(chunks: Chunks, entry: int, unlike: BoolArray) -> str:
    """Returns which ranks hold ``entry`` in another way than the rank whose word counts.

    Args:
        chunks: With every item of the entry that ranks keep.
        entry: The entry.
        unlike: (declared rows,) True for those unlike their entry's winner.
    """
    items = chunks.items_of(entry)
    others = items[unlike[chunks.kept.row[items]]]
    ranks = chunks.world.ranks_with(chunks.structures_of(others))
    declared = chunks.declared
    first = declared.describe(int(chunks.winner_row[entry]))
    other = declared.describe(int(chunks.kept.row[others[0]]))
    verb = "has" if len(ranks) == 1 else "have"
    return f"{name_ranks(chunks.owners_of(items[:1]))} has {first}, but {name_ranks(ranks)} {verb} {other}"


def describe_geometry(
    chunks: Chunks, offsets: Int64Array, sizes: Int64Array, verdict: Verdict, entry: int, fault: Fault
) -> str:
    """Returns what ``verdict`` on ``chunks``, with their boxes, says about ``entry``."""
    declared, row = chunks.declared, int(chunks.winner_row[entry])
    ndim = int(declared.ndims[row])
    shape = declared.shapes[row, :ndim].tolist()
    first, end = chunks.firsts[entry : entry + 2].tolist()
    owners = chunks.owners_of(chunks.order[first:end])

    def box(at: int) -> str:
        return f"{offsets[at, :ndim].tolist()} + {sizes[at, :ndim].tolist()}"

    if fault is Fault.OUT_OF_BOUNDS:
        out = np.flatnonzero(verdict.out_of_bounds[first:end])
        ranks = name_ranks(np.unique(owners[out]))
        return f"chunk {box(first + int(out[0]))} leaves the shape {shape}; such chunks are with {ranks}"
    if fault is Fault.OVERLAP:
        one, two = verdict.overlap[entry].tolist()
        ranks = name_ranks(np.unique(owners[[one - first, two - first]]))
        return f"chunks {box(one)} and {box(two)} overlap; they are with {ranks}"
    if first == end:
        tables = np.searchsorted(declared.bases, np.flatnonzero(declared.entry == entry), side="right") - 1
        with_table = np.flatnonzero(np.isin(chunks.world.table_of, tables))
        return f"no rank kept it; declared by {name_ranks(chunks.world.ranks_with(with_table))}"
    counts = chunks.counts[entry : entry + 1]
    shapes = declared.shapes[row : row + 1]
    held, whole = int(covered(counts, shapes, sizes[first:end])[0]), int(volumes(shapes)[0])
    ranks = name_ranks(np.unique(owners))
    return f"chunks cover {held} of {whole} elements of the shape {shape}; they are with {ranks}"


def faults_of(counts: Int64Array, verdict: Verdict, disagrees: BoolArray) -> UInt8Array:
    """Returns (T,) the fault to tell of each entry."""
    faults = np.zeros(len(counts), dtype=np.uint8)
    faults[verdict.incomplete] = Fault.HOLE
    faults[verdict.overlap[:, 0] != NONE] = Fault.OVERLAP
    faults[np.repeat(np.arange(len(counts)), counts)[verdict.out_of_bounds]] = Fault.OUT_OF_BOUNDS
    faults[disagrees] = Fault.DISAGREEMENT
    return faults
