"""What a rank waits for before it reads its first byte: DCP's plan, and Shardbook's by service, cache and directory.

The ranks are simulated, their state dicts hold real DTensors (``benchmarks.rank_states``); every contender plans in a
process of its own, with the same sharding as the save and with half the ranks. What is in each time:
``benchmarks.rank_loads``. DCP reads the ``.metadata`` that its own coordinator dumps; of the 405B shape, for which that
takes minutes and more memory than there is, the one that Shardbook exports, which is smaller and faster to read.
"First" is the first plan of a process and makes its connection; "later" ones in the same process know no more than it.
What a first call of gRPC takes in memory, whatever it asks, is told apart.
"Service" keeps nothing on disk. "Warm cache" finds there what another process of the host has asked before.

"At once": many ranks ask over many connections (``benchmarks.readers``), beside as many empty calls. "Everything" is
all of torch's ``Metadata``. The service is a server process on SQLite.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.common import Goal, Report, Timing, add_arguments, garbage_collector, in_fresh_process
from benchmarks.export import graph_of
from benchmarks.layouts import Layout, llama_405b
from benchmarks.loadable import Job, Loadable, halved, plan_of_rank, question_of, record, save
from benchmarks.postgres import free_port
from benchmarks.rank_loads import (
    Built,
    Planned,
    by_dcp,
    by_manifest,
    by_service,
    everything_by_pickle,
    everything_by_service,
    latencies_s,
    warm,
)
from benchmarks.readers import PROCESSES, Times, readers
from benchmarks.simulated import Server, make_database, running_server
from benchmarks.workload import Workload
from shardbook.client import Client
from shardbook.core.names import CheckpointName
from shardbook.core.wanted import Wanted, encode_wanted
from shardbook.v1 import metadata_pb2, metadata_pb2_grpc

#: The rank whose plan is measured, of as many as there are.
RANK: Final = 5
PARTS: Final = ("plan", "latency", "at-once", "everything")
#: Plans of a process of the others'.
DCP_PLANS: Final = 3
MANIFEST_PLANS: Final = 6
#: Times less than DCP's read_metadata and local plan, with the garbage collector on and off.
PLAN_GOALS: Final = {"c": (2500, 600)}
MEMORY_GOAL: Final = Goal("<=", 5)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        jobs: Name, job, and rounds of processes that plan it.
        plans: Plans of each process of ours.
        latency: Which job's ranks ask one by one, and how often.
        crowd: Which job's ranks ask 64 at a time.
        fleet: Which job's ranks all ask.
        everything: Which job's ``Metadata`` is made as a whole, and how often.
        worlds: What ranks load: as many as saved, or half of them.
    """

    jobs: dict[str, tuple[Job, int]]
    plans: int
    latency: tuple[str, int]
    crowd: str
    fleet: str
    everything: tuple[str, int]
    worlds: tuple[str, ...] = ("same", "half")


FULL: Final = Sizes(
    {
        "a": (Workload.standard("a"), 1),
        "b": (Workload.standard("b"), 1),
        "c": (Workload.standard("c"), 2),
        "405B": (llama_405b(), 1),
    },
    plans=31,
    latency=("c", 300),
    crowd="c",
    fleet="405B",
    everything=("c", 1),
)
QUICK: Final = Sizes(
    {"a": (Workload.standard("a"), 1), "405B / 16": (llama_405b(scale=16), 0)},
    plans=11,
    latency=("a", 100),
    crowd="a",
    fleet="405B / 16",
    everything=("a", 1),
    worlds=("same",),
)


@dataclass(frozen=True)
class Place:
    """A checkpoint that is ready to be loaded, and the server that knows it.

    Attributes:
        name: Of the job.
        job: What saved it.
        loadable: Its directory and its name.
        server: The server.
        dumped: Directory of the ``.metadata`` that DCP reads.
        cache: Where readers keep answers; empty.
    """

    name: str
    job: Job
    loadable: Loadable
    server: Server
    dumped: Path
    cache: Path

    @property
    def resource(self) -> str:
        """What calls name it by."""
        return str(CheckpointName.parse(self.loadable.ref))


