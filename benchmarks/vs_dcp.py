"""Saves through DCP and through Shardbook: the coordinator alone, the validation alone, and real gloo ranks.

Simulated ranks: the plans of a, b and c through DCP's coordinator (one process, no network; as users run it, and with
the garbage collector off), through the same a second time with ``enable_plan_caching`` (what is counted:
``benchmarks.dcp_peer``), and through a real server on SQLite and on Postgres: every rank's registration in a call of
its own, and the commit; cold, warm, and warm after a restart. The rows "with planning" add the PlanSave of every rank,
which a real save makes. The floor is as many empty calls to the same servers, between the saves. Memory is compared
whole and as what the saves add to an idle process: on the small workload both sides are mostly interpreter and
libraries.

Real ranks: ``benchmarks.gloo``; the time of metadata is that of a save without the writer's ``write_data``. A cold one
is a contender's first: what its process does for the first time is in it. ``--quick`` leaves Postgres out.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks import gloo, validation
from benchmarks.common import Goal, Report, in_fresh_process, parse_arguments
from benchmarks.dcp_peer import coordinate, coordinate_unchanged
from benchmarks.places import DURABILITY, places
from benchmarks.postgres import free_port
from benchmarks.saves import Saves, through_shardbook
from benchmarks.simulated import rank_payloads, running_server
from benchmarks.workload import Layout, Workload

COLLECTORS: Final = (True, False)
#: Times less than DCP's coordinator, with the garbage collector on and off.
COLD_GOALS: Final = {"a": (35, 15), "b": (100, 45), "c": (150, 85)}
VALIDATION_GOALS: Final[dict[Layout, int]] = {"row": 200, "grid": 80}
#: Cutting the shorter side is to cost no more than the longer; what is above 1 is the noise of milliseconds.
SIDE_GOAL: Final = Goal("<=", 1.25)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        workloads: Name, plans, and how often they are measured.
        plannings: Whether the ranks plan, too.
        checked: Name and plans that validation is measured on.
        worlds: Numbers of gloo ranks.
        saves: Saves of each contender there, the first of which is cold.
        tensors: Tensors of their state.
        postgres: Whether the plans go through a server on Postgres, too.
        cut: Chunks of a tensor that is cut along its shorter and its longer side.
    """

    workloads: tuple[tuple[str, Workload, int], ...]
    plannings: tuple[bool, ...]
    checked: tuple[tuple[str, Workload], ...]
    worlds: tuple[int, ...]
    saves: int
    tensors: int = gloo.TENSORS
    postgres: bool = True
    cut: int = validation.CHUNKS


FULL: Final = Sizes(
    tuple((name, Workload.standard(name), rounds) for name, rounds in (("a", 3), ("b", 3), ("c", 1))),
    (False, True),
    (("c", Workload.standard("c")), ("c", Workload.standard("c", "grid"))),
    (4, 8, 16),
    saves=8,
)
QUICK: Final = Sizes(
    (("a", Workload.standard("a"), 1),), (False,), (("a", Workload.standard("a")),), (4,), saves=3, postgres=False
)


@dataclass
class _Runs:
    """What the rounds of one workload brought."""

    shardbook: dict[tuple[str, bool], list[Saves]] = field(default_factory=dict)
    dcp: dict[bool, list[dict[str, float]]] = field(default_factory=lambda: {True: [], False: []})
    caching: dict[bool, list[dict[str, float]]] = field(default_factory=lambda: {True: [], False: []})


def new_report(sizes: Sizes) -> Report:
    """Returns the report that the parts below add to."""
    return Report(
        "vs_dcp",
        {
            "durability": f"{DURABILITY}; DCP's .metadata fsynced",
            "rounds": "; ".join(f"{name} = {workload}: {rounds}" for name, workload, rounds in sizes.workloads),
            "calls under way at once": 64,
            "gloo": f"{sizes.tensors} DTensors, {sizes.saves} saves of each contender, data and .metadata fsynced",
        },
    )


# ---------------------------------------------------------------- coordination


def measure_coordination(report: Report, sizes: Sizes) -> None:
    """Adds what coordinators cost, by workload."""
    for name, workload, rounds in sizes.workloads:
        _report_coordination(report, name, _coordinate(workload, rounds, sizes))


