"""What a relay on each host spares the server: the same warm saves, each rank by itself and through a relay.

Ranks, relays and server share this machine, so the wall time through relays is that of a machine which does three
times the work; a real job's relays run on its own hosts. What counts is the server's side: processor time for each rank
and save, connections, memory. Every rank has a connection of its own, as in a job: to the server, or to its relay. The
floor is as many empty calls from the same ranks to the same server.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import Report, cpu_s, parse_arguments, rss_bytes
from benchmarks.fleet import PROCESSES, Fleet, fleet
from benchmarks.layouts import Layout, fsdp
from benchmarks.postgres import free_port
from benchmarks.routes import Routes
from benchmarks.save_scale import CALLS, save
from benchmarks.simulated import Server, make_database, running_server
from shardbook_server.connections import count_connections

DIRECT, RELAYED = "each rank by itself", "a relay on each host"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: hosts, ranks of each, rounds of a server each, and warm saves of a round."""

    hosts: int
    ranks_per_host: int
    rounds: int
    saves: int


@dataclass
class Seen:
    """What was measured of one way, an entry a round.

    Attributes:
        save_s: Seconds of each save.
        empty_s: Seconds of as many empty calls, straight to the server.
        cpu_s: Processor time of the server for a save.
        empty_cpu_s: The same for the empty calls.
        relay_cpu_s: Processor time of all relays for a save.
        connections: Of the server.
        grown_bytes: By which the server's memory grew with its connections and first saves.
    """

    save_s: list[float] = field(default_factory=list)
    empty_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    empty_cpu_s: list[float] = field(default_factory=list)
    relay_cpu_s: list[float] = field(default_factory=list)
    connections: list[int] = field(default_factory=list)
    grown_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Relay:
    """A relay process."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def relays(count: int, server: str) -> Iterator[list[Relay]]:
    """Runs relays to ``server``; they listen when the block begins and have ended with it."""
    started: list[Relay] = []
    with tempfile.TemporaryDirectory(prefix="relays-") as folder:
        try:
            for number in range(count):
                address = f"unix://{folder}/{number}.sock"
                command = [sys.executable, "-m", "shardbook.cli", "relay", "--listen", address, "--server", server]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                started.append(Relay(address, process))
            for relay in started:
                assert relay.process.stdout is not None
                while not relay.process.stdout.readline().startswith("export"):
                    if relay.process.poll() is not None:
                        raise RuntimeError(f"the relay of {relay.address} has ended")
            yield started
        finally:
            for relay in started:
                relay.process.terminate()
            for relay in started:
                relay.process.communicate(timeout=60)


def measure(layout: Layout, sizes: Sizes, folder: Path) -> tuple[dict[str, Seen], list[int]]:
    """Measures both ways, in turn; returns what was seen of each, and the relays' memory."""
    database, port = folder / "shardbook.db", free_port()
    make_database(database)
    address = f"127.0.0.1:{port}"
    with running_server(database, port) as server, fleet(layout, address) as ranks:
        save(ranks, server, 0)
    seen = {DIRECT: Seen(), RELAYED: Seen()}
    with relays(sizes.hosts, address) as hosts:
        ways = {
            DIRECT: Routes((address,), layout.ranks, 1),
            RELAYED: Routes(tuple(relay.address for relay in hosts), sizes.ranks_per_host, 1),
        }
        for _ in range(sizes.rounds):
            for what, routes in ways.items():
                with running_server(database, port) as server:
                    began_bytes = rss_bytes(server.process.pid)
                    with fleet(layout, address, PROCESSES, routes) as ranks:
                        _saves(ranks, server, hosts, seen[what], sizes.saves)
                        seen[what].grown_bytes.append(rss_bytes(server.process.pid) - began_bytes)
                        if what == DIRECT:
                            _floor(ranks, server, seen[what], sizes.saves)
        return seen, [rss_bytes(relay.process.pid) for relay in hosts]


