"""One round of saves of simulated ranks through a real server: cold, warm, warm after a restart, and the floor."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from typing import Final

from benchmarks.common import rss_bytes
from benchmarks.places import Place
from benchmarks.postgres import free_port
from benchmarks.simulated import RankPayload, Ranks, connected, running_server

#: Page of the SQLite database.
PAGE_BYTES: Final = 16 << 10
#: Warm saves in one round; what later saves store is measured over them.
WARM_SAVES: Final = 10
_RUN: Final = "projects/bench/runs/roundtrip"


@dataclass(frozen=True)
class Saves:
    """What the saves of one round through Shardbook took.

    Attributes:
        cold_s: First save of a fresh database.
        warm_s: Save of known structures, median.
        restarted_s: First save after the server was restarted.
        floor_s: As many empty calls as a warm save makes, median of those before and between the saves.
        cold_sent_bytes: Bytes of the cold save's requests.
        cold_stored_bytes: By how much it made the database grow.
        warm_stored_bytes: Bytes that each rank of a later save adds, at most.
        idle_rss_bytes: Resident memory of the server before it.
        peak_rss_bytes: Largest of the server until after it.
        cpu_s: Processor time of the server in it and its floor.
    """

    cold_s: float
    warm_s: float
    restarted_s: float
    floor_s: float
    cold_sent_bytes: int
    cold_stored_bytes: int
    warm_stored_bytes: float
    idle_rss_bytes: int
    peak_rss_bytes: int
    cpu_s: float


def through_shardbook(payloads: list[RankPayload], place: Place, *, planning: bool = False) -> Saves:
    """Returns the figures of one round on a fresh database; with ``planning`` ranks ask what to write, too."""
    empty_bytes = place.stored_bytes()
    with running_server(place.database, free_port()) as server:
        idle_bytes, cpu_s = rss_bytes(server.process.pid), server.cpu_s
        cold_s, sent_bytes, floors = asyncio.run(_cold(server.address, payloads, planning))
        cpu_s = server.cpu_s - cpu_s
        peak_bytes = server.peak_rss_bytes
    cold_bytes = place.stored_bytes()
    with running_server(place.database, free_port()) as server:
        restarted_s, warm_s, more_floors = asyncio.run(_warm(server.address, payloads, planning))
    # A page more than was seen: what the last one has room for may have been filled.
    later_bytes = (place.stored_bytes() - cold_bytes + PAGE_BYTES) / (WARM_SAVES * len(payloads))
    return Saves(
        cold_s,
        warm_s,
        restarted_s,
        statistics.median(floors + more_floors),
        sent_bytes,
        cold_bytes - empty_bytes,
        later_bytes,
        idle_bytes,
        peak_bytes,
        cpu_s,
    )


async def _cold(address: str, payloads: list[RankPayload], planning: bool) -> tuple[float, int, list[float]]:
    async with connected(address) as channel:
        ranks = Ranks(channel, payloads, _RUN, planning=planning)
        await ranks.start()
        floors = [await ranks.empty_calls() for _ in range(3)]
        cold_s = await ranks.save(0)
        return cold_s, ranks.sent_bytes, floors


async def _warm(address: str, payloads: list[RankPayload], planning: bool) -> tuple[float, float, list[float]]:
    async with connected(address) as channel:
        ranks = Ranks(channel, payloads, _RUN, known=True, planning=planning)
        await ranks.start()
        times, floors = [], []
        for step in range(1, WARM_SAVES + 1):
            times.append(await ranks.save(step))
            floors.append(await ranks.empty_calls())
        return times[0], statistics.median(times[1:]), floors
