"""Real ranks: torch processes in a gloo group that save the same state through ``dcp.save`` and ``shardbook.dcp.save``.

The state is FSDP2's in small: some hundred DTensors sharded over the ranks, a few hundred bytes each, so that what a
save costs is not its bytes. Every contender writes with the same ``FileSystemWriter``, fsync included, into a new
directory each time; contenders take turns, all ranks begin together.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from benchmarks.simulated import Server

DCP: Final = "DCP"
DCP_CACHING: Final = "DCP, plan caching"
SHARDBOOK: Final = "Shardbook"
CONTENDERS: Final = (DCP, DCP_CACHING, SHARDBOOK)

#: Tensors of the state, and the rows and columns that each rank has of one.
TENSORS: Final = 300
ROWS, COLUMNS = 4, 16
_DEADLINE_S: Final = 170.0


@dataclass(frozen=True)
class RankSaved:
    """What one save took on one rank, seconds.

    Attributes:
        total_s: The whole save.
        write_s: The writer's ``write_data``, which a save that moves no metadata needs, too.
        plan_s: ``SaveStats.plan_s``, 0 for DCP.
        finish_s: ``SaveStats.finish_s``, 0 for DCP.
    """

    total_s: float
    write_s: float
    plan_s: float = 0.0
    finish_s: float = 0.0

    @property
    def metadata_s(self) -> float:
        """All but the writing of data: planning, agreeing, waiting for others, recording, ``.metadata``."""
        return self.total_s - self.write_s


@dataclass(frozen=True)
class Saved:
    """One save of all ranks: each figure is that of the rank where it was largest, seconds."""

    total_s: float
    metadata_s: float
    plan_s: float
    finish_s: float

    @classmethod
    def of(cls, ranks: Sequence[RankSaved]) -> Saved:
        """Returns what the slowest rank saw."""
        columns = ("total_s", "metadata_s", "plan_s", "finish_s")
        return cls(*(max(getattr(rank, name) for rank in ranks) for name in columns))


def saves(server: Server, world_size: int, count: int, tensors: int = TENSORS) -> dict[str, list[Saved]]:
    """Returns ``count`` saves of each contender in order; the first of each is cold.

    Raises:
        RuntimeError: A rank failed; the message has its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="shardbook-gloo-") as folder:
        job = _Job(world_size, folder, server.address, f"bench/gloo-{world_size}", count, tensors)
        with _ranks(job) as pipes:
            by_rank = [_answer(pipe) for pipe in pipes]
    return {name: [Saved.of([rank[name][at] for rank in by_rank]) for at in range(count)] for name in CONTENDERS}


@dataclass(frozen=True)
class _Job:
    world_size: int
    folder: str
    address: str
    run: str
    count: int
    tensors: int


@contextmanager
def _ranks(job: _Job) -> Iterator[list[Connection]]:
    """Starts a process for every rank; yields the pipes that bring their answers."""
    # One process imports torch and forks the ranks before any thread or connection is made; not shardbook.dcp, because
    # gRPC must not be imported before a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.checkpoint"])
    pipes, processes = [], []
    for rank in range(job.world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(theirs, job, rank), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        yield pipes
    finally:
        end_s = time.monotonic() + 10
        for process in processes:
            process.join(max(0.0, end_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _answer(pipe: Connection) -> dict[str, list[RankSaved]]:
    if not pipe.poll(_DEADLINE_S):
        raise RuntimeError(f"a rank gave no answer within {_DEADLINE_S:.0f} s")
    found, failure = pipe.recv()
    if failure:
        raise RuntimeError(f"a rank failed:\n{failure}")
    answer: dict[str, list[RankSaved]] = found
    return answer


def _run_rank(pipe: Connection, job: _Job, rank: int) -> None:
    """The main function of a rank's process."""
    try:
        pipe.send((_save_all(job, rank), ""))
    except BaseException:  # noqa: BLE001 - told to the process that asked, which raises it
        pipe.send(({}, traceback.format_exc()))


def _save_all(job: _Job, rank: int) -> dict[str, list[RankSaved]]:
    import torch
    import torch.distributed as dist

    import shardbook.dcp as shardbook

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(job.folder) / "store"), job.world_size),
        rank=rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=_DEADLINE_S),
    )
    try:
        shardbook.init(run=job.run, server=job.address, on_live="takeover")
        state = _state(job)
        root = Path(job.folder)
        contenders: dict[str, Callable[[Path], RankSaved]] = {
            DCP: lambda path: _through_dcp(state, path, caching=False),
            DCP_CACHING: lambda path: _through_dcp(state, path, caching=True),
            SHARDBOOK: lambda path: _through_shardbook(state, path),
        }
        found: dict[str, list[RankSaved]] = {name: [] for name in contenders}
        for step in range(job.count):
            for at, (name, save) in enumerate(contenders.items()):
                dist.barrier()
                found[name].append(save(root / f"contender-{at}" / f"step-{step}"))
        dist.barrier()
        return found
    finally:
        shardbook.close()
        dist.destroy_process_group()


def _state(job: _Job) -> dict[str, Any]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (job.world_size,))
    tensors = {
        f"layers.{at // 7}.weight_{at % 7}": DTensor.from_local(
            torch.full((ROWS, COLUMNS), float(at)), mesh, [Shard(0)], run_check=False
        )
        for at in range(job.tensors)
    }
    return {"model": tensors, "step": 0}


def _timed_writer(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemWriter

    class Timed(FileSystemWriter):
        """Knows how long it wrote data."""

        write_s = 0.0

        def write_data(self, plan: Any, planner: Any) -> Any:
            begin = time.perf_counter()
            written = super().write_data(plan, planner)
            written.wait()
            self.write_s += time.perf_counter() - begin
            return written

    return Timed(path)


def _through_dcp(state: dict[str, Any], path: Path, *, caching: bool) -> RankSaved:
    import torch.distributed.checkpoint as dcp

    writer, planner = _timed_writer(path), dcp.DefaultSavePlanner(enable_plan_caching=caching)
    begin = time.perf_counter()
    dcp.save(state, storage_writer=writer, planner=planner)
    return RankSaved(time.perf_counter() - begin, writer.write_s)


def _through_shardbook(state: dict[str, Any], path: Path) -> RankSaved:
    import shardbook.dcp as shardbook

    writer = _timed_writer(path)
    begin = time.perf_counter()
    result = shardbook.save(state, storage_writer=writer, checkpoint_id=path)
    total_s = time.perf_counter() - begin
    if result.state != "COMMITTED":
        raise RuntimeError(f"the save is {result.state}: {result.reason}")
    return RankSaved(total_s, writer.write_s, result.stats.plan_s, result.stats.finish_s)
