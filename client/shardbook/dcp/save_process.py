"""The save process: saves what its trainer hands over, in the trainer's session, and in no process group.

Started by ``shardbook.dcp.save_process_handle``. It outlives a trainer that is killed by the saves in flight, no
longer: it goes when the socket pair is closed or the trainer is not its parent any more. Saves run side by side, each
in a thread, as they do with the thread executor: two groups of ranks may save in different orders.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import pickle
import sys
import threading
import traceback
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Final

import torch

from shardbook.dcp._torch import UnresolvedMesh
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.failing import give_up
from shardbook.dcp.handover import Packed, unpack
from shardbook.dcp.prepared import Claim, PreparedSave, files_of
from shardbook.dcp.rank_save import RankSave
from shardbook.dcp.results import SaveResult
from shardbook.dcp.runtime import Runtime
from shardbook.dcp.save_messages import Answer, Hello, KeepLease, Logged, Registered, SaveRequest, Taken

_LOG = logging.getLogger(__name__)

#: How often it looks whether its trainer is still there: forked children of a killed one may hold the socket, seconds.
_LOOK_EVERY_S: Final = 1.0


def main(descriptor: int) -> None:
    """Serves a trainer until that closes the socket pair, or is gone; returns when the saves in flight are over.

    Args:
        descriptor: This process's end of the socket pair.
    """
    trainer = _Trainer(Connection(descriptor))
    hello: Hello = trainer.connection.recv()
    _set_up_logging(hello, trainer)
    torch.set_num_threads(hello.thread_count)
    runtime = _SaveRuntime(hello, trainer)
    threads: list[threading.Thread] = []
    gc.freeze()  # torch's own objects need not be looked through after every save
    while trainer.awaits(hello.parent_pid):
        try:
            request: SaveRequest = trainer.connection.recv()
            packed = Packed(reduction.recv_handle(trainer.connection), request.places)
        except (EOFError, OSError):
            break
        # A daemon is not waited for by the interpreter, which would end what the saves need: it is waited for below.
        thread = threading.Thread(
            target=_serve, args=(runtime, trainer, request, packed), name="shardbook-save", daemon=True
        )
        thread.start()
        threads = [*(one for one in threads if one.is_alive()), thread]
    for thread in threads:
        thread.join()


class _Trainer:
    """The other end. Thread-safe for sending; a trainer that is gone is told nothing."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def awaits(self, pid: int) -> bool:
        """Waits until there is something to receive, the end perhaps; returns False when the trainer is gone."""
        with contextlib.suppress(OSError):
            while not self.connection.poll(_LOOK_EVERY_S):
                if os.getppid() != pid:
                    return False
            return True
        return False

    def tell(self, message: object) -> bool:
        """Sends a message; returns False when nobody is there to read it."""
        content = pickle.dumps(message)
        with self._lock:
            try:
                self.connection.send_bytes(content)
            except OSError:
                return False
        return True


class _SaveRuntime(Runtime):
    """The trainer's session in its save process. The trainer keeps the leases: they end with it."""

    def __init__(self, hello: Hello, trainer: _Trainer) -> None:
        super().__init__(hello.session, hello.config, hello.alone, hello.joined, is_shared=True, began_s=hello.began_s)
        self._trainer = trainer

    def start_keeping(self, part: str | None = None) -> None:
        """Has the trainer renew the lease of a part."""
        part = self.session.part if part is None else part
        self._trainer.tell(KeepLease(part, self.sessions, self.lease_ttl_s))


def _serve(runtime: Runtime, trainer: _Trainer, request: SaveRequest, packed: Packed) -> None:
    """Runs one save and answers."""
    try:
        answer = Answer(request.number, _save(runtime, trainer, request, packed))
    except BaseException as error:  # noqa: BLE001 - the trainer raises it
        answer = _failure(request, error)
    if not trainer.tell(answer) and answer.error is not None:
        attempt = request.attempt
        _LOG.error("step %d to %s failed, and its trainer is gone: %s", attempt.step, attempt.path, answer.traceback)
    gc.collect()  # frames and planners make cycles, and the memory of the state dict hangs on them


def _save(runtime: Runtime, trainer: _Trainer, request: SaveRequest, packed: Packed) -> SaveResult:
    attempt = request.attempt
    trainer.tell(Taken(request.number))
    runtime.adopt_sessions(request.sessions, request.lease_ttl_s)
    try:
        with best_effort("go where the trainer is"):
            os.chdir(request.directory)
        objects = unpack(packed)
        writer = objects["storage_writer"]
        files = files_of(writer, attempt.path)
    except BaseException as error:
        give_up(runtime, attempt, files_of(None, attempt.path), "plan", error)
        raise

    def tell() -> None:
        trainer.tell(Registered(request.number))

    prepared = PreparedSave(
        runtime=runtime,
        attempt=attempt,
        writer=writer,
        checkpoint_id=request.checkpoint_id,
        planner=objects["planner"],
        options=request.options,
        files=files,
        claim=Claim(),
        on_registered=tell,
        said=request.said,
    )
    return RankSave(prepared).run(objects["state_dict"])


def _failure(request: SaveRequest, error: BaseException) -> Answer:
    """Returns the answer that says what a save raised; as text where it does not survive pickling."""
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made in the line itself
    except Exception:  # noqa: BLE001 - whatever pickling does
        error = RuntimeError(f"{type(error).__qualname__}: {error}")
    return Answer(request.number, error=error, traceback=told)


class _Forwarding(logging.Handler):
    """Has the trainer log what is logged here; writes it to stderr once the trainer is gone."""

    def __init__(self, trainer: _Trainer, rank: int) -> None:
        super().__init__()
        self._trainer = trainer
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a record as text that says where it comes from."""
        try:
            told = copy.copy(record)
            told.msg = told.message = f"save process of rank {self._rank}: {self.format(record)}"
            told.args = told.exc_info = told.exc_text = told.stack_info = None
            if not self._trainer.tell(Logged(told)):
                sys.stderr.write(f"{told.msg}\n")
        except Exception:  # noqa: BLE001 - logging never breaks what it speaks of
            self.handleError(record)


def _set_up_logging(hello: Hello, trainer: _Trainer) -> None:
    logging.getLogger().addHandler(_Forwarding(trainer, hello.joined.rank))
    for name, level in hello.log_levels.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger(UnresolvedMesh.LOGGER).addFilter(UnresolvedMesh())
    logging.captureWarnings(capture=True)
