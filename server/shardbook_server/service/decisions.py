"""Who writes what, remembered: a decision is made once for the same plans in the same order, then found again.

By other saves, other jobs of the project, other replicas, and after a restart. What is kept in memory is bounded;
a world's decision is stored in segments of ranks, so that a replica that forgot it reads the asking rank's only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import numpy as np
import structlog

from shardbook.core import limits
from shardbook.core.decisions import decode_drops, encode_drops
from shardbook.core.digest import ordered_digest
from shardbook.core.planning import ALGORITHM_VERSION, ITEMS_AT_ONCE, decide
from shardbook.core.ragged import part_items
from shardbook.core.structure import BlobKind
from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook_server.service.admission import MemoryBudget, SingleFlight
from shardbook_server.service.blobs import BlobService
from shardbook_server.service.lru import BoundedCache
from shardbook_server.service.types import BlobRef
from shardbook_server.storage import decisions as decision_rows
from shardbook_server.storage.blobs import DAY_US
from shardbook_server.storage.database import Connection, Database

#: Bytes of decisions kept in memory.
_CACHE_BYTES: Final = 64 << 20
#: What an item of a plan takes while it is decided about, with the plan itself, and what one of the part that is being
#: looked at takes on top, bytes.
_BYTES_PER_ITEM: Final = 80
_BYTES_PER_SEEN: Final = 176
#: What a rank's part costs in memory beside its bits.
_PER_RANK_BYTES: Final = 64

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Question:
    """Plans of a whole attempt.

    Attributes:
        project: Name of the project.
        project_id: Its key.
        digests: The plan of every rank, by rank.
        to_lowest_rank: True to have every item written by the lowest rank that holds it.
    """

    project: str
    project_id: int
    digests: Sequence[bytes]
    to_lowest_rank: bool

    @cached_property
    def key(self) -> DecisionKey:
        """Its address: the same plans in the same order have the same decision."""
        domain = f"decision/{ALGORITHM_VERSION}/{int(self.to_lowest_rank)}"
        return DecisionKey(self.project_id, ordered_digest(domain, self.digests), len(self.digests))


@dataclass(frozen=True)
class DecisionKey:
    """Address of a decision.

    Attributes:
        project_id: Key of its project.
        digest: Over version, options and the ordered plans.
        world_size: Ranks that it is about.
    """

    project_id: int
    digest: bytes
    world_size: int


class DecisionService:
    """Decides, stores and finds decisions. Thread-safe."""

    def __init__(self, database: Database, blobs: BlobService, memory: MemoryBudget) -> None:
        """Starts with nothing in memory."""
        self._database = database
        self._blobs = blobs
        self._memory = memory
        self._segments: BoundedCache[tuple[DecisionKey, int], tuple[bytes, ...]] = BoundedCache(_CACHE_BYTES)
        self._flight = SingleFlight()

    def held(self, key: DecisionKey, rank: int) -> bytes | None:
        """Returns what a rank drops where that is in memory; never waits."""
        first = _first_of(rank)
        segment = self._segments.get((key, first))
        return None if segment is None else segment[rank - first]

    def find(self, key: DecisionKey, rank: int) -> bytes | None:
        """Returns what a rank drops where that was decided before; reads the database."""
        held = self.held(key, rank)
        if held is not None:
            return held
        first = _first_of(rank)
        with self._database.read() as connection:
            stored = decision_rows.find_segment(connection, key.project_id, key.digest, first)
            today = self._database.now_us(connection) // DAY_US
        if stored is None:
            return None
        drops = _decoded(stored.payload, min(limits.SEGMENT_RANKS, key.world_size - first))
        if drops is None:
            return None
        self._keep(key, first, drops)
        if stored.last_used_day < today:
            self._try(key, decision_rows.touch)
        return drops[rank - first]

    def decide(self, question: Question, rank: int) -> bytes:
        """Returns what a rank drops; decided once, whoever asks first, while others wait for it.

        CPU work when nobody has decided yet.
        """
        with self._flight.alone(question.key):
            found = self.find(question.key, rank)
            return self._compute(question)[rank] if found is None else found

    def _compute(self, question: Question) -> list[bytes]:
        distinct = {digest: at for at, digest in enumerate(dict.fromkeys(question.digests))}
        index = np.fromiter((distinct[digest] for digest in question.digests), np.int64, len(question.digests))
        items = self._item_count(question, list(distinct))
        with self._memory.hold(items * _BYTES_PER_ITEM + part_items(items, ITEMS_AT_ONCE) * _BYTES_PER_SEEN):
            plans = self._blobs.plans(question.project, list(distinct))
            decided = decide(plans, index, save_to_lowest_rank=question.to_lowest_rank)
            drops = [np.packbits(drop).tobytes() if drop.any() else b"" for drop in decided]
        key, segments = question.key, []
        for first in range(0, len(drops), limits.SEGMENT_RANKS):
            some = drops[first : first + limits.SEGMENT_RANKS]
            self._keep(key, first, some)
            segments.append((first, encode_drops(some)))
        self._try(key, partial(decision_rows.insert_decision, segments=segments))
        return drops

    def _item_count(self, question: Question, digests: Sequence[bytes]) -> int:
        """Returns the items of plans without loading them; plans of the first releases count as empty."""
        refs = [BlobRef(BlobKind.PLAN, digest) for digest in digests]
        with self._database.read() as connection:
            rows = self._blobs.find(connection, question.project, question.project_id, refs)
        return sum(row.item_count for row in rows.values())

    def _keep(self, key: DecisionKey, first: int, drops: Sequence[bytes]) -> None:
        self._segments.put((key, first), tuple(drops), sum(map(len, drops)) + _PER_RANK_BYTES * len(drops))

    def _try(self, key: DecisionKey, write: Callable[[Connection, int, bytes, int], None]) -> None:
        """Stores a decision, or that it is in use. A rank is not refused its answer because that cannot be written."""
        try:
            with self._database.write(lock=f"decisions/{key.project_id}") as connection:
                write(connection, key.project_id, key.digest, self._database.now_us(connection))
        except ShardbookError as error:
            _log.warning("a decision is not stored, it will be made anew", reason=error.reason)


def _first_of(rank: int) -> int:
    return rank - rank % limits.SEGMENT_RANKS


def _decoded(payload: bytes, count: int) -> list[bytes] | None:
    """Returns the parts of ``count`` ranks; None where the row is damaged: then it is decided anew."""
    try:
        drops = decode_drops(payload)
    except InvalidArgumentError as error:
        _log.error("a stored decision is damaged, it is made anew", error=str(error))
        return None
    return drops if len(drops) == count else None
