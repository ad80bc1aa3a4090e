"""One save of the same plans: through DCP's coordinator, and through Shardbook (register all ranks, commit).

Shardbook's side is a real server process on SQLite with ``synchronous=FULL``, real gRPC calls, blobs sent where the
server lacks them. Three saves: cold (nothing known), warm (the same structures again), warm after a server restart.
The floor is as many empty gRPC calls to the same server in the same run.
"""

from __future__ import annotations

import statistics
import sys

from benchmarks.common import Goal, Report, in_fresh_process, parse_arguments
from benchmarks.dcp_peer import coordinate
from benchmarks.places import places
from benchmarks.saves import Saves, through_shardbook
from benchmarks.simulated import RankPayload, rank_payloads
from benchmarks.workload import STANDARD, Workload


def _round(payloads: list[RankPayload]) -> Saves:
    with places(postgres=False) as (sqlite,):
        return through_shardbook(payloads, sqlite)


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    sizes = ("a",) if arguments.quick else ("a", "b")
    rounds = 1 if arguments.quick else 3
    report = Report(
        "roundtrip",
        {"durability": "SQLite WAL, synchronous=FULL; .metadata fsynced", "rounds": rounds, "in_flight": 64},
    )
    for size in sizes:
        _measure(report, size, rounds)
    return report.finish(check=arguments.check)


def _measure(report: Report, size: str, rounds: int) -> None:
    workload = Workload(*STANDARD[size])
    payloads = rank_payloads(workload)
    saves: list[Saves] = []
    peers: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(rounds):
        saves.append(_round(payloads))
        for collector, runs in peers.items():
            runs.append(in_fresh_process(coordinate, workload, collector).value)
    cold_s = statistics.median(save.cold_s for save in saves)
    _rows(report, str(workload), saves, peers)
    for collector, goal in ((True, {"a": 35, "b": 100}), (False, {"a": 15, "b": 45})):
        peer_s = statistics.median(run["total_s"] for run in peers[collector])
        name = f"{size}: DCP coordinator (gc {'on' if collector else 'off'}) / Shardbook cold"
        report.ratio(name, peer_s / cold_s, Goal(">=", goal[size]))
    rss = statistics.median(run["peak_rss_bytes"] for run in peers[True])
    report.ratio(f"{size}: peak RSS, DCP / server", rss / max(save.peak_rss_bytes for save in saves), Goal(">=", 1))
    chunks = workload.chunk_count
    # What does not grow with the ranks (names, shapes, pages of the schema) weighs on the small workload.
    stored = max(s.cold_stored_bytes for s in saves) / chunks
    report.ratio(f"{size}: bytes stored a chunk", stored, Goal("<=", 3) if size != "a" else None)
    report.ratio(f"{size}: bytes sent a chunk, cold", max(s.cold_sent_bytes for s in saves) / chunks)
    second = max(payload.payload_bytes for payload in payloads)
    report.ratio(f"{size}: payload bytes a rank, second save", second, Goal("<=", 60))
    report.ratio(
        f"{size}: bytes stored a rank and later save, at most", max(s.warm_stored_bytes for s in saves), Goal("<=", 100)
    )
    floor_s = statistics.median(save.floor_s for save in saves)
    report.ratio(f"{size}: warm save / empty calls", statistics.median(s.warm_s for s in saves) / floor_s)


def _rows(report: Report, workload: str, saves: list[Saves], peers: dict[bool, list[dict[str, float]]]) -> None:
    def stats(values: list[float]) -> dict[str, float]:
        return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}

    peak = max(save.peak_rss_bytes for save in saves)
    for name in ("cold_s", "warm_s", "restarted_s", "floor_s"):
        row = stats([getattr(save, name) for save in saves])
        moved = saves[0].cold_sent_bytes if name == "cold_s" else None
        report.row(workload=workload, what=f"Shardbook {name[:-2]}", **row, moved_bytes=moved, peak_rss_bytes=peak)
    for collector, runs in peers.items():
        report.row(
            workload=workload,
            what=f"DCP coordinator, gc {'on' if collector else 'off'}",
            **stats([run["total_s"] for run in runs]),
            moved_bytes=int(runs[0]["moved_bytes"]),
            peak_rss_bytes=int(max(run["peak_rss_bytes"] for run in runs)),
        )


if __name__ == "__main__":
    sys.exit(main())