def _saves(ranks: Fleet, server: Server, hosts: Sequence[Relay], seen: Seen, count: int) -> None:
    """Saves; the first one opens what is opened on first use and is not counted."""
    save(ranks, server, 0)
    # The coordinator's own connection is one of them.
    seen.connections.append(count_connections(server.address) or 0)
    relays_began_s, server_s = _cpu_s(hosts), 0.0
    for step in range(1, 1 + count):
        saved, _ = save(ranks, server, step)
        seen.save_s.append(saved.total_s)
        server_s += saved.server_cpu_s
    seen.cpu_s.append(server_s / count)
    seen.relay_cpu_s.append((_cpu_s(hosts) - relays_began_s) / count)


def _floor(ranks: Fleet, server: Server, seen: Seen, count: int) -> None:
    """Makes as many empty calls as saves make calls."""
    began_cpu_s = server.cpu_s
    seen.empty_s.extend(ranks.ask("empty", CALLS).time_s for _ in range(count))
    seen.empty_cpu_s.append((server.cpu_s - began_cpu_s) / count)


def _cpu_s(hosts: Sequence[Relay]) -> float:
    return sum(cpu_s(relay.process.pid) for relay in hosts)


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    sizes = Sizes(4, 16, 1, 8) if arguments.quick else Sizes(32, 8, 3, 8)
    layout = fsdp(sizes.hosts * sizes.ranks_per_host)
    with tempfile.TemporaryDirectory(prefix="shardbook-relay-") as folder:
        seen, relay_bytes = measure(layout, sizes, Path(folder))
    report = Report(
        "relay",
        {
            "durability": "SQLite WAL, synchronous=FULL",
            "layout": f"{layout.name}, {sizes.hosts} hosts of {sizes.ranks_per_host} ranks",
            "rounds": sizes.rounds,
            "warm saves of a round": sizes.saves,
        },
    )
    for what, one in seen.items():
        _row(report, layout.ranks, what, one)
    direct, relayed = seen[DIRECT], seen[RELAYED]
    report.row(
        what=f"floor: {CALLS} empty calls a rank, by itself",
        save_s=statistics.median(direct.empty_s),
        min_s=min(direct.empty_s),
        max_s=max(direct.empty_s),
        server_cpu_us_rank=_us(direct.empty_cpu_s, layout.ranks),
    )
    report.row(what="a relay's memory", relay_rss_MiB=round(statistics.median(relay_bytes) / 2**20))
    spared = statistics.median(relayed.cpu_s) / statistics.median(direct.cpu_s)
    report.ratio("server CPU of a save, with relays / without", spared)
    report.ratio("connections, with relays / without", relayed.connections[-1] / direct.connections[-1])
    grown = statistics.median(relayed.grown_bytes) / statistics.median(direct.grown_bytes)
    report.ratio("memory that saving adds to the server, with relays / without", grown)
    report.ratio(
        "wall time of a save, with relays on the same machine / without",
        statistics.median(relayed.save_s) / statistics.median(direct.save_s),
    )
    return report.finish(check=arguments.check)


def _row(report: Report, ranks: int, what: str, seen: Seen) -> None:
    report.row(
        what=what,
        save_s=statistics.median(seen.save_s),
        min_s=min(seen.save_s),
        max_s=max(seen.save_s),
        server_cpu_us_rank=_us(seen.cpu_s, ranks),
        min_us=round(min(seen.cpu_s) / ranks * 1e6),
        max_us=round(max(seen.cpu_s) / ranks * 1e6),
        connections=seen.connections[-1],
        server_grown_MiB=round(statistics.median(seen.grown_bytes) / 2**20, 1),
        relay_cpu_us_rank=_us(seen.relay_cpu_s, ranks),
    )


def _us(values_s: Sequence[float], ranks: int) -> int:
    """Microseconds a rank, the median of rounds."""
    return round(statistics.median(values_s) / ranks * 1e6)


if __name__ == "__main__":
    sys.exit(main())
