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

from shardbook.core.columns import BoolArray, Int64Array, encode_name
from shardbook.core.dtype import ITEMSIZES
from shardbook.core.election import MAX_WEIGHT_BYTES, Election, elect
from shardbook.core.merge import Declared, declare, distinct_tables, ranked
from shardbook.core.mixing import UInt64Array, mix
from shardbook.core.ragged import firsts_of
from shardbook.core.structure import RankPlan
from shardbook.core.table import EntryKind

#: Part of every stored decision's key. Raise it with any change of what ``decide`` returns.
ALGORITHM_VERSION = 1


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
    items = _group(present)
    # Plans are in the order of their lowest ranks, and the first holder of a key is its first plan.
    writer = lowest[items.plan[items.holders[items.firsts[:-1]]]]
    if not save_to_lowest_rank:
        election = Election(
            hashes=items.hashes,
            weights=items.weights,
            firsts=items.firsts,
            plan=items.plan[items.holders],
            plan_of_rank=index,
        )
        writer = elect(election, writer)
    bounds = firsts_of(np.array([plan.item_count for plan in present], dtype=np.int64)).tolist()
    writer_of_item = writer[items.key]
    drops = []
    for rank, at in enumerate(index.tolist()):
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
    tables, table_of = distinct_tables([plan.table for plan in plans])
    declared = declare(tables)
    counts = np.array([plan.item_count for plan in plans], dtype=np.int64)
    plan = np.repeat(np.arange(len(plans)), counts)
    row = np.concatenate([plan.entry for plan in plans]) + np.repeat(declared.bases[table_of], counts)
    columns = _key_columns(plans, declared, row)
    hashes = _hash_items(declared, columns)

    order = np.argsort(hashes, kind="stable")
    same = _equal_neighbours(columns, order)
    if (hashes[order][1:] == hashes[order][:-1]).sum() != same.sum():
        # Two keys share a hash, and may lie mixed with each other: sort by the keys themselves.
        order = np.lexsort(columns.T)
        same = _equal_neighbours(columns, order)
    is_first = np.append(True, ~same)[: len(order)]
    key = np.empty_like(order)
    key[order] = np.cumsum(is_first) - 1
    repeated = np.append(False, same & (plan[order][1:] == plan[order][:-1]))[: len(order)]
    again = np.zeros(len(order), dtype=np.bool_)
    again[order[repeated]] = True
    holders = order[~repeated]
    key_count = int(is_first.sum())
    first = order[is_first]
    return _Items(
        plan=plan,
        key=key,
        again=again,
        holders=holders,
        firsts=firsts_of(np.bincount(key[holders], minlength=key_count)),
        hashes=hashes[first],
        weights=_weigh(declared, row[first], columns[first]),
    )


def _key_columns(plans: Sequence[RankPlan], declared: Declared, row: Int64Array) -> Int64Array:
    """Returns (N, 3 + 2 D): entry, kind, ndim, offsets, sizes; of items that are no shards nothing but entry, kind."""
    width = declared.shapes.shape[1]
    columns = np.zeros((len(row), 3 + 2 * width), dtype=np.int64)
    columns[:, 3 + width :] = 1
    first = 0
    for plan in plans:
        end, own = first + plan.item_count, plan.sizes.shape[1]
        columns[first:end, 3 : 3 + own] = plan.offsets
        columns[first:end, 3 + width : 3 + width + own] = plan.sizes
        first = end
    columns[:, 0] = declared.entry[row]
    columns[:, 1] = declared.kinds[row]
    columns[:, 2] = declared.ndims[row]
    columns[declared.kinds[row] != EntryKind.SHARD, 2:] = 0
    return columns


def _hash_items(declared: Declared, columns: Int64Array) -> UInt64Array:
    """Returns (N,) hashes of the fqn, kind and own dimensions of each item, of nothing else that ranks hold."""
    names = np.array([_hash_name(fqn) for fqn in declared.fqns], dtype=np.uint64)
    out = mix(names[columns[:, 0]] ^ columns[:, 1].astype(np.uint64))
    ndims = columns[:, 2]
    width = declared.shapes.shape[1]
    for dim in range(int(ndims.max(initial=0))):
        own = ndims > dim
        out[own] = mix(out[own] ^ columns[own, 3 + dim].view(np.uint64))
        out[own] = mix(out[own] ^ columns[own, 3 + width + dim].view(np.uint64))
    return out


def _hash_name(fqn: str) -> int:
    return int.from_bytes(hashlib.blake2b(encode_name(fqn), digest_size=8).digest(), "little")


def _equal_neighbours(columns: Int64Array, order: Int64Array) -> BoolArray:
    """Returns (N - 1,) whether each row of ``columns``, taken in ``order``, equals the next."""
    same = np.ones(max(len(order) - 1, 0), dtype=np.bool_)
    for column in columns.T:
        ordered = column[order]
        same &= ordered[1:] == ordered[:-1]
    return same


def _weigh(declared: Declared, row: Int64Array, columns: Int64Array) -> Int64Array:
    """Returns (K,) bytes of the items, at least 1; 1 for bytes entries, whose length is not known before the write."""
    kinds = declared.kinds[row]
    sizes = np.where((kinds == EntryKind.SHARD)[:, None], columns[:, 3 + declared.shapes.shape[1] :], 1)
    sizes = np.where((kinds == EntryKind.TENSOR)[:, None], declared.shapes[row], sizes)
    weights = sizes.astype(np.float64).prod(axis=1) * ITEMSIZES[declared.dtypes[row]]
    clipped: Int64Array = np.clip(weights, 1, MAX_WEIGHT_BYTES).astype(np.int64)
    return clipped
