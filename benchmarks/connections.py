"""A connection for each rank: what thousands of them cost a server, and what calls take while all are open.

Each rank has a gRPC channel with a TCP connection of its own. All of them plan, register and wait for the commit over
it, all at once, as a job does; while all but one wait for the last rank's plan, another job registers.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from benchmarks.common import Report, peak_rss_bytes, rss_bytes
from benchmarks.crowd import Crowd, Times, crowd
from benchmarks.load import Bursts, Job, Processors, Sizes
from benchmarks.postgres import Cluster, free_port
from benchmarks.simulated import Server, members_of, running_server
from shardbook.v1 import registration_pb2 as pb

#: Client processes that share the crowd's connections.
_PROCESSES = 4
#: Whose connections: the crowd's, one for each rank, and the other job's.
_CROWD, _OTHER = "crowd", "other"
#: The rank whose plan the others wait for.
_LAST = 0
_EMPTY, _ALL = "empty calls, one on each connection at once", "registrations, one on each connection at once"
_ALONE, _MEANWHILE = "registrations of another job, before", "registrations of another job, while all others wait"


@dataclass
class _Seen:
    """What was measured.

    Attributes:
        rss_bytes: Resident memory of the server at each moment.
        sockets: Its open sockets at each moment.
        bursts: Of calls, by what they were.
        decided_s: From the last rank's plan to the decision at each waiting rank, by save.
        closed_s: From the answer to the commit to the answer at each waiting rank, by save; negative when before.
        commit_s: From the commit to its answer, by save.
        opened_s: To open all connections.
    """

    rss_bytes: dict[str, int] = field(default_factory=dict)
    sockets: dict[str, int] = field(default_factory=dict)
    bursts: dict[str, Bursts] = field(default_factory=dict)
    decided_s: list[npt.NDArray[np.float64]] = field(default_factory=list)
    closed_s: list[npt.NDArray[np.float64]] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    opened_s: float = 0.0


def measure_connections(report: Report, sizes: Sizes, folder: Path, cluster: Cluster) -> None:
    """Measures one server on Postgres, migrated already, with a connection for each rank of ``sizes.crowd``."""
    members, other_members = members_of(sizes.crowd), members_of(sizes.workload)
    (folder / "crowd").touch()
    with (
        running_server(cluster.url, free_port(), batches=folder / "crowd") as server,
        Job(server.address, "crowd", len(members)) as job,
        Job(server.address, "other", len(other_members)) as other,
        crowd(members, _PROCESSES) as ranks,
        crowd(other_members, 1) as others,
    ):
        processes = {
            "servers": lambda: [server.process.pid],
            "postgres": cluster.processes,
            "clients": lambda: [*ranks.pids, *others.pids],
        }
        measured = _Measured(server, job, other, ranks, others, Processors(processes), sizes)
        measured.run()
        limit = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[0]
    _rows(report, measured.seen, len(members), limit)


class _Measured:
    """The parts, and the steps of the measurement."""

    def __init__(
        self, server: Server, job: Job, other: Job, ranks: Crowd, others: Crowd, processors: Processors, sizes: Sizes
    ) -> None:
        self._pid, self._address = server.process.pid, server.address
        self._job, self._other = job, other
        self._ranks, self._others = ranks, others
        self._processors = processors
        self._sizes = sizes
        self.seen = _Seen()

    def run(self) -> None:
        """Does all of it."""
        self._others.open(_OTHER, [[self._address] * self._sizes.channels])
        self._other_save("cold")
        for _ in range(self._sizes.crowd_saves):
            self._other_save(_ALONE)
        self._connect()
        for step in range(self._sizes.crowd_saves + 1):
            self._save(warm=step > 0)
            self._look("after the first save" if step == 0 else "after the saves")
        self.seen.rss_bytes["peak"] = peak_rss_bytes(self._pid)
        self._ranks.ask("close", _CROWD)
        time.sleep(1)
        self._look("all closed")

    def _connect(self) -> None:
        self._look("before")
        targets = [[self._address] * count for count in self._ranks.counts]
        self.seen.opened_s = self._ranks.open(_CROWD, targets)
        self._look("all open")
        for _ in range(self._sizes.crowd_saves):
            self._burst(_EMPTY, lambda: self._ranks.ask("empty", _CROWD, len(self._ranks.members)))
        self._look("each used")

    def _save(self, *, warm: bool) -> None:
        """One save of the crowd: all plan, all register, all wait for the commit."""
        self._job.next_save(self._ranks)
        decided_s = self._plan(warm=warm)
        self._burst(_ALL if warm else "cold", lambda: self._ranks.ask("register", _CROWD, len(self._ranks.members)))
        self._ranks.start("follow", _CROWD)
        time.sleep(self._sizes.arrive_s)
        began_s = time.monotonic()
        self._job.commit()
        answered_s = time.monotonic()
        closed_s = self._ranks.result()[:, 1] - answered_s
        if warm:
            self.seen.decided_s.append(decided_s)
            self.seen.closed_s.append(closed_s)
            self.seen.commit_s.append(answered_s - began_s)

    def _plan(self, *, warm: bool) -> npt.NDArray[np.float64]:
        """Plans all ranks but the last, lets the other job save, and plans the last; returns what the others took."""
        self._ranks.start("plan", _CROWD, _LAST)
        self._all_but_one_wait()
        if warm:
            self._look("waiting")
            self._other_save(_MEANWHILE)
        last = self._ranks.members[_LAST]
        request = pb.PlanSaveRequest(
            key=self._job.key,
            location=self._job.location,
            rank=_LAST,
            plan_digest=last.plan_digest,
            wait=Duration(seconds=20),
        )
        if not warm:
            for blob in last.blobs:
                request.blobs.add().ParseFromString(blob)
        sent_s = time.monotonic()
        self._job.stub.PlanSave(request, timeout=120)
        return self._ranks.result()[:, 1] - sent_s

    def _all_but_one_wait(self) -> None:
        request = pb.GetCheckpointProgressRequest(key=self._job.key)
        end_s = time.monotonic() + 120
        planned_count = 0
        while planned_count < len(self._ranks.members) - 1:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{planned_count} ranks have planned")
            time.sleep(0.2)
            try:
                planned_count = self._job.stub.GetCheckpointProgress(request, timeout=60).progress.planned_count
            except grpc.RpcError as error:
                # Until the first rank has planned there is no such attempt.
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise

    def _other_save(self, what: str) -> None:
        self._other.next_save(self._others)
        self._burst(what, lambda: self._others.ask("register", _OTHER, self._sizes.in_flight))
        self._other.commit()

    def _burst(self, what: str, work: Callable[[], Times]) -> None:
        self.seen.bursts.setdefault(what, Bursts()).burst(work, self._processors)

    def _look(self, moment: str) -> None:
        """Looks at the server's memory and sockets."""
        self.seen.rss_bytes[moment] = max(rss_bytes(self._pid), self.seen.rss_bytes.get(moment, 0))
        links = []
        for link in Path(f"/proc/{self._pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(str(link.readlink()))
        self.seen.sockets[moment] = sum(link.startswith("socket:") for link in links)


def _rows(report: Report, seen: _Seen, count: int, limit: int) -> None:
    server = f"Postgres 1, {count:,} connections"
    for what in (_EMPTY, _ALL, _ALONE, _MEANWHILE):
        report.row(servers=server, what=what, **seen.bursts[what].columns())
    _waits(report, server, "waiting in PlanSave: from the last plan to the decision", seen.decided_s)
    _waits(report, server, "waiting for the commit: from its answer to theirs", seen.closed_s)
    report.row(servers=server, what="commit", p50_ms=round(statistics.median(seen.commit_s) * 1000, 1))
    for moment, rss in seen.rss_bytes.items():
        report.row(servers=server, what=f"memory, {moment}", rss_bytes=rss, sockets=seen.sockets.get(moment))
    report.row(servers=server, what="opening all", took_s=round(seen.opened_s, 2), open_files_limit=limit)
    opened = seen.sockets["all open"] - seen.sockets["before"]
    if opened < count:
        raise RuntimeError(f"{opened} sockets for {count} connections")
    # What the first save leaves behind, structures that are known from then on, is not the connections'.
    for moment, since in (("all open", "before"), ("each used", "before"), ("waiting", "after the first save")):
        grown_bytes = seen.rss_bytes[moment] - seen.rss_bytes[since]
        report.ratio(f"bytes a connection, {moment}, since {since}", grown_bytes / count)
    alone, meanwhile = seen.bursts[_ALONE].rate, seen.bursts[_MEANWHILE].rate
    report.ratio("registrations/s of another job, while all others wait / before", meanwhile / alone)


def _waits(report: Report, server: str, what: str, waits: Sequence[npt.NDArray[np.float64]]) -> None:
    p50, p99, last = np.percentile(np.concatenate(waits), (50, 99, 100)) * 1000
    report.row(servers=server, what=what, p50_ms=round(p50, 1), p99_ms=round(p99, 1), last_ms=round(last, 1))
