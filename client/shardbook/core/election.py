"""Which of its holders writes an item: rendezvous hashing with bounded loads.

Every holder of an item has a score, a hash of the item and the holder's rank, and the highest writes it. A score
depends on nothing else, so when one rank's plan changes, items that it does not hold stay where they are. That alone
spreads items evenly and bytes badly, so a rank's bytes are bounded: items are placed from the largest size class to
the smallest, and one that would exceed the bound of its first choice goes to the next. The bound of a rank is what
would fall to it if every item were split evenly between its holders, or the heaviest item to be placed where that is
more, and a sixteenth on top; where an item fits none of its holders the bound rises. So few items, those at the edge,
move on account of others.

All of it is integer arithmetic, but for bounds, which are products rounded once: every machine decides the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardbook.core.columns import Int64Array
from shardbook.core.mixing import UInt64Array, mix
from shardbook.core.ragged import firsts_of, group_reduce, rows_of

#: An item counts as no heavier than this, 64 GiB: sums of weights stay below 2**63.
MAX_WEIGHT_BYTES = 1 << 36
#: The low bits of a score hold the rank: a score names its holder, and no two holders of an item have the same.
#: Enough for ``limits.MAX_WORLD_SIZE``, but a constant of the algorithm: with other bits other ranks are elected.
_RANK_MASK = np.uint64((1 << 20) - 1)
_RANK_SALT = np.uint64(0x5368617264626B31)
_HIGHEST = np.uint64(2**64 - 1)
#: How far a rank may exceed its fair share, at first.
_SLACK = 1.0 / 16.0
#: Choices tried before the bound rises.
_CHOICES_PER_BOUND = 12
#: (item, holder) pairs scored at a time: what stays in a core's cache.
_PAIRS_PER_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class Election:
    """Items and who holds them; ranks with equal plans hold the same items.

    Attributes:
        hashes: (K,) hash of each item.
        weights: (K,) bytes of each item, 1 to ``MAX_WEIGHT_BYTES``.
        firsts: (K + 1,) where the plans that hold each item begin in ``plan``.
        plan: (H,) plans that hold each item, each once.
        ranks: (R,) ranks that take part, climbing.
        plan_of_rank: (R,) plan of each of them; every plan has a rank.
        alone: (R,) bytes that each writes because nobody else holds them.
    """

    hashes: UInt64Array
    weights: Int64Array
    firsts: Int64Array
    plan: Int64Array
    ranks: Int64Array
    plan_of_rank: Int64Array
    alone: Int64Array


def elect(election: Election) -> Int64Array:
    """Returns (K,) the rank that writes each item."""
    holders = _Holders(election)
    bounds = (holders.fair_shares() + election.alone).astype(np.float64)
    writer = np.zeros(len(election.hashes), dtype=np.int64)
    loads = election.alone.copy()
    size_class = np.frexp(election.weights.astype(np.float64))[1]
    for size in np.unique(size_class)[::-1].tolist():
        pending = np.flatnonzero(size_class == size)
        slack = _SLACK
        while len(pending):
            # No bound is of use that is smaller than the item itself: some rank has to write it.
            heaviest = float(election.weights[pending].max())
            pending = _place(holders, pending, loads, np.maximum(bounds, heaviest) * (1.0 + slack), writer)
            slack *= 2.0
    return writer


def _place(
    holders: _Holders, pending: Int64Array, loads: Int64Array, bounds: npt.NDArray[np.float64], writer: Int64Array
) -> Int64Array:
    """Places what fits within ``bounds`` of ``pending``, adds it to ``loads`` and ``writer``; returns the rest.

    Bounds and loads are (R,), of the ranks that take part.
    """
    hashes, weights = holders.election.hashes, holders.election.weights
    refused = []
    below = np.full(len(pending), _HIGHEST, dtype=np.uint64)
    for _ in range(_CHOICES_PER_BOUND):
        scores = holders.best(pending, below)
        refused.append(pending[scores == 0])
        pending, scores = pending[scores > 0], scores[scores > 0]
        if not len(pending):
            break
        chosen = np.searchsorted(holders.election.ranks, (scores & _RANK_MASK).astype(np.int64))
        order = np.lexsort((hashes[pending], -weights[pending], chosen))
        pending, scores, chosen = pending[order], scores[order], chosen[order]
        asked = firsts_of(np.bincount(chosen))
        upto = np.cumsum(weights[pending])
        upto -= (upto - weights[pending])[asked[chosen]]
        fits = loads[chosen] + upto <= bounds[chosen]
        writer[pending[fits]] = holders.election.ranks[chosen[fits]]
        np.add.at(loads, chosen[fits], weights[pending[fits]])
        pending, below = pending[~fits], scores[~fits]
    return np.concatenate([*refused, pending])


class _Holders:
    """Who holds the items of an election, down to ranks. Pairs of items and ranks are never all in memory."""

    def __init__(self, election: Election) -> None:
        self.election = election
        ranks_of_plan = np.bincount(election.plan_of_rank)
        self._plan_firsts = firsts_of(ranks_of_plan)
        self._ranks = election.ranks[np.argsort(election.plan_of_rank, kind="stable")].astype(np.uint64)
        self._salts = mix(self._ranks ^ _RANK_SALT)
        self._row_counts = np.diff(election.firsts)
        #: (K,) ranks that hold each item.
        self.counts = group_reduce(np.add, ranks_of_plan[election.plan].astype(np.int64), self._row_counts)

    def fair_shares(self) -> Int64Array:
        """Returns (R,) the bytes of each rank when every item is split evenly between its holders."""
        share = -(-self.election.weights // self.counts)
        of_plan = np.zeros(len(self._plan_firsts) - 1, dtype=np.int64)
        np.add.at(of_plan, self.election.plan, np.repeat(share, self._row_counts))
        shares: Int64Array = of_plan[self.election.plan_of_rank]
        return shares

    def best(self, items: Int64Array, below: UInt64Array) -> UInt64Array:
        """Returns the highest score under ``below`` of each of ``items``; 0 where every holder was tried."""
        out = np.zeros(len(items), dtype=np.uint64)
        upto = np.cumsum(self.counts[items])
        at = 0
        while at < len(items):
            done = int(upto[at - 1]) if at else 0
            stop = max(at + 1, int(np.searchsorted(upto, done + _PAIRS_PER_BLOCK, side="right")))
            out[at:stop] = self._best(items[at:stop], below[at:stop])
            at = stop
        return out

    def _best(self, items: Int64Array, below: UInt64Array) -> UInt64Array:
        rows = rows_of(self.election.firsts[items], self._row_counts[items])
        plans = self.election.plan[rows]
        firsts = self._plan_firsts[plans]
        at = rows_of(firsts, self._plan_firsts[plans + 1] - firsts)
        counts = self.counts[items]
        scores = mix(np.repeat(self.election.hashes[items], counts) ^ self._salts[at])
        scores = scores & ~_RANK_MASK | self._ranks[at]
        scores[scores >= np.repeat(below, counts)] = 0
        return group_reduce(np.maximum, scores, counts)
