"""What the ranks of a save took and wrote: columns over ranks, and what stands out in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from shardbook.core import limits
from shardbook.core.columns import ByteReader, ByteWriter, Int64Array, frame, unframe
from shardbook_server.service.describing import PHASES
from shardbook_server.service.views import PhaseTiming, SaveTiming

_VERSION: Final = 1
_UINT32: Final = np.dtype("<u4")


@dataclass(frozen=True, eq=False)
class RankStats:
    """What ranks took and wrote, as columns.

    Attributes:
        phase_ms: (3, N) milliseconds by phase and rank; 0 where a rank did not say.
        size_bytes: (N,) bytes that each rank wrote.
    """

    phase_ms: Int64Array
    size_bytes: Int64Array

    @classmethod
    def of(cls, phases: Sequence[bytes | None], size_bytes: Sequence[int]) -> RankStats:
        """Returns columns of what was staged for each rank."""
        unknown = bytes(len(PHASES) * _UINT32.itemsize)
        packed = np.frombuffer(b"".join(one or unknown for one in phases), _UINT32)
        return cls(packed.reshape(-1, len(PHASES)).T.astype(np.int64), np.array(size_bytes, np.int64))

    def slowest(self) -> tuple[int, ...]:
        """Returns the slowest rank of each phase, the lowest of several."""
        return tuple(self.phase_ms.argmax(axis=1).tolist())

    def encode(self) -> bytes:
        """Returns the columns packed: some 5 bytes a rank, as times have little in common."""
        writer = ByteWriter()
        writer.byte(_VERSION)
        writer.varint(len(self.size_bytes))
        for column in self.phase_ms:
            writer.column(column, delta=False)
        writer.column(self.size_bytes, delta=True)
        return frame(writer.finish())

    @classmethod
    def decode(cls, payload: bytes) -> RankStats:
        """Returns the columns that ``encode`` packed."""
        reader = ByteReader(unframe(payload))
        reader.byte()
        count = reader.varint(limits.MAX_WORLD_SIZE, "the number of ranks")
        phase_ms = np.stack([reader.column(count, delta=False) for _ in PHASES])
        stats = cls(phase_ms, reader.column(count, delta=True))
        reader.end()
        return stats

    def timing(self, hosts: Mapping[int, str], commit_ms: int) -> SaveTiming:
        """Returns what stands out.

        Args:
            hosts: Of the slowest ranks, as far as they are known.
            commit_ms: What the service took.
        """
        medians = np.median(self.phase_ms, axis=1).astype(np.int64).tolist()
        phases = tuple(
            PhaseTiming(name, int(self.phase_ms[at, rank]), rank, hosts.get(rank, ""), medians[at])
            for at, (name, rank) in enumerate(zip(PHASES, self.slowest(), strict=True))
        )
        largest = int(self.size_bytes.argmax())
        return SaveTiming(
            phases if self.phase_ms.any() else (),
            commit_ms,
            int(self.size_bytes[largest]),
            largest,
            int(np.median(self.size_bytes)),
        )


def timing_so_far(measured: Sequence[tuple[int, int, bytes | None]], hosts: Mapping[int, str]) -> SaveTiming | None:
    """Returns what stands out among the ranks of an open attempt that are registered; None while none said.

    Args:
        measured: Rank, bytes and packed milliseconds of each, in the order of ranks.
        hosts: By rank, as far as they are known.
    """
    said = [one for one in measured if one[2] is not None]
    if not said:
        return None
    ranks = [rank for rank, _, _ in said]
    stats = RankStats.of([phases for _, _, phases in said], [size for _, size, _ in said])
    timing = stats.timing({at: hosts.get(rank, "") for at, rank in enumerate(ranks)}, 0)
    phases = tuple(replace(one, slowest_rank=ranks[one.slowest_rank]) for one in timing.phases)
    return replace(timing, phases=phases, largest_rank=ranks[timing.largest_rank])


def pack_phases(phase_ms: Sequence[int]) -> bytes | None:
    """Returns a rank's milliseconds as they are staged; None when it did not say."""
    return np.array(phase_ms, _UINT32).tobytes() if phase_ms else None


def timing_to_json(timing: SaveTiming) -> str:
    """Returns what stands out as it is stored."""
    phases = [[one.phase, one.slowest_ms, one.slowest_rank, one.slowest_host, one.median_ms] for one in timing.phases]
    values = [phases, timing.commit_ms, timing.largest_rank_bytes, timing.largest_rank, timing.median_rank_bytes]
    return json.dumps(values, separators=(",", ":"))


def timing_from_json(text: str) -> SaveTiming | None:
    """Returns what was stored; None for nothing."""
    if not text:
        return None
    # Releases to come may add to both lists.
    phases, *rest = json.loads(text)
    return SaveTiming(tuple(PhaseTiming(*one[:5]) for one in phases), *rest[:4])
