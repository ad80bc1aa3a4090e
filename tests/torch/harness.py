"""Real ranks: a pool of processes that are started once, run a function together in a gloo group, and are used again.

A job is a function of this package (processes find it by name) whose first argument is its ``Rank``. Ranks are forked,
see ``tests.forks``. A rank that a test kills is started anew by the next test that needs it.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from tests.forks import forked

#: How long a rank waits for another in a collective of its own, seconds.
GROUP_TIMEOUT_S: Final = 60.0
#: How long a test waits for its ranks, seconds.
JOB_TIMEOUT_S: Final = 90.0

Job = Callable[..., Any]


@dataclass(frozen=True)
class Rank:
    """What a job knows of itself.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: Ranks of the job.
    """

    rank: int
    world_size: int


@dataclass(frozen=True)
class Outcome:
    """How a job ended on one rank.

    Attributes:
        value: What it returned.
        error: What it raised; None when it returned.
        traceback: Of the error.
    """

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""


class RankError(AssertionError):
    """A rank raised; the message has the traceback."""


class Running:
    """A job that runs. ``pids`` are for signals."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self.pids = [worker.pid for worker in workers]

    def outcomes(self, timeout_s: float = JOB_TIMEOUT_S) -> list[Outcome]:
        """Waits for the ranks; a rank that was killed has an EOFError."""
        end_s = time.monotonic() + timeout_s
        return [worker.receive(max(0.0, end_s - time.monotonic())) for worker in self._workers]

    def values(self, timeout_s: float = JOB_TIMEOUT_S) -> list[Any]:
        """Waits for the ranks; raises RankError when one raised."""
        outcomes = self.outcomes(timeout_s)
        failures = [f"rank {rank}: {one.traceback}" for rank, one in enumerate(outcomes) if one.error is not None]
        if failures:
            raise RankError("\n".join(failures))
        return [one.value for one in outcomes]


class RankPool:
    """Processes that run jobs, one job at a time."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._stores = tempfile.TemporaryDirectory(prefix="shardbook-stores-")

    def run(self, job: Job, *arguments: Any, world_size: int, **options: Any) -> list[Any]:
        """Runs a job on ``world_size`` ranks; returns their values by rank, see ``start`` for options."""
        return self.start(job, *arguments, world_size=world_size, **options).values()

    def start(
        self,
        job: Job,
        *arguments: Any,
        world_size: int,
        process_group: bool = True,
        environment: dict[str, str] | None = None,
        environments: Sequence[dict[str, str]] | None = None,
    ) -> Running:
        """Starts a job.

        Args:
            job: A function of this package; gets its Rank, then ``arguments``.
            arguments: Picklable.
            world_size: Number of ranks.
            process_group: Whether the ranks are in a gloo group.
            environment: Environment variables of every rank while the job runs.
            environments: The same rank by rank, on top.
        """
        self._workers = [worker if worker.is_idle else _replaced(worker) for worker in self._workers]
        while len(self._workers) < world_size:
            self._workers.append(_Worker())
        store = tempfile.mkdtemp(dir=self._stores.name)
        chosen = self._workers[:world_size]
        for rank, worker in enumerate(chosen):
            variables = {**(environment or {}), **(environments[rank] if environments else {})}
            worker.send((job, arguments, Rank(rank, world_size), f"{store}/store" if process_group else "", variables))
        return Running(chosen)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()
        self._stores.cleanup()


class _Worker:
    """One process, seen from the test."""

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = forked(_serve, theirs)
        theirs.close()
        self._is_busy = False

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid or 0

    @property
    def is_idle(self) -> bool:
        """True while it runs and has no job: a test that failed may have left it with one."""
        return self._process.is_alive() and not self._is_busy

    def send(self, work: object) -> None:
        """Gives it a job."""
        self._pipe.send(work)
        self._is_busy = True

    def receive(self, timeout_s: float) -> Outcome:
        """Returns how its job ended; a process that does not answer in time is killed."""
        try:
            if self._pipe.poll(timeout_s):
                outcome: Outcome = self._pipe.recv()
                self._is_busy = False
                return outcome
            error: BaseException = TimeoutError(f"no answer within {timeout_s:.0f} s")
        except (EOFError, ConnectionResetError) as gone:
            error = EOFError(f"the process ended: {gone}")
        self.kill()
        return Outcome(error=error, traceback=str(error))

    def kill(self) -> None:
        """Ends the process at once, be it stopped."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Ends the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def _replaced(worker: _Worker) -> _Worker:
    worker.kill()
    return _Worker()


def _serve(pipe: Connection) -> None:
    """Runs jobs until there are no more; the main function of a rank's process."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message in ("Detected an existing checkpoint", ".*torch.distributed is disabled", "Please use DTensor instead"):
        warnings.filterwarnings("ignore", message=message)
    for category in (FutureWarning, DeprecationWarning):  # torch's own, from its own modules
        warnings.filterwarnings("ignore", category=category, module="torch")
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        if work is None:
            return
        pipe.send(_picklable(_run(*work)))


def _run(job: Job, arguments: tuple[Any, ...], rank: Rank, store: str, variables: dict[str, str]) -> Outcome:
    import torch.distributed as dist

    from shardbook import dcp

    before = dict(os.environ)
    os.environ.update(variables)
    try:
        if store:
            from tests.torch.detector import counting_store

            dist.init_process_group(
                "gloo",
                store=counting_store(store, rank.world_size),
                rank=rank.rank,
                world_size=rank.world_size,
                timeout=timedelta(seconds=GROUP_TIMEOUT_S),
            )
            # A job that is done at once would close its connections while others are still making theirs.
            dist.barrier()
        return Outcome(job(rank, *arguments))
    except BaseException as error:  # noqa: BLE001 - the test is told
        return Outcome(error=error, traceback=traceback.format_exc())
    finally:
        dcp.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def _picklable(outcome: Outcome) -> Outcome:
    """Errors of torch's that do not pickle travel as text."""
    import pickle

    try:
        pickle.loads(pickle.dumps(outcome))
    except Exception as error:  # noqa: BLE001 - whatever pickling does
        told = RuntimeError(f"{type(outcome.error).__name__}: {outcome.error} ({error})")
        return Outcome(error=told, traceback=outcome.traceback)
    return outcome


def files_below(directory: Path) -> list[str]:
    """Returns the files below a directory, relative to it, sorted."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