def new_report(sizes: Sizes) -> Report:
    """Returns the report that the parts below add to."""
    return Report(
        "load_plan",
        {
            "durability": "SQLite WAL, synchronous=FULL; nothing is written while it is measured",
            "jobs": "; ".join(f"{name} = {_title(job)}" for name, (job, _) in sizes.jobs.items()),
            "rounds of processes": "; ".join(f"{name}: {rounds}" for name, (_, rounds) in sizes.jobs.items()),
            "plans of each process": sizes.plans,
            "client processes that ask at once": PROCESSES,
        },
    )


def _title(job: Job) -> str:
    return f"{job.name}, {job.ranks} ranks" if isinstance(job, Layout) else str(job)


@contextmanager
def ready(name: str, job: Job, *, dumps: bool) -> Iterator[Place]:
    """Yields a checkpoint of ``job``; with ``dumps``, with a ``.metadata`` that DCP itself dumped, where it can."""
    with tempfile.TemporaryDirectory(prefix="shardbook-load-") as folder:
        directory, database = Path(folder) / "checkpoint", Path(folder) / "shardbook.db"
        directory.mkdir()
        loadable, manifest = save(job, directory, step=1)
        dumped = directory
        if dumps and isinstance(job, Workload):
            dumped = Path(folder) / "dcp"
            dumped.mkdir()
            in_fresh_process(_dump, job, dumped / ".metadata")
        make_database(database)
        with running_server(database, free_port()) as server:
            record(server.address, loadable, manifest)
            del manifest
        # Started anew, so that its memory is what answering takes.
        with running_server(database, free_port()) as server:
            yield Place(name, job, loadable, server, dumped, Path(folder) / "cache")


def _dump(job: Workload, path: Path) -> None:
    with garbage_collector(enabled=False), path.open("wb") as stream:
        pickle.dump(graph_of(job), stream)


# ---------------------------------------------------------------- one rank's plan


def measure_plans(report: Report, place: Place, rounds: int, sizes: Sizes) -> None:
    """Adds what a plan costs one rank, each contender in processes of its own."""
    plans = sizes.plans
    worlds = {world: place.job if world == "same" else halved(place.job) for world in sizes.worlds}
    runs: dict[str, dict[str, list[Planned]]] = {world: defaultdict(list) for world in worlds}
    warm(place.server.address, place.loadable.ref, list(worlds.values()), RANK, place.cache)
    for _ in range(rounds):
        for collector in (True, False):
            found = in_fresh_process(by_dcp, place.dumped, list(worlds.values()), RANK, collector, DCP_PLANS).value
            for world, planned in zip(worlds, found, strict=True):
                runs[world][f"DCP, gc {'on' if collector else 'off'}"].append(planned)
        for world, job in worlds.items():
            own = runs[world]
            asked = place.server.address, place.loadable.ref, job, RANK, plans
            own["service"].append(in_fresh_process(by_service, *asked).value)
            own["warm cache"].append(in_fresh_process(by_service, *asked, place.cache).value)
            read = place.loadable.directory, job, RANK, min(plans, MANIFEST_PLANS)
            own["manifest"].append(in_fresh_process(by_manifest, *read).value)
    for world, job in worlds.items():
        moved = _moved_bytes(place, job)
        for what, made in runs[world].items():
            _plan_row(report, place, world, what, made, moved.get(what))
        _plan_ratios(report, f"{place.name}, {world} ranks", runs[world], place.name if world == "same" else "")


def _moved_bytes(place: Place, job: Job) -> dict[str, int]:
    with grpc.insecure_channel(place.server.address) as channel:
        stub = metadata_pb2_grpc.MetadataServiceStub(channel)

        def moved(wanted: Wanted) -> int:
            request = metadata_pb2.QueryChunksRequest(name=place.resource, wanted=encode_wanted(wanted))
            return request.ByteSize() + stub.QueryChunks(request, timeout=60).ByteSize()

        return {
            "service": moved(question_of(plan_of_rank(job, RANK))),
            "warm cache": moved(Wanted.all_of(())),
            "manifest": place.loadable.manifest_bytes,
        }


