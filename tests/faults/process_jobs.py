"""What ranks do that save by a process while they, or that process, are being hurt."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from shardbook import dcp
from shardbook.dcp.runtime import current
from shardbook.dcp.save_process_handle import save_process_of
from shardbook.errors import ShardbookError
from tests.faults.hurt import _Stopping, opened_for_writing
from tests.faults.jobs import _Dying
from tests.faults.processes import await_that
from tests.torch.harness import Rank
from tests.torch.inside import Arriving, report_at_exit
from tests.torch.layouts import fill, fsdp, spoil
from tests.torch.process_jobs import by_process


class Witness(Arriving):
    """Writes down, when the save process ends, what that process opened for writing."""

    def arrived(self) -> None:
        """Begins to watch."""
        report_at_exit(self.report, opened_for_writing(), list)


class SlowWriter(FileSystemWriter):
    """Takes its time before it writes."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Waits, then writes."""
        time.sleep(1.0)
        return super().write_data(plan, planner)


class WaitingWriter(FileSystemWriter):
    """Writes once there is a file ``go`` beside the checkpoint."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Waits, then writes."""
        await_that("there is a file", Path(os.fspath(self.path)).with_name("go").exists)
        return super().write_data(plan, planner)


def leave_an_orphan(rank: Rank, start: dict[str, Any], path: str, notes: str, stopped_rank: int | None) -> None:
    """Hands a save over, says which process has it, and waits to be killed.

    A forked child, such as a data loader's worker, holds all that it had open, and outlives it.

    Args:
        rank: This one.
        start: For ``init``.
        path: The checkpoint's.
        notes: Directory for the ids of the save process and the forked child, and for what the former opened.
        stopped_rank: Its save process stops itself in mid-write.
    """
    dcp.init(**start)
    writer = FileSystemWriter(path)
    if rank.rank == stopped_rank:
        writer.fs = _Stopping()
    by_process(fill(fsdp(rank)), storage_writer=writer, planner=Witness(f"{notes}/opened-{rank.rank}.json"))
    worker = os.fork()
    if not worker:
        time.sleep(600)
        os._exit(0)
    note = Path(notes, f"pids-{rank.rank}")
    note.with_suffix(".tmp").write_text(f"{save_process_of(current()).pid} {worker}")
    note.with_suffix(".tmp").rename(note)
    time.sleep(3600)


def save_other_values(rank: Rank, start: dict[str, Any], path: str) -> dcp.SaveResult:
    """Saves the same structure with other values, by a process too."""
    dcp.init(**start)
    return by_process(spoil(fsdp(rank)), checkpoint_id=path).result()


def lose_save_process(rank: Rank, start: dict[str, Any], directory: str, dying_rank: int) -> list[Any]:
    """Saves while one rank's save process is killed in mid-write; then while that of nobody is.

    Returns the errors' classes, reasons, exit codes and seconds, and the result of the last save.
    """
    dcp.init(**start)
    state = fill(fsdp(rank))
    ends: list[Any] = []
    for step in (1, 2):
        path = f"{directory}/step-{step}"
        writer = _Dying(path) if rank.rank == dying_rank and step == 1 else FileSystemWriter(path)
        began_s = time.monotonic()
        try:
            ends.append(by_process(state, storage_writer=writer).result())
        except ShardbookError as error:
            ends.append((error.reason, error.metadata.get("exit_code"), time.monotonic() - began_s))
    return ends


def lose_registered_save_process(rank: Rank, start: dict[str, Any], directory: str) -> Any:
    """Saves; rank 1's save process is killed once it is registered and waits for rank 0, which has not written yet."""
    dcp.init(**start)
    path = f"{directory}/step-1"
    writer = WaitingWriter(path) if rank.rank == 0 else FileSystemWriter(path)
    saving = by_process(fill(fsdp(rank)), storage_writer=writer)
    if rank.rank == 1:
        process = save_process_of(current())
        await_that("it is registered", lambda: any(one.is_registered for one in process._pending.values()))
        os.kill(process.pid, signal.SIGKILL)
    try:
        return saving.result().state.value
    except ShardbookError as error:
        Path(directory, "go").touch()
        return error.reason


def lose_idle_save_process(rank: Rank, start: dict[str, Any], directory: str) -> list[str]:
    """Saves, has the save process killed while it has nothing to do, and saves again."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    states = [by_process(state, checkpoint_id=f"{directory}/step-1").result().state.value]
    os.kill(save_process_of(current()).pid, signal.SIGKILL)
    states.append(by_process(state, checkpoint_id=f"{directory}/step-2").result().state.value)
    return states
