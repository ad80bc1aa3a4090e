"""Registrations a second, and how long each takes: 1 to 3 replicas on Postgres, one server on SQLite, one client load.

Warm saves of ``W(1024, 500, 1024)``: all ranks register a structure that the servers know, from a few client processes
whose connections take one of the replicas at random; every burst meets each of the four in turn. Beside each, the same
round's floors: as many empty gRPC calls by the same clients over the same connections, and the driver alone inserting
the same rows in the groups that the server made. Then 4,096 connections (1,024 with ``--quick``) to one
server: what each costs, and what waits and registrations take while all are open. Clients, servers and Postgres share
this machine: the columns ``cores_`` say who used it.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.common import SEED, Goal, Report, parse_arguments
from benchmarks.connections import measure_connections
from benchmarks.crowd import Crowd, crowd
from benchmarks.floors import RawPostgres, RawSqlite, durability, file_system, sync_s
from benchmarks.load import Bursts, Job, Processors, Sizes
from benchmarks.postgres import Cluster, free_port
from benchmarks.simulated import Server, make_database, members_of, running_server
from benchmarks.workload import Workload

FULL = Sizes(Workload(1024, 500, 1024), Workload(4096, 250, 4096, "grid"))
QUICK = Sizes(Workload(256, 250, 256), Workload(1024, 250, 1024, "grid"), rounds=5, crowd_saves=2)


class Contender:
    """Some servers over one database, the ranks' connections to them, and the floor of that database."""

    def __init__(self, name: str, servers: Sequence[Server], floor: RawPostgres | RawSqlite, sizes: Sizes) -> None:
        self.name = name
        self.servers = servers
        self._floor = floor
        self._sizes = sizes
        self.job = Job(servers[0].address, name.replace(" ", "-").lower(), sizes.workload.ranks)
        self.registered, self.empty = Bursts(), Bursts()
        self.raw_rates: list[float] = []
        self.groups: list[int] = []
        self.shares = np.zeros(len(servers))

    def connect(self, ranks: Crowd) -> None:
        """Opens the connections, each to one of the servers at random, and saves twice, so that all is known."""
        chance = random.Random(SEED)
        addresses = [server.address for server in self.servers]

        def target() -> str:
            # As pick_first with a shuffled list, which takes the first that answers; and the same in each run.
            return "ipv4:" + ",".join(chance.sample(addresses, len(addresses)))

        targets = [[target() for _ in range(self._sizes.channels)] for _ in range(self._sizes.processes)]
        ranks.open(self.name, targets)
        for _ in range(2):
            self.job.next_save(ranks)
            ranks.ask("register", self.name, self._sizes.in_flight)
            self.job.commit()

    def round(self, ranks: Crowd, processors: Processors) -> None:
        """Runs a burst of empty calls, one of registrations, and the raw inserts of the same groups."""
        in_flight = self._sizes.in_flight
        self.job.next_save(ranks)
        self.empty.burst(lambda: ranks.ask("empty", self.name, in_flight), processors)
        # The other contenders' batches in the same servers are not this one's.
        seen = [len(server.batch_sizes("registrations")) for server in self.servers]
        self.registered.burst(lambda: ranks.ask("register", self.name, in_flight), processors)
        groups = [server.batch_sizes("registrations", skip) for server, skip in zip(self.servers, seen, strict=True)]
        self.job.commit()
        shares = np.array([sum(own) for own in groups])
        self.raw_rates.append(shares.sum() / self._floor.insert(groups))
        self.groups += [size for own in groups for size in own]
        self.shares += shares

    def rows(self, report: Report) -> None:
        """Adds what was measured."""
        for what, bursts in (("registrations", self.registered), ("empty calls", self.empty)):
            report.row(servers=self.name, what=what, **bursts.columns())
        report.row(
            servers=self.name,
            what="raw inserts",
            calls_per_s=round(statistics.median(self.raw_rates), 1),
            min=round(min(self.raw_rates), 1),
            max=round(max(self.raw_rates), 1),
            groups=len(self.groups),
            group_mean=round(statistics.mean(self.groups), 1),
            group_largest=max(self.groups),
            share_of_each="/".join(f"{share:.0%}" for share in self.shares / self.shares.sum()),
        )


