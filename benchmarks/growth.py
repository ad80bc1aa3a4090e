"""1,000 checkpoints of one run of 256 ranks: does the next save cost what the first ones did?

Simulated ranks with the payloads of ``W(256, 1000, 256)`` plan, register and commit through one server on SQLite; the
structure is the same in every save. Early, in the middle and at the end a window of saves is timed, beside as many
empty calls, and it is looked at what the database holds (pages in use and free ones apart, the write-ahead log), how
large the server is, and what the latest page of the catalogue takes. A cold save comes before all windows. The ranks
have tensors only: pickled objects, whose lengths change from save to save, would add their lengths.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.common import Goal, Report, parse_arguments, rss_bytes
from benchmarks.places import places
from benchmarks.postgres import free_port
from benchmarks.simulated import Ranks, Server, connected, held_bytes, rank_payloads, running_server
from benchmarks.workload import Workload
from shardbook.v1 import catalog_pb2, catalog_pb2_grpc

_RUN: Final = "projects/bench/runs/growth"
_PAGES: Final = 20
FLAT: Final = Goal("<=", 1.2)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        workload: What is saved.
        saves: Checkpoints after the cold one.
        window: Saves of a window.
    """

    workload: Workload
    saves: int
    window: int

    def windows(self) -> dict[str, range]:
        """Returns the saves of each window."""
        middle = (self.saves - self.window) // 2
        firsts = {"first": 0, "middle": middle, "last": self.saves - self.window}
        return {name: range(first + 1, first + 1 + self.window) for name, first in firsts.items()}


FULL: Final = Sizes(Workload(256, 1000, 256), saves=1000, window=100)
QUICK: Final = Sizes(Workload(64, 250, 64), saves=60, window=15)


@dataclass(frozen=True)
class Held:
    """What there is after a save.

    Attributes:
        used_bytes: Pages of the database that hold something.
        free_bytes: Pages that held something and are used next.
        log_bytes: Write-ahead log; it is reused from its beginning once it has been copied back.
        rss_bytes: Resident memory of the server.
        list_s: Time of the catalogue's latest page at the client, median, seconds.
    """

    used_bytes: int
    free_bytes: int
    log_bytes: int
    rss_bytes: int
    list_s: float


@dataclass
class Window:
    """Saves one after the other, seconds, and what there was after the last."""

    save_s: list[float] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    empty_s: list[float] = field(default_factory=list)
    held: Held | None = None


@dataclass
class Grown:
    """The windows by name, and what there was after the cold save."""

    cold: Held
    windows: dict[str, Window]


async def _grow(server: Server, database: Path, sizes: Sizes) -> Grown:
    async with connected(server.address) as channel:
        ranks = Ranks(channel, rank_payloads(sizes.workload), _RUN, planning=True)
        catalog: Any = catalog_pb2_grpc.CatalogServiceStub(channel)
        await ranks.start()
        await ranks.save(0)
        windows = sizes.windows()
        grown = Grown(await _held(server, database, catalog), {name: Window() for name in windows})
        for step in range(1, sizes.saves + 1):
            save_s = await ranks.save(step)
            for name, steps in windows.items():
                if step in steps:
                    window = grown.windows[name]
                    window.save_s.append(save_s)
                    window.commit_s.append(ranks.commit_s)
                    window.empty_s.append(await ranks.empty_calls())
                if step == steps[-1]:
                    grown.windows[name].held = await _held(server, database, catalog)
        return grown


async def _held(server: Server, database: Path, catalog: Any) -> Held:
    resident_bytes = rss_bytes(server.process.pid)
    request = catalog_pb2.ListCheckpointsRequest(parent=f"{_RUN}/parts/default")
    times = []
    for _ in range(_PAGES):
        begin = time.perf_counter()
        page = await catalog.ListCheckpoints(request)
        times.append(time.perf_counter() - begin)
        if not page.checkpoints:
            raise RuntimeError("the catalogue lists nothing")
    used_bytes, free_bytes = held_bytes(database)
    log = database.with_name(database.name + "-wal")
    return Held(
        used_bytes,
        free_bytes,
        log.stat().st_size if log.exists() else 0,
        resident_bytes,
        statistics.median(times),
    )


def measure(sizes: Sizes) -> Report:
    """Returns the report."""
    with places(postgres=False) as (sqlite,), running_server(sqlite.database, free_port()) as server:
        grown = asyncio.run(_grow(server, Path(sqlite.database), sizes))
    report = Report(
        "growth",
        {
            "durability": "SQLite WAL, synchronous=FULL",
            "workload": str(sizes.workload),
            "checkpoints": sizes.saves + 1,
            "saves in a window": sizes.window,
        },
    )
    _rows(report, sizes, grown)
    _ratios(report, sizes, grown)
    return report


def _rows(report: Report, sizes: Sizes, grown: Grown) -> None:
    for name, window in grown.windows.items():
        kinds = {"whole save": window.save_s, "commit": window.commit_s, "empty calls": window.empty_s}
        for what, values in kinds.items():
            report.row(window=name, what=what, median_s=statistics.median(values), min_s=min(values), max_s=max(values))
    saved = {"cold": 0} | {name: steps[-1] for name, steps in sizes.windows().items()}
    for name, held in _helds(grown).items():
        added_bytes = held.used_bytes - grown.cold.used_bytes
        report.row(
            window=name,
            what="after it",
            checkpoints=saved[name] + 1,
            used_bytes=held.used_bytes,
            used_bytes_a_checkpoint=round(added_bytes / saved[name], 1) if saved[name] else None,
            free_bytes=held.free_bytes,
            log_bytes=held.log_bytes,
            server_rss_bytes=held.rss_bytes,
            latest_page_s=held.list_s,
        )


def _helds(grown: Grown) -> dict[str, Held]:
    helds = {name: window.held for name, window in grown.windows.items()}
    return {"cold": grown.cold} | {name: held for name, held in helds.items() if held is not None}


def _ratios(report: Report, sizes: Sizes, grown: Grown) -> None:
    first, last = grown.windows["first"], grown.windows["last"]
    save = statistics.median(last.save_s) / statistics.median(first.save_s)
    commit = statistics.median(last.commit_s) / statistics.median(first.commit_s)
    floor = statistics.median(last.empty_s) / statistics.median(first.empty_s)
    report.ratio("whole save, last / first window", save, FLAT)
    report.ratio("commit, last / first window", commit, FLAT)
    # What the machine did meanwhile, which is no growth.
    report.ratio("empty calls, last / first window", floor)
    helds = _helds(grown)
    stored = (helds["last"].used_bytes - grown.cold.used_bytes) / sizes.saves
    report.ratio("bytes stored a checkpoint", stored)
    report.ratio("bytes stored a rank and save", stored / sizes.workload.ranks, Goal("<=", 100))
    report.ratio("write-ahead log, last / first window", helds["last"].log_bytes / max(helds["first"].log_bytes, 1))
    report.ratio("server RSS, last / first window", helds["last"].rss_bytes / helds["first"].rss_bytes)
    report.ratio("latest page, last / first window", helds["last"].list_s / helds["first"].list_s)
    is_flat = FLAT.met(save) and FLAT.met(commit)
    print(f"{sizes.saves} checkpoints: saves {'stay flat' if is_flat else 'GROW'} (goal: {FLAT} of the first window)")


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    return measure(QUICK if arguments.quick else FULL).finish(check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
