"""What ranks do while they are being hurt; functions are found by name in the ranks' processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from shardbook import Client, dcp
from shardbook._trees import in_blocks
from shardbook.dcp.finishing import Finisher
from shardbook.dcp.runtime import current
from shardbook.dcp.submission import Submitter
from shardbook.dcp.writer import CheckpointFiles
from tests.torch.harness import Rank
from tests.torch.layouts import fill, fsdp, spoil, wrong_pieces

#: Where a save can be interrupted: just before rank 0 makes the call.
PHASES: dict[str, tuple[type, str]] = {
    "plan": (Submitter, "plan"),
    "register": (Submitter, "register"),
    "commit": (Finisher, "_commit"),
}


@dataclass(frozen=True)
class Timed:
    """A save and how long it took, seconds."""

    result: dcp.SaveResult
    elapsed_s: float


def _timed(state: dict[str, Any], path: str, *, is_async: bool = False, **options: Any) -> Timed:
    began_s = time.monotonic()
    if is_async:
        result = dcp.async_save(state, checkpoint_id=path, **options).result()
    else:
        result = dcp.save(state, checkpoint_id=path, **options)
    return Timed(result, time.monotonic() - began_s)


@contextmanager
def _before(phase: str, do: Callable[[], None]) -> Iterator[None]:
    """Does something just before the next call of a phase, once."""
    owner, name = PHASES[phase]
    original = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        setattr(owner, name, original)
        do()
        return original(*arguments, **options)

    setattr(owner, name, interrupted)
    try:
        yield
    finally:
        setattr(owner, name, original)


def lose_server(
    rank: Rank, start: dict[str, Any], directory: str, phase: str, server_pid: int, is_async: bool
) -> list[Timed]:
    """Saves three steps; rank 0 kills the server in the middle of the second."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    saves = [_timed(state, f"{directory}/step-1", is_async=is_async)]
    if rank.rank == 0:
        with _before(phase, lambda: os.kill(server_pid, signal.SIGKILL)):
            saves.append(_timed(state, f"{directory}/step-2", is_async=is_async))
    else:
        saves.append(_timed(state, f"{directory}/step-2", is_async=is_async))
    saves.append(_timed(state, f"{directory}/step-3", is_async=is_async))
    return saves


def server_comes_back(rank: Rank, start: dict[str, Any], directory: str) -> list[dcp.SaveResult]:
    """Saves with the server away from the start, waits for it, and saves again."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    results = [dcp.save(state, checkpoint_id=f"{directory}/step-1")]
    (Path(directory) / f"away-{rank.rank}").touch()
    _await_file(Path(directory) / "back")
    # The channel is the process's, so what this call waits for is there for the saves.
    list(Client(start["server"], timeout_s=60.0).list_runs())
    results.extend(dcp.save(state, checkpoint_id=f"{directory}/step-{step}") for step in (2, 3))
    return results


def _await_file(path: Path) -> None:
    end_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end_s, path
        time.sleep(0.05)


def nothing(_: Rank) -> None:
    """Has ranks started, so that what follows can be timed."""


def save_once(rank: Rank, start: dict[str, Any], path: str, options: dict[str, Any]) -> dcp.SaveResult:
    """Saves one step."""
    dcp.init(**start)
    return dcp.save(fill(fsdp(rank)), checkpoint_id=path, **options)


def load_once(rank: Rank, target: str) -> list[str]:
    """Loads into other values; returns what is wrong."""
    state = spoil(fsdp(rank))
    dcp.load(state, target)
    return wrong_pieces(state)


def load_tensors(_: Rank, target: str, shapes: dict[str, list[int]]) -> dict[str, float]:
    """Loads tensors; returns the sum of each."""
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    dcp.load(state, target)
    return {name: float(tensor.sum()) for name, tensor in state.items()}


class _FullDisk(FileSystem):
    """A disk that takes nothing more: the kernel itself says ENOSPC."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        wanted = os.fspath(path)
        with super().create_stream("/dev/full" if wanted.endswith(".distcp") else path, mode) as stream:
            yield stream


def full_disk(rank: Rank, start: dict[str, Any], path: str, full_rank: int) -> dcp.SaveResult:
    """Saves while one rank's disk is full."""
    dcp.init(**start)
    writer = FileSystemWriter(path)
    if rank.rank == full_rank:
        writer.fs = _FullDisk()
    return dcp.save(fill(fsdp(rank)), storage_writer=writer)


