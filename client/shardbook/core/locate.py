"""Where every chunk of a checkpoint lies: the structure's expectations joined with the ranks' extents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from shardbook.core.checkpoint import BOX_COLUMNS, CHUNK_COLUMNS, ENTRY_COLUMNS, CheckpointStructure, chosen
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.extents import (
    HINT_POSITION,
    NO_CHECKSUM,
    Extents,
    decode_extents,
    decode_volatile,
    volatile_entry_count,
)
from shardbook.core.ragged import bounds_of
from shardbook.core.table import EntryKind
from shardbook.errors import InvalidArgumentError

#: Columns of ``Located``: of entries, and of chunks.
_ENTRY_FACTS: Final = ("requires_grad", "pin_memory")
_CHUNK_FACTS: Final = ("start", "length", "transform_index", "hints", "attributes", "checksum")


@dataclass(frozen=True, eq=False)
class Located:
    """Extents and volatile properties of a checkpoint's chunks and entries.

    Attributes:
        start: (N,) first byte in the file.
        length: (N,) bytes.
        transforms: Distinct lists of transform descriptors.
        transform_index: (N,) 0 for no transforms, else 1 + index into ``transforms``.
        hints: (N,) see ``shardbook.core.extents.HINT_POSITION``.
        attributes: (N,) bits, see ``shardbook.core.extents``.
        checksum: (N,) CRC32C of the chunk's bytes in the file; -1 where none was kept.
        requires_grad: (T,) of the rank that owns the entry's first chunk.
        pin_memory: (T,) likewise.
    """

    start: Int64Array
    length: Int64Array
    transforms: tuple[tuple[str, ...], ...]
    transform_index: Int64Array
    hints: Int64Array
    attributes: Int64Array
    checksum: Int64Array
    requires_grad: BoolArray
    pin_memory: BoolArray


def pages_of(
    structure: CheckpointStructure, located: Located, limit: int
) -> Iterator[tuple[slice, CheckpointStructure, Located]]:
    """Yields consecutive entries with about ``limit`` chunks at a time, as views, and which chunks those are.

    Key paths and warnings, which belong to the whole, are not in them.
    """
    firsts = structure.firsts.tolist()
    for first, end in itertools.pairwise(bounds_of(structure.chunk_counts.tolist(), limit)):
        rows, entries = slice(firsts[first], firsts[end]), slice(first, end)
        yield rows, _cut_structure(structure, entries, rows), _cut_located(located, entries, rows)


def _cut_structure(columns: CheckpointStructure, entries: slice, rows: slice) -> CheckpointStructure:
    return replace(
        columns,
        **chosen(columns, ENTRY_COLUMNS, entries),
        **chosen(columns, (*BOX_COLUMNS, *CHUNK_COLUMNS), rows),
        fqns=columns.fqns[entries],
        key_paths=None,
        warnings=(),
    )


def _cut_located(columns: Located, entries: slice, rows: slice) -> Located:
    return replace(columns, **chosen(columns, _CHUNK_FACTS, rows), **chosen(columns, _ENTRY_FACTS, entries))


def locate(structure: CheckpointStructure, registrations: Sequence[tuple[bytes, bytes]]) -> Located:
    """Joins ``structure`` with the ranks' (extents, volatile) payloads, in rank order.

    Raises:
        InvalidArgumentError: A payload is damaged, or does not fit the structure.
    """
    if len(structure.owner) and int(structure.owner.max()) >= len(registrations):
        raise InvalidArgumentError("a chunk belongs to a rank without extents", field="registrations")
    decoded: dict[bytes, int] = {}
    index = np.fromiter(
        (decoded.setdefault(extents, len(decoded)) for extents, _ in registrations), np.int64, len(registrations)
    )
    distinct = [decode_extents(payload) for payload in decoded]
    which = _Which(index[structure.owner], len(distinct))
    start, length = _follow(structure, distinct, which.number)
    _override(structure, distinct, which, start, length)
    transforms, transform_index = _transforms(structure, distinct, which)
    hints = _gather(structure, [extents.hints for extents in distinct], which, HINT_POSITION)
    attributes = _gather(structure, [extents.attributes for extents in distinct], which, 0)
    checksum = _gather(structure, [extents.checksums for extents in distinct], which, NO_CHECKSUM)
    requires_grad, pin_memory = _volatile(structure, [volatile for _, volatile in registrations])
    return Located(start, length, transforms, transform_index, hints, attributes, checksum, requires_grad, pin_memory)


@dataclass(frozen=True, eq=False)
class _Which:
    """Which of the distinct extents each chunk has.

    Attributes:
        number: (N,) number of its extents.
        count: How many distinct ones there are.
    """

    number: Int64Array
    count: int

    @cached_property
    def _sorted(self) -> tuple[Int64Array, Int64Array]:
        order = np.argsort(self.number, kind="stable").astype(np.int64, copy=False)
        return order, np.searchsorted(self.number[order], np.arange(self.count + 1)).astype(np.int64)

    def rows(self, number: int) -> Int64Array:
        """Returns the chunks that have these extents; sorted once for all, or every rank would cost a look at all."""
        order, firsts = self._sorted
        return order[int(firsts[number]) : int(firsts[number + 1])]


def _follow(
    structure: CheckpointStructure, distinct: Sequence[Extents], which: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Starts and lengths of items that follow each other from the front of their file."""
    sums = [np.concatenate([[0], np.cumsum(extents.variable_lengths)]) for extents in distinct]
    room = np.array([len(one) for one in sums], dtype=np.int64)
    explicit = np.array([extents.lengths is not None for extents in distinct], dtype=np.bool_)[which]
    variable = np.repeat(structure.kinds == EntryKind.BYTES, structure.chunk_counts) & ~explicit
    low = np.where(explicit, 0, structure.var_lo)
    high = np.where(explicit, 0, structure.var_hi)
    if ((high + variable) >= room[which]).any() or (low < 0).any() or (high < low).any():
        raise InvalidArgumentError("a rank has too few variable lengths", reason="EXTENTS_MISMATCH", field="extents")
    flat = np.concatenate([np.zeros(0, np.int64), *sums]).astype(np.int64)
    at = np.concatenate([[0], np.cumsum(room)]).astype(np.int64)[:-1][which] if len(which) else which
    start = structure.base + flat[at + high] - flat[at + low]
    length = np.where(variable, flat[at + high + variable] - flat[at + high], structure.length)
    return start, length


