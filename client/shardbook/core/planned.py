"""The items of the plans of all ranks, as columns: what makes two the same, and what they weigh."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardbook.core.columns import Int64Array
from shardbook.core.dtype import ITEMSIZES
from shardbook.core.election import MAX_WEIGHT_BYTES
from shardbook.core.merge import Declared, declare, distinct_tables
from shardbook.core.mixing import UInt64Array, mix
from shardbook.core.ragged import firsts_of, runs_of
from shardbook.core.structure import RankPlan
from shardbook.core.table import EntryKind
from shardbook.core.texts import encode_name


@dataclass(frozen=True, eq=False)
class Items:
    """The items of all plans, plan by plan.

    Attributes:
        plans: Where they come from.
        declared: What the plans' tables declare.
        row: (N,) declared row of each item.
        firsts: (P + 1,) first item of each plan, and N.
        counts: (T,) items of each entry.
    """

    plans: Sequence[RankPlan]
    declared: Declared
    row: Int64Array
    firsts: Int64Array
    counts: Int64Array

    @classmethod
    def of(cls, plans: Sequence[RankPlan]) -> Items:
        """Returns the items of ``plans``."""
        tables, table_of = distinct_tables([plan.table for plan in plans])
        declared = declare(tables)
        firsts = firsts_of(np.array([plan.item_count for plan in plans], dtype=np.int64))
        row = np.concatenate([plan.entry for plan in plans])
        row += np.repeat(declared.bases[table_of], np.diff(firsts))
        return cls(plans, declared, row, firsts, declared.count(row))

    @cached_property
    def row_hashes(self) -> UInt64Array:
        """(declared rows,) hash of each row's name and kind."""
        names = np.array([_hash_name(fqn) for fqn in self.declared.fqns], dtype=np.uint64)
        return mix(names[self.declared.entry] ^ self.declared.kinds.astype(np.uint64))

    def part(self, first: int, end: int) -> Boxes:
        """Returns the items of the entries from ``first`` up to ``end``."""
        items = self.declared.within(self.row, first, end)
        offsets = np.zeros((len(items), self.declared.shapes.shape[1]), dtype=np.int64)
        sizes = np.ones_like(offsets)
        for at, where, rows in runs_of(items, self.firsts):
            plan = self.plans[at]
            offsets[where, : plan.offsets.shape[1]] = plan.offsets[rows]
            sizes[where, : plan.sizes.shape[1]] = plan.sizes[rows]
        counts = np.diff(np.searchsorted(items, self.firsts))
        return Boxes(self, items, np.repeat(np.arange(len(counts)), counts), self.row[items], offsets, sizes)


@dataclass(frozen=True, eq=False)
class Boxes:
    """Items of some entries, plan by plan.

    Attributes:
        every: What they are a part of.
        items: (N,) their numbers there; climb.
        plan: (N,) plan of each item.
        row: (N,) declared row of each item.
        offsets: (N, D) elements, padded with 0.
        sizes: (N, D) elements, padded with 1.
    """

    every: Items
    items: Int64Array
    plan: Int64Array
    row: Int64Array
    offsets: Int64Array
    sizes: Int64Array

    def columns(self, items: Int64Array) -> Int64Array:
        """Returns what makes ``items`` the same: entry and kind, and of shards ndim, offsets and sizes."""
        row = self.row[items]
        specs = np.stack(
            [self.every.declared.entry[row], self.every.declared.kinds[row], self.every.declared.ndims[row]], axis=1
        )
        columns = np.concatenate([specs, self.offsets[items], self.sizes[items]], axis=1, dtype=np.int64)
        columns[specs[:, 1] != EntryKind.SHARD, 2:] = 0
        return columns

    def hashes(self) -> UInt64Array:
        """Returns (N,) hashes of each item's name, kind and own dimensions, of nothing else that ranks hold."""
        declared = self.every.declared
        out = self.every.row_hashes[self.row]
        dims = np.where(declared.kinds == EntryKind.SHARD, declared.ndims, 0)[self.row]
        for dim in range(int(dims.max(initial=0))):
            # Not of padded dimensions: how many there are is up to what other ranks hold.
            has = dims > dim
            own = slice(None) if has.all() else np.flatnonzero(has)
            part = mix(out[own] ^ self.offsets[own, dim].view(np.uint64))
            out[own] = mix(part ^ self.sizes[own, dim].view(np.uint64))
        return out

    def weights(self, items: Int64Array) -> Int64Array:
        """Returns the bytes of ``items``, at least 1; 1 for bytes entries, unknown before they are written."""
        row = self.row[items]
        kinds = self.every.declared.kinds[row]
        weights = ITEMSIZES[self.every.declared.dtypes[row]].astype(np.float64)
        for dim in range(self.sizes.shape[1]):
            size = self.sizes[items, dim]
            weights *= np.where(kinds == EntryKind.TENSOR, self.every.declared.shapes[row, dim], size)
        clipped: Int64Array = np.clip(weights, 1, MAX_WEIGHT_BYTES).astype(np.int64)
        return clipped


def _hash_name(fqn: str) -> int:
    return int.from_bytes(hashlib.blake2b(encode_name(fqn), digest_size=8).digest(), "little")