def _plan_row(
    report: Report, place: Place, world: str, what: str, runs: Sequence[Planned], moved_bytes: int | None
) -> None:
    firsts = [run.first_s for run in runs]
    later = Timing(tuple(seconds for run in runs for seconds in run.later_s))
    report.row(
        job=place.name,
        chunks=place.loadable.chunk_count,
        ranks=world,
        what=what,
        first_s=round(statistics.median(firsts), 5),
        **later.columns("later"),
        read_metadata_s=round(statistics.median(run.read_s for run in runs), 5) or None,
        items=runs[0].item_count,
        added_rss_MB=round(max(run.added_bytes for run in runs) / 1e6, 1),
        grpc_rss_MB=round(max(run.connection_bytes for run in runs) / 1e6, 1) or None,
        bytes=moved_bytes or runs[0].moved_bytes,
    )


def _plan_ratios(report: Report, key: str, runs: dict[str, list[Planned]], goal_of: str) -> None:
    counts = {what: {run.item_count for run in found} for what, found in runs.items()}
    if len(set.union(*counts.values())) > 1:
        raise RuntimeError(f"plans of {key} differ: {counts}")
    ours = [seconds for run in runs["service"] for seconds in run.later_s]
    goals = PLAN_GOALS.get(goal_of, ())
    for at, collector in enumerate(("gc on", "gc off")):
        dcp_s = statistics.median(run.first_s for run in runs[f"DCP, {collector}"])
        goal = Goal(">=", goals[at]) if goals else None
        report.ratio(f"{key}: DCP, {collector} / service", dcp_s / statistics.median(ours), goal)
        for what in ("service", "warm cache", "manifest"):
            first_s = statistics.median(run.first_s for run in runs[what])
            report.ratio(f"{key}: DCP, {collector} / {what}, first plan of a process", dcp_s / first_s)
    added = max(run.added_bytes for run in runs["service"]) / 1e6
    report.ratio(f"{key}: memory added by the service's plan, beside gRPC's, MB", added, MEMORY_GOAL if goals else None)


# ---------------------------------------------------------------- questions