def _coordinate(workload: Workload, rounds: int, sizes: Sizes) -> _Runs:
    payloads, runs = rank_payloads(workload), _Runs()
    for _ in range(rounds):
        for planning in sizes.plannings:
            with places(postgres=sizes.postgres) as found:
                for place in found:
                    own = runs.shardbook.setdefault((place.name, planning), [])
                    own.append(through_shardbook(payloads, place, planning=planning))
        for collector in COLLECTORS:
            runs.dcp[collector].append(in_fresh_process(coordinate, workload, collector).value)
        again = in_fresh_process(coordinate_unchanged, workload, COLLECTORS).value
        for collector, run in zip(COLLECTORS, again, strict=True):
            runs.caching[collector].append(run)
    return runs


def _report_coordination(report: Report, size: str, runs: _Runs) -> None:
    for (place, planning), saves in runs.shardbook.items():
        _shardbook_rows(report, size, f"{place}{', with planning' if planning else ''}", saves)
    for collector in COLLECTORS:
        _dcp_row(report, size, f"DCP, {_gc(collector)}", runs.dcp[collector])
        _dcp_row(report, size, f"DCP, plan caching, {_gc(collector)}", runs.caching[collector])
    for (place, planning), saves in runs.shardbook.items():
        key = f"{size}, {place}"
        if planning:
            _ratios(report, f"{key}, with planning", size, runs, saves, has_goals=False)
        else:
            _ratios(report, key, size, runs, saves, has_goals=True)
            _memory_ratios(report, key, size, runs, saves)


def _ratios(report: Report, key: str, size: str, runs: _Runs, saves: list[Saves], *, has_goals: bool) -> None:
    def add(name: str, value: float, goal: Goal | None) -> None:
        report.ratio(f"{key}: {name}", value, goal if has_goals else None)

    cold_s = statistics.median(one.cold_s for one in saves)
    floor_s = statistics.median(one.floor_s for one in saves)
    goals = dict(zip(COLLECTORS, COLD_GOALS.get(size, ()), strict=False))
    for collector in COLLECTORS:
        goal = Goal(">=", goals[collector]) if collector in goals else None
        add(f"DCP, {_gc(collector)} / cold", _total_s(runs.dcp[collector]) / cold_s, goal)
    for name in ("warm", "restarted"):
        warm_s = statistics.median(getattr(one, f"{name}_s") for one in saves)
        add(f"{name} / empty calls", warm_s / floor_s, Goal("<=", 1.5))
        for collector in COLLECTORS:
            # As users run it is what the goal is about.
            goal_on = Goal(">=", 50) if collector else None
            add(f"DCP, plan caching, {_gc(collector)} / {name}", _total_s(runs.caching[collector]) / warm_s, goal_on)


def _memory_ratios(report: Report, key: str, size: str, runs: _Runs, saves: list[Saves]) -> None:
    peer = statistics.median(run["peak_rss_bytes"] for run in runs.dcp[True])
    own = statistics.median(one.peak_rss_bytes for one in saves)
    report.ratio(f"{key}: peak RSS, DCP / server", peer / own, Goal(">=", 10) if size in ("b", "c") else None)
    peer_added = statistics.median(run["peak_rss_bytes"] - run["idle_rss_bytes"] for run in runs.dcp[True])
    own_added = statistics.median(one.peak_rss_bytes - one.idle_rss_bytes for one in saves)
    report.ratio(f"{key}: memory added by a cold save, DCP / server", peer_added / max(own_added, 1))


def _shardbook_rows(report: Report, size: str, name: str, saves: list[Saves]) -> None:
    peak, idle = max(one.peak_rss_bytes for one in saves), min(one.idle_rss_bytes for one in saves)
    for what in ("cold", "warm", "restarted", "floor"):
        is_cold = what == "cold"
        report.row(
            workload=size,
            what=f"{name}: {'empty calls' if what == 'floor' else what}",
            **_statistics([getattr(one, f"{what}_s") for one in saves]),
            moved_bytes=saves[0].cold_sent_bytes if is_cold else None,
            stored_bytes=saves[0].cold_stored_bytes if is_cold else None,
            idle_rss_bytes=idle if is_cold else None,
            peak_rss_bytes=peak if is_cold else None,
        )