class _Dying(FileSystemWriter):
    """Sends its own process a signal in the middle of its data."""

    number = signal.SIGKILL

    def write_data(self, plan: Any, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        with Path(os.fspath(self.path), f"{plan.storage_data.prefix}0.distcp").open("r+b") as stream:
            stream.truncate(stream.seek(0, os.SEEK_END) // 2)
            stream.flush()
            os.kill(os.getpid(), self.number)
        return done


def die_writing(
    rank: Rank, start: dict[str, Any], path: str, dying_rank: int, options: dict[str, Any]
) -> dcp.SaveResult:
    """Saves while one rank is killed with half of its data written."""
    dcp.init(**start)
    writer = _Dying(path) if rank.rank == dying_rank else FileSystemWriter(path)
    return dcp.save(fill(fsdp(rank)), storage_writer=writer, **options)


class _Stopping(FileSystemWriter):
    """Stops its own process before its data, as a host does that hangs; goes on when it is continued."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return super().write_data(plan, planner)


def hang_writing(rank: Rank, start: dict[str, Any], path: str, hanging_rank: int) -> dcp.SaveResult:
    """Saves while one rank hangs before it writes."""
    dcp.init(**start)
    writer = _Stopping(path) if rank.rank == hanging_rank else FileSystemWriter(path)
    return dcp.save(fill(fsdp(rank)), storage_writer=writer)


def save_other_values(rank: Rank, start: dict[str, Any], path: str) -> dcp.SaveResult:
    """Saves the same structure with other values."""
    dcp.init(**start)
    state = fsdp(rank)
    return dcp.save(spoil(state), checkpoint_id=path)


def load_other_values(rank: Rank, target: str) -> bool:
    """Whether loading finds what ``save_other_values`` saved."""
    state, right = fill(fsdp(rank)), spoil(fsdp(rank))
    dcp.load(state, target)
    mine, theirs = ([piece for _, piece in _tensors(one)] for one in (state, right))
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def _tensors(state: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    from tests.torch.layouts import pieces

    return [(path, piece) for path, piece, _ in pieces(state)]


def no_route_from_coordinator(rank: Rank, start: dict[str, Any], path: str) -> Timed:
    """Saves while the coordinator alone cannot reach the server."""
    dcp.init(**start)
    if rank.rank == 0:
        current()._client = Client("127.0.0.1:1", timeout_s=1.0)
    return _timed(fill(fsdp(rank)), path)


def kill_coordinator(rank: Rank, start: dict[str, Any], path: str) -> dcp.SaveResult:
    """Saves while rank 0 is killed before it commits."""
    dcp.init(**start)
    if rank.rank == 0:
        with _before("commit", lambda: os.kill(os.getpid(), signal.SIGKILL)):
            return dcp.save(fill(fsdp(rank)), checkpoint_id=path)
    return dcp.save(fill(fsdp(rank)), checkpoint_id=path)


def disagree(rank: Rank, start: dict[str, Any], by_rank: list[dict[str, Any]], without_route: bool = False) -> Timed:
    """Saves with arguments that each rank has of its own; ``without_route``, the coordinator alone has a service."""
    dcp.init(**start)
    if without_route and rank.rank:
        current()._client = Client("127.0.0.1:1", timeout_s=1.0)
    options = dict(by_rank[rank.rank])
    return _timed(fill(fsdp(rank)), options.pop("path"), **options)


class _Broken:
    """A Stateful that has no state to give, on one rank."""

    def __init__(self, broken: bool) -> None:
        self._broken = broken

    def state_dict(self) -> dict[str, Any]:
        """Fails, or gives a number."""
        if self._broken:
            raise ValueError("no state today")
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def broken_state(rank: Rank, start: dict[str, Any], path: str, broken_rank: int, is_async: bool) -> Timed:
    """Saves an object that fails on one rank, before anything is planned."""
    dcp.init(**start)
    return _timed(fill(fsdp(rank)) | {"x": _Broken(rank.rank == broken_rank)}, path, is_async=is_async)


def die_publishing(rank: Rank, start: dict[str, Any], path: str, write_count: int) -> None:
    """Saves; the coordinator is killed after that many files of those that describe the directory."""
    dcp.init(**start)
    original, written = CheckpointFiles.write, list[str]()

    def killing(files: CheckpointFiles, path: str, content: bytes | Iterable[bytes]) -> None:
        describes = not path.endswith((".record", "alone"))
        whole = b"".join(in_blocks(content))  # the mark is left with the last block, before the file is there
        if describes and len(written) == write_count:
            os.kill(os.getpid(), signal.SIGKILL)
        original(files, path, whole)
        if describes:
            written.append(path)

    if rank.rank == 0:
        setattr(CheckpointFiles, "write", killing)  # noqa: B010 - its first argument has a name of its own
    dcp.save(fill(fsdp(rank)), checkpoint_id=path)
    os.kill(os.getpid(), signal.SIGKILL)
