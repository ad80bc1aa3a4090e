"""What ranks do whose routes to the service differ, or that come late; found by name in the ranks' processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from shardbook import Client, dcp
from shardbook.dcp.runtime import current
from shardbook.errors import ShardbookError
from tests.faults.jobs import Timed, _await_file, _FullDisk, _timed
from tests.torch.harness import Rank
from tests.torch.layouts import fill, fsdp, group_of

#: Nobody listens there.
_NOWHERE = "127.0.0.1:1"


def cut_off() -> None:
    """Takes this process's route to the server away."""
    current()._client = Client(_NOWHERE, timeout_s=1.0)


def full_disk(rank: Rank, start: dict[str, Any], path: str, full_rank: int, cut_off_ranks: list[int]) -> Timed:
    """Saves while one rank's disk is full and some ranks have no route."""
    dcp.init(**start)
    if rank.rank in cut_off_ranks:
        cut_off()
    writer = FileSystemWriter(path)
    if rank.rank == full_rank:
        writer.fs = _FullDisk()
    return _timed(fill(fsdp(rank)), path, storage_writer=writer)


def refused_plan(
    rank: Rank, start: dict[str, Any], directory: str, refused_rank: int, cut_off_ranks: list[int], is_async: bool
) -> tuple[str, float, dcp.SaveResult]:
    """Saves with a planner that one rank refuses, then the same step without; returns how the first one ended."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    client = current()._client
    if rank.rank in cut_off_ranks:
        cut_off()
    planner = DefaultSavePlanner(enable_plan_caching=rank.rank == refused_rank)
    began_s = time.monotonic()
    try:
        _timed(state, f"{directory}/step-1", planner=planner, is_async=is_async)
        told = "nothing"
    except ShardbookError as error:
        told = f"{error.reason} {error}"
    elapsed_s = time.monotonic() - began_s
    current()._client = client
    return told, elapsed_s, dcp.save(state, checkpoint_id=f"{directory}/step-1")


class _Held(FileSystemWriter):
    """Writes its data once a file is there."""

    until = Path()

    def write_data(self, plan: Any, planner: Any) -> Any:
        _await_file(self.until)
        return super().write_data(plan, planner)


def slow_coordinator_without_route(rank: Rank, start: dict[str, Any], path: str, until: str) -> dcp.SaveResult:
    """Saves while rank 0 has no route and writes until the test says so."""
    dcp.init(**start)
    if rank.rank:
        return dcp.save(fill(fsdp(rank)), checkpoint_id=path)
    runtime = current()
    runtime.close()  # its lease is not renewed any more, as by a host that is cut off
    cut_off()
    writer = _Held(path)
    writer.until = Path(until)
    return dcp.save(fill(fsdp(rank)), storage_writer=writer)


def save_when_told(rank: Rank, start: dict[str, Any], directory: str, name: str, steps: list[int]) -> list[str]:
    """Starts a session; saves each step once its file is there; returns how each ended."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    ended = []
    folder = Path(directory)
    (folder / f"{name}-ready-{rank.rank}").touch()
    for step in steps:
        _await_file(folder / f"go-{step}")
        try:
            ended.append(str(dcp.save(state, checkpoint_id=folder / f"{name}" / f"step-{step}").state))
        except ShardbookError as error:
            ended.append(error.reason)
        (folder / f"{name}-done-{step}-{rank.rank}").touch()
    return ended


def part_of_some(rank: Rank, start: dict[str, Any], path: str, ranks: list[int], wait_s: float) -> list[bool]:
    """Saves a part from some ranks, without rank 0, then trains on; returns whether parts are still being written."""
    dcp.init(**start)
    group = group_of(ranks)
    if rank.rank in ranks:
        state = {"w": torch.arange(3.0), f"own{rank.rank}": torch.ones(1)}
        result = dcp.save(state, checkpoint_id=path, part="some", process_group=group)
        assert result.state == "COMMITTED", result
    dist.barrier()
    time.sleep(wait_s)
    parts = Client(start["server"]).get_run(start["run"]).parts
    dist.barrier()
    return [one.writing for one in parts]


class _Listless(FileSystem):
    """Storage that cannot be listed now; its library raises what is no OSError."""

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """Fails as gcsfs does."""
        raise HttpError(f"503 {path}")


class HttpError(Exception):
    """Of a library."""


def broken_looks(rank: Rank, start: dict[str, Any], path: str, late_s: float, is_cut_off: bool) -> dcp.SaveResult:
    """Saves on storage that cannot be listed; the last rank is late, so that the others look for what it left."""
    dcp.init(**start)
    writer = FileSystemWriter(path)
    writer.fs = _Listless()
    if rank.rank == rank.world_size - 1:
        time.sleep(late_s)
    if is_cut_off:
        cut_off()
    return dcp.save(fill(fsdp(rank)), storage_writer=writer, timeout_s=10.0)


def wait_then_save(
    rank: Rank, start: dict[str, Any], path: str, late_s: float, at: str
) -> tuple[dcp.SaveResult, float]:
    """Saves; rank 0 is late, and says so before it plans; returns what the outage cost too, seconds."""
    dcp.init(**start)
    if rank.rank == 0:
        time.sleep(late_s)
        Path(at).touch()
        _await_file(Path(f"{at}-down"))
    result = dcp.save(fill(fsdp(rank)), checkpoint_id=path)
    last = current().breaker._last_save
    assert last is not None
    return result, last.spent_s