def _dcp_row(report: Report, size: str, name: str, runs: list[dict[str, float]]) -> None:
    report.row(
        workload=size,
        what=name,
        **_statistics([run["total_s"] for run in runs]),
        moved_bytes=int(runs[0]["moved_bytes"]),
        stored_bytes=int(runs[0]["metadata_bytes"]),
        idle_rss_bytes=int(min(run["idle_rss_bytes"] for run in runs)) if "idle_rss_bytes" in runs[0] else None,
        peak_rss_bytes=int(max(run["peak_rss_bytes"] for run in runs)),
    )


def _total_s(runs: list[dict[str, float]]) -> float:
    return statistics.median(run["total_s"] for run in runs)


def _gc(collector: bool) -> str:
    return f"gc {'on' if collector else 'off'}"


def _statistics(values: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}


# ---------------------------------------------------------------- validation


def measure_validation(report: Report, sizes: Sizes) -> None:
    """Adds what validation costs, alone."""
    for size, workload in sizes.checked:
        judged, assembled = validation.shardbook_s(workload)
        peer_s = validation.dcp_s(workload)
        name = f"{size} {workload.layout}"
        report.row(workload=name, what="validation: DCP, gc on", **_statistics([peer_s]))
        report.row(workload=name, what="validation: shardbook.core", **_statistics(judged.samples_s))
        report.row(workload=name, what="assembly, validation included", **_statistics(assembled.samples_s))
        report.ratio(
            f"{name}: validation, DCP / Shardbook",
            peer_s / judged.median_s,
            Goal(">=", VALIDATION_GOALS[workload.layout]) if size == "c" else None,
        )
    for name, sides in validation.along_sides(sizes.cut).items():
        tensors = "one tensor" if name == "DCP" else f"{validation.TENSORS} tensors"
        for side, timing in sides.items():
            report.row(
                workload=f"{sizes.cut} chunks, {name}",
                what=f"validation: {tensors} cut along the {side} side",
                **_statistics(timing.samples_s),
            )
        goal_of_side = None if name == "DCP" else SIDE_GOAL
        ratio = sides["shorter"].median_s / sides["longer"].median_s
        report.ratio(f"validation, cut along the shorter / the longer side, {name}", ratio, goal_of_side)


# ---------------------------------------------------------------- real ranks


def measure_gloo(report: Report, sizes: Sizes) -> None:
    """Adds what saves of real ranks cost."""
    with places(postgres=False) as (sqlite,), running_server(sqlite.database, free_port()) as server:
        for world_size in sizes.worlds:
            found = gloo.saves(server, world_size, sizes.saves, sizes.tensors)
            for name, saves in found.items():
                for what, own in (("cold", saves[:1]), ("warm", saves[1:])):
                    _gloo_row(report, f"{world_size} gloo ranks", f"{name}: {what}", own)
            for peer in (gloo.DCP, gloo.DCP_CACHING):
                for what, part in (("cold", slice(0, 1)), ("warm", slice(1, None))):
                    ratio = _metadata_s(found[peer][part]) / _metadata_s(found[gloo.SHARDBOOK][part])
                    report.ratio(f"{world_size} gloo ranks: metadata of a {what} save, {peer} / Shardbook", ratio)


def _gloo_row(report: Report, workload: str, what: str, saves: list[gloo.Saved]) -> None:
    def median(name: str) -> float | None:
        return statistics.median(getattr(one, name) for one in saves) or None

    report.row(
        workload=workload,
        what=what,
        **_statistics([one.metadata_s for one in saves]),
        whole_save_s=median("total_s"),
        plan_s=median("plan_s"),
        finish_s=median("finish_s"),
    )


def _metadata_s(saves: list[gloo.Saved]) -> float:
    return statistics.median(one.metadata_s for one in saves)


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    sizes = QUICK if arguments.quick else FULL
    report = new_report(sizes)
    measure_coordination(report, sizes)
    measure_validation(report, sizes)
    measure_gloo(report, sizes)
    return report.finish(check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
