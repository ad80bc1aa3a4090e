"""What ranks do in the tests of stragglers, small disks and bad networks; found by name in the ranks' processes."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from shardbook import dcp
from shardbook._channel import Connections
from shardbook.errors import ShardbookError
from tests.faults.jobs import _before
from tests.faults.proxy import Fault, switch
from tests.torch.harness import Rank
from tests.torch.layouts import fill, fsdp

_seen: list[str] | None = None
_is_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _seen.append(arguments[0])
    elif event == "os.rename":
        _seen.append(os.fspath(arguments[1]))
    elif event in ("os.remove", "os.truncate"):
        _seen.append(os.fspath(arguments[0]))


@contextmanager
def opened_for_writing() -> Iterator[list[str]]:
    """Yields a list of the files that this process opens for writing, renames to or removes, as Python is told."""
    global _seen, _is_watching  # noqa: PLW0603 - an audit hook is for ever, so there is one
    if not _is_watching:
        sys.addaudithook(_watch)
        _is_watching = True
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


@dataclass(frozen=True)
class Witnessed:
    """A save, and what it opened for writing."""

    result: dcp.SaveResult | None
    error: ShardbookError | None
    opened: list[str]


class _Stopping(FileSystem):
    """Stops its own process when the first bytes of a data file are written; it goes on when it is continued."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as opened:
            stream: Any = opened
            if os.fspath(path).endswith(".distcp") and mode == "wb":
                write = stream.write

                def stopping(content: Any) -> int:
                    count: int = write(content)
                    stream.write = write
                    stream.flush()
                    # To this very thread: it goes no further, while another one may until the process has stopped.
                    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
                    return count

                stream.write = stopping
            yield stream


def straggle(rank: Rank, start: dict[str, Any], path: str, stopped_rank: int) -> Witnessed:
    """Saves while one rank is stopped with its data half written."""
    dcp.init(**start)
    writer = FileSystemWriter(path)
    if rank.rank == stopped_rank:
        writer.fs = _Stopping()
    with opened_for_writing() as opened:
        try:
            return Witnessed(dcp.save(fill(fsdp(rank)), storage_writer=writer), None, opened)
        except ShardbookError as error:
            return Witnessed(None, error, opened)


def exceed_limit(rank: Rank, start: dict[str, Any], path: str, limited_rank: int) -> list[dcp.SaveResult | Exception]:
    """Saves twice: once while one rank may write no file of more than 2 KiB, and again without that limit."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    outcomes: list[dcp.SaveResult | Exception] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank.rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        outcomes.append(dcp.save(state, checkpoint_id=path))
    except (OSError, RuntimeError, ShardbookError) as error:
        outcomes.append(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    outcomes.append(dcp.save(state, checkpoint_id=path))
    return outcomes


@dataclass(frozen=True)
class Tried:
    """A save, how long it took in seconds, and how many calls it tried, retries included."""

    result: dcp.SaveResult
    elapsed_s: float
    try_count: int


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Counts what this process tries to call; every try looks up its connection."""
    original, counts = Connections.get, [0]

    def counted(self: Connections, address: Any) -> Any:
        counts[0] += 1
        return original(self, address)

    Connections.get = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Connections.get = original  # type: ignore[method-assign]


def _tried(state: dict[str, Any], path: str) -> Tried:
    began_s = time.monotonic()
    with _counting() as counts:
        result = dcp.save(state, checkpoint_id=path)
    return Tried(result, time.monotonic() - began_s, counts[0])


def save_through(
    rank: Rank, start: dict[str, Any], directory: str, phase: str, control: str, fault: Fault
) -> list[Tried]:
    """Saves three steps through a proxy; rank 0 has it strike from a phase of the second."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    saves = [_tried(state, f"{directory}/step-1")]
    if rank.rank == 0:
        with _before(phase, lambda: switch(control, fault)):
            saves.append(_tried(state, f"{directory}/step-2"))
    else:
        saves.append(_tried(state, f"{directory}/step-2"))
    saves.append(_tried(state, f"{directory}/step-3"))
    if rank.rank == 0:
        switch(control, Fault())  # the end of the lease is nothing to wait for
    return saves


def save_steps(rank: Rank, start: dict[str, Any], paths: list[str]) -> list[Tried]:
    """Saves the same state into each of ``paths``."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    return [_tried(state, path) for path in paths]


def save_by_another_route(
    rank: Rank, start: dict[str, Any], path: str, other_rank: int, other_address: str
) -> dcp.SaveResult:
    """Saves while one rank reaches the server at another address than all others."""
    session = dcp.init(**start)
    if rank.rank == other_rank:
        dcp.init(session=replace(session, server=other_address))
    return dcp.save(fill(fsdp(rank)), checkpoint_id=path)


def save_twice_in_background(rank: Rank, start: dict[str, Any], paths: list[str]) -> list[dcp.SaveResult]:
    """Starts two saves in a row, neither waiting for the other; returns their results."""
    dcp.init(**start)
    state = fill(fsdp(rank))
    responses = []
    for path in paths:
        responses.append(dcp.async_save(state, checkpoint_id=path))
        responses[-1].staging_completion.result()
    return [response.result() for response in responses]