def measure_latency(report: Report, place: Place, rounds: int) -> None:
    """Adds what one client waits for an answer, one call at a time, beside an empty call."""
    client, name = Client(place.server.address), CheckpointName.parse(place.loadable.ref)
    plan = plan_of_rank(place.job, RANK)
    one, every = question_of(plan, slice(17, 18)), question_of(plan)
    with grpc.insecure_channel(place.server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        asked: dict[str, Callable[[], object]] = {
            "one tensor": lambda: client.query_chunks(name, one),
            f"a rank's {len(every.fqns):,} tensors": lambda: client.query_chunks(name, every),
            "empty call": lambda: health.Check(health_pb2.HealthCheckRequest()),
        }
        latencies_s(list(asked.values()), 10)
        found = dict(zip(asked, latencies_s(list(asked.values()), rounds), strict=True))
    for (what, seconds), bound_ms in zip(found.items(), (3, 10, None), strict=True):
        p50, p99 = np.percentile(seconds, (50, 99)) * 1000
        report.row(job=place.name, what=f"client: {what}", p50_ms=round(p50, 3), p99_ms=round(p99, 3), calls=rounds)
        goal = None if bound_ms is None else Goal("<=", bound_ms)
        report.ratio(f"{place.name}: {what} at the client, p50 ms", float(p50), goal)


def measure_at_once(report: Report, place: Place, *, in_flight: int, times: int, bound_s: float | None) -> None:
    """Adds what all ranks of a job wait that ask at once, ``in_flight`` of them at a time; the first time is cold."""
    channels = in_flight // PROCESSES
    with readers(place.server.address, place.resource, place.job, channels=channels) as ranks:
        for turn in range(times):
            for what, ask in (("empty calls", ranks.empty), ("questions", ranks.ask)):
                cpu_s = place.server.cpu_s
                found = ask(in_flight)
                cpu_s = place.server.cpu_s - cpu_s
                _at_once_row(report, place, f"{what}, {'again' if turn else 'first'}", found, cpu_s, in_flight)
                if what == "questions" and not turn:
                    goal = None if bound_s is None else Goal("<=", bound_s)
                    report.ratio(f"{place.name}: all {place.job.ranks:,} ranks ask, seconds", _span_s(found), goal)


def _span_s(times: Times) -> float:
    return float(times[:, 1].max() - times[:, 0].min())


def _at_once_row(report: Report, place: Place, what: str, times: Times, cpu_s: float, in_flight: int) -> None:
    p50, p99 = np.percentile(times[:, 1] - times[:, 0], (50, 99)) * 1000
    report.row(
        job=place.name,
        what=f"at once: {what}",
        in_flight=in_flight,
        calls=len(times),
        all_s=round(_span_s(times), 3),
        calls_per_s=round(len(times) / _span_s(times), 1),
        p50_ms=round(p50, 2),
        p99_ms=round(p99, 2),
        server_cpu_us_a_call=round(cpu_s / len(times) * 1e6),
        server_peak_rss_MB=round(place.server.peak_rss_bytes / 1e6),
    )


# ---------------------------------------------------------------- everything


def measure_everything(report: Report, place: Place, rounds: int) -> None:
    """Adds what all of torch's ``Metadata`` costs, from the service and unpickled."""
    contenders: dict[str, Callable[[], Built]] = {
        "service": partial(_built, everything_by_service, place.server.address, place.loadable.ref),
        "pickle.load, gc on": partial(_built, everything_by_pickle, place.dumped / ".metadata", True),
        "pickle.load, gc off": partial(_built, everything_by_pickle, place.dumped / ".metadata", False),
        "pickle.load of the export, gc off": partial(
            _built, everything_by_pickle, place.loadable.directory / ".metadata", False
        ),
    }
    runs = {what: [run() for _ in range(rounds)] for what, run in contenders.items()}
    if len({run.counts for found in runs.values() for run in found}) > 1:
        raise RuntimeError("the contenders' metadata differs")
    for what, found in runs.items():
        report.row(
            job=place.name,
            what=f"everything: {what}",
            **Timing(tuple(run.time_s for run in found)).columns(),
            added_rss_MB=round(max(run.added_bytes for run in found) / 1e6, 1),
            held_rss_MB=round(max(run.held_bytes for run in found) / 1e6, 1),
        )
    ours, peer = runs["service"], runs["pickle.load, gc off"]
    speed = statistics.median(run.time_s for run in peer) / statistics.median(run.time_s for run in ours)
    memory = max(run.added_bytes for run in ours) / max(run.added_bytes for run in peer)
    is_goal = place.name == "c"
    report.ratio(f"{place.name}: pickle.load, gc off / everything", speed, Goal(">=", 1) if is_goal else None)
    report.ratio(f"{place.name}: memory of everything / pickle.load", memory, Goal("<=", 0.5) if is_goal else None)


def _built(work: Callable[..., Built], *arguments: object) -> Built:
    built: Built = in_fresh_process(work, *arguments).value
    return built


# ---------------------------------------------------------------- all of it


def measure(report: Report, sizes: Sizes, parts: Sequence[str] = PARTS, only: Sequence[str] = ()) -> None:
    """Adds the parts that are asked for, of the jobs that are asked for; all when ``only`` is empty."""
    for name, (job, rounds) in sizes.jobs.items():
        if only and name not in only:
            continue
        dumps = ("plan" in parts and rounds > 0) or ("everything" in parts and name == sizes.everything[0])
        with ready(name, job, dumps=dumps) as place:
            if "at-once" in parts and name == sizes.fleet:
                measure_at_once(report, place, in_flight=128, times=1, bound_s=60 if name == "405B" else None)
            if "plan" in parts and rounds:
                measure_plans(report, place, rounds, sizes)
            if "latency" in parts and name == sizes.latency[0]:
                measure_latency(report, place, sizes.latency[1])
            if "at-once" in parts and name == sizes.crowd:
                measure_at_once(report, place, in_flight=64, times=2, bound_s=None)
            if "everything" in parts and name == sizes.everything[0]:
                measure_everything(report, place, sizes.everything[1])


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; may be given again")
    parser.add_argument("--job", action="append", help="only this job; may be given again")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    report = new_report(sizes)
    measure(report, sizes, arguments.only or PARTS, arguments.job or ())
    return report.finish(check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
