"""Who writes what: DCP's deduplication of save plans as a pure function, so that it needs no collective.

Every item that several ranks hold is written by exactly one of them. Which one is a function of the ranks' plans in
rank order and of nothing else: every replica of the service decides the same, on any machine, and again after a
restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardbook.core.columns import BoolArray, Int64Array, encode_name
from shardbook.core.dtype import ITEMSIZES
from shardbook.core.election import MAX_WEIGHT_BYTES, Election, elect
from shardbook.core.merge import Declared, declare, distinct_tables, ranked
from shardbook.core.mixing import UInt64Array, mix
from shardbook.core.ragged import firsts_of, rows_of
from shardbook.core.structure import RankPlan
from shardbook.core.table import EntryKind

#: Part of every stored decision's key. Raise it with any change of what ``decide`` returns.
ALGORITHM_VERSION = 2
#: Plans that have no name in common are decided about apart, together only as long as they hold no more items:
#: what a decision takes is for its largest part, not for the world.
_ITEMS_AT_ONCE = 1 << 19


def decide(plans: Sequence[RankPlan], rank_index: Int64Array, *, save_to_lowest_rank: bool = False) -> list[BoolArray]:
    """Returns which items each rank drops, so that every item is written exactly once.

    Shards are the same item when fqn, offsets and sizes are equal; whole tensors and bytes entries when the fqn is,
    whatever their shape or dtype (the elected rank's then counts). An item that one plan names twice is kept once.

    Items are spread by bytes, see ``shardbook.core.election``.

    Args:
        plans: The distinct plans, in any order; plans that share a table object are compared faster.
        rank_index: (R,) which of them each rank sent.
        save_to_lowest_rank: True to have every item written by the lowest rank that holds it.

    Returns:
        For each rank, (items of its plan,) True for items that it does not write.

    Raises:
        InvalidArgumentError: ``rank_index`` names no plan.
    """
    lowest, index = ranked(rank_index, len(plans))
    present = [plans[at] for at in rank_index[lowest].tolist()]
    by_plan = np.argsort(index, kind="stable")
    rank_firsts = firsts_of(np.bincount(index, minlength=len(present)))
    drops: list[BoolArray] = [_NO_DROPS] * len(index)
    for part in _parts(present):
        ranks = np.sort(by_plan[rows_of(rank_firsts[part], np.diff(rank_firsts)[part])])
        own = np.searchsorted(part, index[ranks])
        decided = _decide([present[at] for at in part.tolist()], ranks, own, save_to_lowest_rank=save_to_lowest_rank)
        for rank, drop in zip(ranks.tolist(), decided, strict=True):
            drops[rank] = drop
    return drops


_NO_DROPS: BoolArray = np.zeros(0, dtype=np.bool_)


def _parts(plans: Sequence[RankPlan]) -> list[Int64Array]:
    """Returns the plans in parts, each climbing, such that no two parts have a name in common."""
    tables, table_of = distinct_tables([plan.table for plan in plans])
    family = list(range(len(tables)))

    def head(table: int) -> int:
        while family[table] != table:
            family[table] = table = family[family[table]]
        return table

    named_by: dict[str, int] = {}
    for at, table in enumerate(tables):
        for other in {named_by.setdefault(fqn, at) for fqn in table.fqns}:
            low, high = sorted((head(other), head(at)))
            family[high] = low
    of_plan = np.array([head(at) for at in range(len(tables))], dtype=np.int64)[table_of]
    counts = np.bincount(of_plan, weights=[plan.item_count for plan in plans])
    part_of = np.zeros(len(tables), dtype=np.int64)
    part, held = 0, 0.0
    for at in np.unique(of_plan).tolist():
        if held and held + counts[at] > _ITEMS_AT_ONCE:
            part, held = part + 1, 0.0
        part_of[at] = part
        held += counts[at]
    part_of_plan = part_of[of_plan]
    return [np.flatnonzero(part_of_plan == number).astype(np.int64) for number in range(part + 1)]


def _decide(
    plans: Sequence[RankPlan], ranks: Int64Array, plan_of_rank: Int64Array, *, save_to_lowest_rank: bool
) -> list[BoolArray]:
    """Returns what each of ``ranks`` (R,), climbing, drops of its plan; plans are in the order of their lowest rank."""
    items = _group(plans)
    lowest = ranks[np.unique(plan_of_rank, return_index=True)[1]]
    # The first holder of a key is its first plan.
    writer = lowest[items.plan[items.holders[items.firsts[:-1]]]]
    if not save_to_lowest_rank:
        election = Election(
            hashes=items.hashes,
            weights=items.weights,
            firsts=items.firsts,
            plan=items.plan[items.holders],
            ranks=ranks,
            plan_of_rank=plan_of_rank,
        )
        writer = elect(election, writer)
    bounds = firsts_of(np.array([plan.item_count for plan in plans], dtype=np.int64)).tolist()
    writer_of_item = writer[items.key]
    drops = []
    for rank, at in zip(ranks.tolist(), plan_of_rank.tolist(), strict=True):
        own = slice(bounds[at], bounds[at + 1])
        drops.append((writer_of_item[own] != rank) | items.again[own])
    return drops


@dataclass(frozen=True, eq=False)
class _Items:
    """The items of the plans, plan by plan, and the K keys by which they are the same.

    Attributes:
        plan: (N,) plan of each item.
        key: (N,) key of each item.
        again: (N,) True where the same plan has named the key before.
        holders: (H,) items, without those again, key by key, inside one by plan.
        firsts: (K + 1,) where each key begins in ``holders``, and H.
        hashes: (K,) hash of each key, the same whatever else there is.
        weights: (K,) bytes of the first holder's item, 1 where they are not known.
    """

    plan: Int64Array
    key: Int64Array
    again: BoolArray
    holders: Int64Array
    firsts: Int64Array
    hashes: UInt64Array
    weights: Int64Array


def _group(plans: Sequence[RankPlan]) -> _Items:
    boxes = _Boxes.of(plans)
    hashes = boxes.hashes()
    count = len(hashes)
    # Most items are named by one plan alone: a sort of bare hashes sets them apart, and only the rest is compared.
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    is_single = ~np.isin(hashes, repeated)
    singles, rest = np.flatnonzero(is_single), np.flatnonzero(~is_single)
    order, same = _sort_equal(boxes.columns(rest), hashes[rest])
    order = rest[order]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = ~same
    again = np.zeros(count, dtype=np.bool_)
    # A stable sort: of equal items those of one plan are neighbours.
    again[order[1:][same & (boxes.plan[order[1:]] == boxes.plan[order[:-1]])]] = True
    key = np.empty(count, dtype=np.int64)
    key[singles] = np.arange(len(singles))
    key[order] = len(singles) - 1 + np.cumsum(is_first)
    holders = np.concatenate([singles, order[~again[order]]])
    first = np.concatenate([singles, order[is_first]])
    return _Items(
        plan=boxes.plan,
        key=key,
        again=again,
        holders=holders,
        firsts=firsts_of(np.bincount(key[holders], minlength=len(first))),
        hashes=hashes[first],
        weights=boxes.weights(first),
    )


def _sort_equal(columns: Int64Array, hashes: UInt64Array) -> tuple[Int64Array, BoolArray]:
    """Returns a stable order of rows that brings equal ones together, and (N - 1,) where neighbours are equal."""
    order = np.argsort(hashes, kind="stable").astype(np.int64, copy=False)
    same = _equal_neighbours(columns, order)
    if (_equal_neighbours(hashes[:, None], order) != same).any():
        # Two keys share a hash, and may lie mixed with each other: sort by the keys themselves.
        order = np.lexsort(columns.T).astype(np.int64, copy=False)
        same = _equal_neighbours(columns, order)
    return order, same


def _equal_neighbours(columns: npt.NDArray[np.integer], order: Int64Array) -> BoolArray:
    same = np.ones(max(len(order) - 1, 0), dtype=np.bool_)
    for column in columns.T:
        ordered = column[order]
        same &= ordered[1:] == ordered[:-1]
    return same


@dataclass(frozen=True, eq=False)
class _Boxes:
    """The items of all plans, plan by plan.

    Attributes:
        declared: What their tables declare.
        plan: (N,) plan of each item.
        row: (N,) declared row of each item.
        offsets: (N, D) elements, padded with 0.
        sizes: (N, D) elements, padded with 1.
    """

    declared: Declared
    plan: Int64Array
    row: Int64Array
    offsets: Int64Array
    sizes: Int64Array

    @classmethod
    def of(cls, plans: Sequence[RankPlan]) -> _Boxes:
        tables, table_of = distinct_tables([plan.table for plan in plans])
        declared = declare(tables)
        counts = np.array([plan.item_count for plan in plans], dtype=np.int64)
        firsts = firsts_of(counts).tolist()
        offsets = np.zeros((firsts[-1], declared.shapes.shape[1]), dtype=np.int64)
        sizes = np.ones_like(offsets)
        for plan, first, end in zip(plans, firsts, firsts[1:], strict=False):
            offsets[first:end, : plan.offsets.shape[1]] = plan.offsets
            sizes[first:end, : plan.sizes.shape[1]] = plan.sizes
        row = np.concatenate([plan.entry for plan in plans])
        row += np.repeat(declared.bases[table_of], counts)
        return cls(declared, np.repeat(np.arange(len(plans)), counts), row, offsets, sizes)

    def columns(self, items: Int64Array) -> Int64Array:
        """Returns what makes ``items`` the same: entry and kind, and of shards ndim, offsets and sizes."""
        row = self.row[items]
        specs = np.stack([self.declared.entry[row], self.declared.kinds[row], self.declared.ndims[row]], axis=1)
        columns = np.concatenate([specs, self.offsets[items], self.sizes[items]], axis=1, dtype=np.int64)
        columns[specs[:, 1] != EntryKind.SHARD, 2:] = 0
        return columns

    def hashes(self) -> UInt64Array:
        """Returns (N,) hashes of each item's name, kind and own dimensions, of nothing else that ranks hold."""
        names = np.array([_hash_name(fqn) for fqn in self.declared.fqns], dtype=np.uint64)
        of_row = mix(names[self.declared.entry] ^ self.declared.kinds.astype(np.uint64))
        out = of_row[self.row]
        dims_of_row = np.where(self.declared.kinds == EntryKind.SHARD, self.declared.ndims, 0)
        dims = dims_of_row[self.row]
        for dim in range(int(dims_of_row.max(initial=0))):
            # Not of padded dimensions: how many there are is up to what other ranks hold.
            own = slice(None) if (dims_of_row > dim).all() else np.flatnonzero(dims > dim)
            part = mix(out[own] ^ self.offsets[own, dim].view(np.uint64))
            out[own] = mix(part ^ self.sizes[own, dim].view(np.uint64))
        return out

    def weights(self, items: Int64Array) -> Int64Array:
        """Returns the bytes of ``items``, at least 1; 1 for bytes entries, unknown before they are written."""
        row = self.row[items]
        kinds = self.declared.kinds[row]
        weights = ITEMSIZES[self.declared.dtypes[row]].astype(np.float64)
        for dim in range(self.sizes.shape[1]):
            size = self.sizes[items, dim]
            weights *= np.where(kinds == EntryKind.TENSOR, self.declared.shapes[row, dim], size)
        clipped: Int64Array = np.clip(weights, 1, MAX_WEIGHT_BYTES).astype(np.int64)
        return clipped


def _hash_name(fqn: str) -> int:
    return int.from_bytes(hashlib.blake2b(encode_name(fqn), digest_size=8).digest(), "little")