def _override(
    structure: CheckpointStructure,
    distinct: Sequence[Extents],
    which: _Which,
    start: Int64Array,
    length: Int64Array,
) -> None:
    """Puts explicit starts and lengths where a rank gave them."""
    for number, extents in enumerate(distinct):
        if extents.lengths is not None and extents.starts is not None:
            rows = which.rows(number)
            position = _positions(structure, rows, len(extents.lengths))
            start[rows], length[rows] = extents.starts[position], extents.lengths[position]


def _positions(structure: CheckpointStructure, rows: Int64Array, count: int) -> Int64Array:
    position = structure.position[rows]
    if len(position) and (int(position.max()) >= count or int(position.min()) < 0):
        raise InvalidArgumentError("a rank has too few extents", reason="EXTENTS_MISMATCH", field="extents")
    return position


def _gather(
    structure: CheckpointStructure, columns: Sequence[Int64Array | None], which: _Which, default: int
) -> Int64Array:
    """(N,) values of an optional column in file order."""
    out = np.full(len(which.number), default, dtype=np.int64)
    for number, column in enumerate(columns):
        if column is not None:
            rows = which.rows(number)
            out[rows] = column[_positions(structure, rows, len(column))]
    return out


def _transforms(
    structure: CheckpointStructure, distinct: Sequence[Extents], which: _Which
) -> tuple[tuple[tuple[str, ...], ...], Int64Array]:
    numbers: dict[tuple[str, ...], int] = {}
    columns: list[Int64Array | None] = []
    for extents in distinct:
        if extents.transform_index is None:
            columns.append(None)
            continue
        codes = [0] + [1 + numbers.setdefault(names, len(numbers)) for names in extents.transforms]
        columns.append(np.array(codes, dtype=np.int64)[extents.transform_index])
    return tuple(numbers), _gather(structure, columns, which, 0)


def _volatile(structure: CheckpointStructure, volatile: Sequence[bytes]) -> tuple[BoolArray, BoolArray]:
    """requires_grad and pin_memory of every entry, from the owner of its first chunk."""
    requires_grad = np.zeros(structure.entry_count, dtype=np.bool_)
    pin_memory = np.zeros(structure.entry_count, dtype=np.bool_)
    if not any(volatile):
        return requires_grad, pin_memory
    held = np.flatnonzero(structure.chunk_counts > 0)
    winner = _Which(structure.owner[structure.firsts[:-1][held]], len(volatile))
    for rank in np.unique(winner.number).tolist():
        payload = volatile[rank]
        entry_count = volatile_entry_count(payload)
        if entry_count is None:
            continue
        rows = held[winner.rows(rank)]
        entries = structure.winner_entry[rows]
        if int(entries.max()) >= entry_count:
            raise InvalidArgumentError("properties name too few entries", field="volatile_properties")
        grads, pins = decode_volatile(payload, entry_count)
        requires_grad[rows], pin_memory[rows] = grads[entries], pins[entries]
    return requires_grad, pin_memory
