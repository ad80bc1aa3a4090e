"""A save of up to 16,384 simulated ranks: cold, warm, and warm after a restart of the server, on both databases.

Every rank makes the calls of a real one: PlanSave until all are decided, then RegisterShards, whose answer brings the
commit; the coordinator commits. Client processes and server share the machine. The floor is as many empty calls from
the same client processes to the same server, in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass

from benchmarks.common import Goal, Report, add_arguments
from benchmarks.fleet import PROCESSES, Fleet, fleet
from benchmarks.layouts import Layout, fsdp, hsdp, llama_405b
from benchmarks.places import DURABILITY, Place, places
from benchmarks.postgres import free_port
from benchmarks.routes import RANKS_PER_CHANNEL
from benchmarks.simulated import Server, running_server

#: Warm saves of a round, before and after the restart.
WARM_SAVES = 3
#: Calls of a rank in a save whose structure is known.
CALLS = 2

LAYOUTS: dict[str, Layout] = {
    "fsdp-64": fsdp(64),
    "fsdp-256": fsdp(256),
    "fsdp-1024": fsdp(1024),
    "fsdp-8960": fsdp(8960),
    "fsdp-16384": fsdp(16384),
    "405b-1024": llama_405b(scale=16),
    "405b-8192": llama_405b(scale=2),
    "405b-16384": llama_405b(),
    "hsdp-1024": hsdp(replicas=32, shards=32),
    "hsdp-8960": hsdp(replicas=35, shards=256),
    "hsdp-16384": hsdp(replicas=32, shards=512),
}
QUICK = ("fsdp-64", "405b-1024")


@dataclass(frozen=True)
class Saved:
    """One save of all ranks.

    Attributes:
        plan_s: Until the last rank knew what it writes.
        register_s: From there, registration and commit, until the last rank knew of the commit.
        server_cpu_s: Processor time of the server in both.
        sent_bytes: Bytes of the requests.
        calls: Calls made, the commit not counted.
    """

    plan_s: float
    register_s: float
    server_cpu_s: float
    sent_bytes: int
    calls: int

    @property
    def total_s(self) -> float:
        """Coordination in all; what ranks compute and write between the two is not in it."""
        return self.plan_s + self.register_s


@dataclass(frozen=True)
class Measured:
    """What was measured of one layout on one database."""

    cold: Saved
    warm: list[Saved]
    restarted: list[Saved]
    floors: list[float]
    chunks: int
    idle_rss_bytes: int
    peak_rss_bytes: int
    stored_cold_bytes: int
    stored_warm_bytes: float


def save(ranks: Fleet, server: Server, step: int) -> tuple[Saved, int]:
    """Saves one step; returns what it took and how many items were kept by all ranks together."""
    ranks.begin(step)
    cpu_s = server.cpu_s
    planned = ranks.ask("plan")
    planned_cpu_s = server.cpu_s - cpu_s
    kept = ranks.ask("write").calls
    cpu_s = server.cpu_s
    registered = ranks.ask("register", meanwhile=ranks.commit)
    return (
        Saved(
            planned.time_s,
            registered.time_s,
            planned_cpu_s + server.cpu_s - cpu_s,
            planned.sent_bytes + registered.sent_bytes,
            planned.calls + registered.calls,
        ),
        kept,
    )


def measure(layout: Layout, place: Place) -> Measured:
    """Runs one layout on a fresh database."""
    before_bytes = place.stored_bytes()
    with running_server(place.database, free_port()) as server, fleet(layout, server.address) as ranks:
        idle_bytes = server.peak_rss_bytes
        floors = [ranks.ask("empty", CALLS).time_s]
        cold, chunks = save(ranks, server, 0)
        cold_bytes = place.stored_bytes()
        warm = [save(ranks, server, step)[0] for step in range(1, 1 + WARM_SAVES)]
        floors.append(ranks.ask("empty", CALLS).time_s)
        warm_bytes = (place.stored_bytes() - cold_bytes) / WARM_SAVES
        peak_bytes = server.peak_rss_bytes
    with running_server(place.database, free_port()) as server, fleet(layout, server.address) as ranks:
        floors.append(ranks.ask("empty", CALLS).time_s)
        restarted = [save(ranks, server, step)[0] for step in range(WARM_SAVES + 1, 2 * WARM_SAVES + 1)]
        floors.append(ranks.ask("empty", CALLS).time_s)
        peak_bytes = max(peak_bytes, server.peak_rss_bytes)
    return Measured(
        cold, warm, restarted, floors, chunks, idle_bytes, peak_bytes, cold_bytes - before_bytes, warm_bytes
    )


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only this one; may be given again")
    parser.add_argument("--sqlite-only", action="store_true", help="leave Postgres out")
    arguments = parser.parse_args()
    names = arguments.layout or (QUICK if arguments.quick else tuple(LAYOUTS))
    report = Report(
        "save_scale",
        {
            "durability": DURABILITY,
            "client processes": PROCESSES,
            "ranks per connection": RANKS_PER_CHANNEL,
            "warm saves": WARM_SAVES,
        },
    )
    for name in names:
        with places(postgres=not (arguments.sqlite_only or arguments.quick)) as found:
            for place in found:
                _report(report, name, place, measure(LAYOUTS[name], place))
    return report.finish(check=arguments.check)


def _report(report: Report, name: str, place: Place, found: Measured) -> None:
    layout = LAYOUTS[name]
    ranks = layout.ranks
    for what, saves in (("cold", [found.cold]), ("warm", found.warm), ("restarted", found.restarted)):
        report.row(
            layout=layout.name,
            ranks=ranks,
            database=place.name,
            save=what,
            total_s=statistics.median(one.total_s for one in saves),
            min_s=min(one.total_s for one in saves),
            max_s=max(one.total_s for one in saves),
            plan_s=statistics.median(one.plan_s for one in saves),
            register_s=statistics.median(one.register_s for one in saves),
            server_cpu_s=statistics.median(one.server_cpu_s for one in saves),
            sent_B_rank=round(saves[0].sent_bytes / ranks),
            calls_rank=round(saves[0].calls / ranks, 2),
        )
    floor_s = statistics.median(found.floors)
    report.row(
        layout=layout.name,
        ranks=ranks,
        database=place.name,
        save=f"floor: {CALLS} empty calls a rank",
        total_s=floor_s,
        min_s=min(found.floors),
        max_s=max(found.floors),
    )
    report.row(
        layout=layout.name,
        ranks=ranks,
        database=place.name,
        save=f"{found.chunks:,} chunks; server RSS idle {found.idle_rss_bytes >> 20} MiB",
        peak_rss_MiB=found.peak_rss_bytes >> 20,
        stored_cold_bytes=found.stored_cold_bytes,
        stored_later_B_rank=round(found.stored_warm_bytes / ranks, 1),
    )
    key = f"{name} {place.name}"
    cold_s = found.cold.total_s
    warm_s = statistics.median(one.total_s for one in found.warm)
    again_s = statistics.median(one.total_s for one in found.restarted)
    is_goal_shape = name == "405b-16384"
    report.ratio(f"{key}: cold, seconds", cold_s, Goal("<=", 30) if is_goal_shape else None)
    report.ratio(f"{key}: warm, seconds", warm_s, Goal("<=", 10) if is_goal_shape else None)
    report.ratio(f"{key}: warm / empty calls", warm_s / floor_s, Goal("<=", 1.5))
    report.ratio(f"{key}: warm after a restart / empty calls", again_s / floor_s, Goal("<=", 1.5))
    if is_goal_shape:
        report.ratio(f"{key}: server peak RSS, GB", found.peak_rss_bytes / 1e9, Goal("<=", 1))
    if place.name == "SQLite" and ranks >= 256:
        report.ratio(f"{key}: bytes stored a chunk, cold", found.stored_cold_bytes / found.chunks, Goal("<=", 3))
        report.ratio(f"{key}: bytes stored a rank, later saves", found.stored_warm_bytes / ranks, Goal("<=", 100))


if __name__ == "__main__":
    sys.exit(main())
