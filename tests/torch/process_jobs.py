"""What ranks do that save by a process; functions are found by name in the ranks' processes."""

from __future__ import annotations

import os
import threading
import time
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import AsyncStager

from shardbook import dcp
from shardbook.dcp.runtime import current
from shardbook.dcp.save_process_handle import save_process_of
from shardbook.errors import ForkedClientError, ShardbookError
from tests.torch.detector import detector
from tests.torch.harness import Rank
from tests.torch.inside import Watching
from tests.torch.layouts import LAYOUTS, fill, group_of, spoil

PROCESS = dcp.AsyncCheckpointerType.PROCESS


def by_process(state: dict[str, Any], **options: Any) -> dcp.AsyncSaveResponse:
    """``async_save`` by a process."""
    return dcp.async_save(state, async_checkpointer_type=PROCESS, **options)


@dataclass(frozen=True)
class Compared:
    """Saves of the same state by a process and by a thread.

    Attributes:
        by_process: Results by layout.
        by_thread: The same.
        noticed: What this rank said to others while it saved by a process.
        pids: Of the save processes.
    """

    by_process: dict[str, dcp.SaveResult]
    by_thread: dict[str, dcp.SaveResult]
    noticed: list[str]
    pids: set[int]


def save_layouts(rank: Rank, layouts: list[str], directory: str, start: dict[str, Any]) -> Compared:
    """Saves layouts by process and by thread; the state dict is spoilt as soon as it may be changed."""
    dcp.init(**start)
    told = Compared({}, {}, [], set())
    for step, layout in enumerate(layouts, 1):
        state = fill(LAYOUTS[layout](rank))
        paths = {how: f"{directory}/{layout}-{how}" for how in ("process", "thread")}
        with detector() as noticed:
            planner = Watching(f"{directory}/report-{rank.rank}.json")
            response = by_process(state, checkpoint_id=paths["process"], step=step, planner=planner)
            response.staging_completion.result()
        spoil(state)
        told.by_process[layout] = response.result()
        told.noticed.extend(noticed)
        told.pids.add(save_process_of(current()).pid)
        told.by_thread[layout] = dcp.async_save(fill(state), checkpoint_id=paths["thread"], step=100 + step).result()
    dcp.close()  # the save process writes its report when it ends
    return told


def save_as_submesh(rank: Rank, ranks: list[int], path: str, start: dict[str, Any]) -> dcp.SaveResult | None:
    """Saves by a process from a group of some ranks; the others do nothing and return None."""
    group = group_of(ranks)
    if rank.rank not in ranks:
        return None
    dcp.init(process_group=group, **start)
    return by_process(fill(LAYOUTS["objects"](rank)), checkpoint_id=path, process_group=group).result()


def save_in_a_row(rank: Rank, directory: str, start: dict[str, Any]) -> list[dcp.SaveResult]:
    """Starts three saves of other values with one planner and one writer, waiting for none; returns their results."""
    dcp.init(**start)
    writer, planner = FileSystemWriter(f"{directory}/step-0"), DefaultSavePlanner()
    state = {"w": torch.zeros(1000), f"own{rank.rank}": torch.zeros(())}
    responses = []
    for step in (1, 2, 3):
        for tensor in state.values():
            tensor.fill_(step)
        path = f"{directory}/step-{step}"
        responses.append(by_process(state, checkpoint_id=path, storage_writer=writer, planner=planner))
    return [response.result() for response in responses]


def save_in_any_order(rank: Rank, directory: str, start: dict[str, Any]) -> list[str]:
    """Saves two parts, each rank in an order of its own, waiting for neither before both have begun."""
    dcp.init(**start)
    parts = ["weights", "optim"] if rank.rank else ["optim", "weights"]
    state = {"w": torch.ones(5)}
    saves = [by_process(state, checkpoint_id=f"{directory}/{part}-1", part=part) for part in parts]
    states = [save.result().state.value for save in saves]
    # The trainer keeps the leases of the sessions that its save process has begun.
    return [*states, *sorted(current()._kept_numbers())]


@dataclass(frozen=True)
class Tried:
    """How saves ended on a rank: a state, or an error's class, reason and metadata; and what each took, seconds."""

    ends: list[Any]
    elapsed_s: list[float]


def _end(tried: Tried, save: Any) -> None:
    began_s = time.monotonic()
    try:
        tried.ends.append(save().result().state.value)
    except ShardbookError as error:
        tried.ends.append((type(error).__name__, error.reason, dict(error.metadata)))
    tried.elapsed_s.append(time.monotonic() - began_s)


class _Stubborn:
    """Goes into a pickle and does not come out of it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("not here")


def save_what_cannot_travel(rank: Rank, directory: str, start: dict[str, Any]) -> Tried:
    """Saves on all ranks, while rank 1 has something that the save process cannot have; then saves without it."""
    dcp.init(**start)
    tried = Tried([], [])
    for step, odd in enumerate((threading.Lock(), _Stubborn(), None), 1):
        state = {"w": torch.ones(3), "extra": {"odd": [odd if rank.rank == 1 else None]}}
        _end(tried, lambda state=state, step=step: by_process(state, checkpoint_id=f"{directory}/step-{step}"))
    return tried


def save_with_options(rank: Rank, directory: str, start: dict[str, Any]) -> list[Any]:
    """Saves with each option that says how a save is to end."""
    dcp.init(**start)
    tried = Tried([], [])
    state = {"w": torch.ones(3)}
    _end(tried, lambda: by_process(state, checkpoint_id=f"{directory}/step-1", wait="registered"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _end(tried, lambda: by_process(state, checkpoint_id=f"{directory}/step-2", export_metadata=False))
    if rank.rank == 0:  # alone: nobody else comes
        _end(tried, lambda: by_process(state, checkpoint_id=f"{directory}/step-3", timeout_s=1.0))
    return tried.ends


class LaterStager(AsyncStager):
    """Has its copy ready when it is told to."""

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self.future: Future[dict[str, Any]] = Future()

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        """Returns the copy's future."""
        return self.future

    def synchronize_staging(self) -> None:
        """Waits for nothing."""

    def close(self) -> None:
        """Has nothing to close."""


def save_in_fork(rank: Rank, start: dict[str, Any], path: str) -> tuple[str, str]:
    """Saves by a process, then tries to from a forked child; returns the child's error and how a later save ends."""
    dcp.init(**start)
    state = {"w": torch.ones(rank.world_size)}
    by_process(state, checkpoint_id=f"{path}/step-1").result()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        told = "nothing"
        try:
            by_process(state, checkpoint_id=f"{path}/step-2")
        except ForkedClientError as error:
            told = error.reason
        finally:
            dcp.close()  # takes nothing from the parent
            os.write(writing, told.encode())
            os._exit(0)
    os.waitpid(child, 0)
    return os.read(reading, 100).decode(), by_process(state, checkpoint_id=f"{path}/step-3").result().state.value
