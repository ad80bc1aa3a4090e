"""Who writes what: DCP's deduplication of save plans as a pure function, so that it needs no collective.

Every item that several ranks hold is written by exactly one of them. Which one is a function of the ranks' plans in
rank order and of nothing else: every replica of the service decides the same, on any machine, and again after a
restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.election import Election, elect
from shardbook.core.merge import distinct_tables, ranked
from shardbook.core.mixing import UInt64Array
from shardbook.core.planned import Boxes, Items
from shardbook.core.ragged import bounds_of, firsts_of, group_reduce, part_items, rows_of
from shardbook.core.structure import RankPlan

#: Part of every stored decision's key. Raise it with any change of what ``decide`` returns.
ALGORITHM_VERSION = 2
#: Plans that have no name in common are decided about apart, together only as long as they hold no more items:
#: what a decision takes is for its largest part, not for the world. Of plans that have, some entries are looked at at a
#: time, of so many items at least, and only what several ranks hold is remembered.
ITEMS_AT_ONCE = 1 << 19


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
        if held and held + counts[at] > ITEMS_AT_ONCE:
            part, held = part + 1, 0.0
        part_of[at] = part
        held += counts[at]
    part_of_plan = part_of[of_plan]
    return [np.flatnonzero(part_of_plan == number).astype(np.int64) for number in range(part + 1)]


def _decide(
    plans: Sequence[RankPlan], ranks: Int64Array, plan_of_rank: Int64Array, *, save_to_lowest_rank: bool
) -> list[BoolArray]:
    """Returns what each of ranks (R,), climbing, drops of its plan; plans are in the order of their lowest rank."""
    every = Items.of(plans)
    contest = _Contest(np.bincount(plan_of_rank, minlength=len(plans)).astype(np.int64))
    for first, end in pairwise(bounds_of(every.counts.tolist(), part_items(len(every.row), ITEMS_AT_ONCE))):
        contest.add(every.part(first, end))
    found = contest.result()
    if save_to_lowest_rank:
        # The first holder of a key is its first plan.
        lowest = ranks[np.unique(plan_of_rank, return_index=True)[1]]
        writer = lowest[found.plan[found.firsts[:-1]]]
    else:
        election = Election(
            hashes=found.hashes,
            weights=found.weights,
            firsts=found.firsts,
            plan=found.plan,
            ranks=ranks,
            plan_of_rank=plan_of_rank,
            alone=found.alone[plan_of_rank],
        )
        writer = elect(election)
    writer_of_item = np.full(len(every.row), _ANYBODY, dtype=np.int32)
    writer_of_item[found.items] = np.repeat(writer, np.diff(found.firsts))
    writer_of_item[found.again] = _NOBODY
    bounds = every.firsts.tolist()
    drops = []
    for rank, at in zip(ranks.tolist(), plan_of_rank.tolist(), strict=True):
        own = writer_of_item[bounds[at] : bounds[at + 1]]
        drops.append((own != rank) & (own != _ANYBODY))
    return drops


#: Writers that are no ranks: of an item that one rank alone holds; of one that its plan names a second time.
_ANYBODY: Final = -1
_NOBODY: Final = -2


@dataclass(frozen=True, eq=False)
class _Contested:
    """The K keys that several ranks hold.

    Attributes:
        hashes: (K,) hash of each, the same whatever else there is.
        weights: (K,) bytes of the first holder's item, 1 where they are not known.
        firsts: (K + 1,) where the holders of each begin, and H.
        plan: (H,) plans that hold each, each once, climbing.
        items: (H,) the item by which they do.
        again: Items that their plan has named before.
        alone: (plans,) bytes that the rank of a plan writes because nobody else holds them; 0 for plans of several.
    """

    hashes: UInt64Array
    weights: Int64Array
    firsts: Int64Array
    plan: Int64Array
    items: Int64Array
    again: Int64Array
    alone: Int64Array


class _Contest:
    """Finds out, some entries at a time, which items several ranks hold; of the others their bytes count alone.

    Args:
        ranks_of_plan: How many ranks have each plan, 1 or more.
    """

    def __init__(self, ranks_of_plan: Int64Array) -> None:
        self._ranks_of_plan = ranks_of_plan
        self._alone = np.zeros_like(ranks_of_plan)
        self._parts: list[tuple[npt.NDArray[Any], ...]] = []

    def add(self, boxes: Boxes) -> None:
        """Looks at a part."""
        keys = _group(boxes)
        counts = np.diff(keys.firsts)
        plan = boxes.plan[keys.holders]
        rank_counts = group_reduce(np.add, self._ranks_of_plan[plan], counts)
        contested = rank_counts > 1
        single = ~contested
        np.add.at(self._alone, plan[keys.firsts[:-1][single]], keys.weights[single])
        rows = np.repeat(contested, counts)
        held = keys.holders[rows]
        items, again = boxes.items[held], boxes.items[keys.again]
        self._parts.append(
            (keys.hashes[contested], keys.weights[contested], counts[contested], plan[rows], items, again)
        )

    def result(self) -> _Contested:
        """Returns what was found in all parts."""
        parts = self._parts or [(np.zeros(0, np.uint64), *[np.zeros(0, np.int64)] * 5)]
        hashes, weights, counts, plan, items, again = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _Contested(hashes, weights, firsts_of(counts), plan, items, again, self._alone)


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys by which N items are the same.

    Attributes:
        again: Items of a plan that has named the key before.
        holders: (H,) items, without those again, key by key, inside one by plan.
        firsts: (K + 1,) where each key begins in ``holders``, and H.
        hashes: (K,) hash of each key.
        weights: (K,) bytes of the first holder's item.
    """

    again: Int64Array
    holders: Int64Array
    firsts: Int64Array
    hashes: UInt64Array
    weights: Int64Array


def _group(boxes: Boxes) -> _Keys:
    hashes = boxes.hashes()
    # Most items are named by one plan alone: a sort of bare hashes sets them apart, and only the rest is compared.
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    is_single = ~np.isin(hashes, repeated)
    singles, rest = np.flatnonzero(is_single), np.flatnonzero(~is_single)
    order, same = _sort_equal(boxes.columns(rest), hashes[rest])
    order = rest[order]
    # A stable sort: of equal items those of one plan are neighbours.
    is_again = np.zeros(len(order), dtype=np.bool_)
    is_again[1:] = same & (boxes.plan[order[1:]] == boxes.plan[order[:-1]])
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = ~same
    first = np.concatenate([singles, order[is_first]])
    # Of the items that are not there again the first of each key is one.
    counts = np.diff(np.append(np.flatnonzero(is_first[~is_again]), np.count_nonzero(~is_again)))
    return _Keys(
        again=order[is_again],
        holders=np.concatenate([singles, order[~is_again]]),
        firsts=firsts_of(np.concatenate([np.ones(len(singles), dtype=np.int64), counts])),
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