def _contenders(stack: ExitStack, folder: Path, url: str, sizes: Sizes) -> list[Contender]:
    def start(database: Path | str, name: str) -> Server:
        return stack.enter_context(running_server(database, free_port(), batches=folder / name))

    for place in (url, folder / "shardbook.db"):
        make_database(place)
    for name in ("sqlite", "postgres-1", "postgres-2", "postgres-3"):
        (folder / name).touch()
    embedded = start(folder / "shardbook.db", "sqlite")
    replicas = [start(url, f"postgres-{number}") for number in (1, 2, 3)]
    contenders = [Contender("SQLite", [embedded], stack.enter_context(RawSqlite(folder / "floor.db")), sizes)]
    for number in (1, 2, 3):
        floor = stack.enter_context(RawPostgres(url, number))
        contenders.append(Contender(f"Postgres {number}", replicas[:number], floor, sizes))
    for contender in contenders:
        stack.callback(contender.job.close)
    return contenders


def measure_load(report: Report, sizes: Sizes, folder: Path, cluster: Cluster) -> None:
    """Measures the four contenders under the same load."""
    members = members_of(sizes.workload)
    with ExitStack() as stack:
        contenders = _contenders(stack, folder, cluster.url, sizes)
        ranks = stack.enter_context(crowd(members, sizes.processes))
        servers = {server.process.pid for contender in contenders for server in contender.servers}
        processors = Processors(
            {"servers": lambda: list(servers), "postgres": cluster.processes, "clients": lambda: ranks.pids}
        )
        for contender in contenders:
            contender.connect(ranks)
        for _ in range(sizes.rounds):
            for contender in contenders:
                contender.round(ranks, processors)
    by_name = {contender.name: contender for contender in contenders}
    for contender in contenders:
        contender.rows(report)
    one = by_name["Postgres 1"].registered.rate
    for number in (2, 3):
        report.ratio(f"registrations/s, {number} replicas / 1", by_name[f"Postgres {number}"].registered.rate / one)
    for contender in contenders:
        rate, empty = contender.registered.rate, contender.empty.rate
        # The goal is one server's: with more of them what they share with their clients here is the processors.
        goal = Goal("<=", 1.5) if len(contender.servers) == 1 else None
        report.ratio(f"{contender.name}: time of registrations / of empty calls", empty / rate, goal)
        both = 1 / empty + 1 / statistics.median(contender.raw_rates)
        report.ratio(f"{contender.name}: time of registrations / of empty calls and raw inserts", 1 / rate / both)


@contextmanager
def postgres_on_disk() -> Iterator[tuple[Path, Cluster]]:
    """Yields a folder on a real disk, and a Postgres whose data is on it."""
    with tempfile.TemporaryDirectory(prefix="shardbook-replicas-") as name:
        cluster = Cluster({"max_connections": "200"}, base=tempfile.gettempdir())
        try:
            yield Path(name), cluster
        finally:
            cluster.remove()


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    return measure(QUICK if arguments.quick else FULL).finish(check=arguments.check)


def measure(sizes: Sizes) -> Report:
    """Returns what was measured, of both parts."""
    with postgres_on_disk() as (folder, cluster):
        report = Report(
            "replicas",
            {
                "durability of Postgres": durability(cluster.url),
                "durability of SQLite": "journal_mode=WAL, synchronous=FULL",
                "disk": f"{file_system(folder)}, {sync_s(folder) * 1e6:.0f} us for 4 KiB and fdatasync",
                "load": f"{sizes.workload}, warm; {sizes.processes} client processes with {sizes.channels} connections "
                f"each to each row's servers, {sizes.processes * sizes.in_flight} calls in flight",
                "connections": f"{sizes.crowd}, a connection for each rank",
                "rounds": sizes.rounds,
                "open files": f"{resource.getrlimit(resource.RLIMIT_NOFILE)[1]} at most; servers begin with 1,024",
                "load average before": round(os.getloadavg()[0], 2),
            },
        )
        measure_load(report, sizes, folder, cluster)
        measure_connections(report, sizes, folder, cluster)
        return report


if __name__ == "__main__":
    sys.exit(main())
