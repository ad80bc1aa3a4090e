"""The save process, seen from its trainer: started, spoken to, ended.

One process a session, started by the first save that asks for it and kept: its connection, its circuit breaker and
what it knows of the server last from save to save. It is a new interpreter (never a fork: gRPC and CUDA do not survive
one), in no process group, and it does not run the training script again, so a script needs no
``if __name__ == "__main__"``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import reduction, spawn
from multiprocessing.connection import Connection
from typing import Final

import torch

from shardbook.dcp.handover import Packed
from shardbook.dcp.prepared import PreparedSave
from shardbook.dcp.results import SaveResult
from shardbook.dcp.runtime import Runtime
from shardbook.dcp.save_messages import Answer, Hello, KeepLease, Logged, Registered, SaveRequest, Taken
from shardbook.errors import SaveProcessError

_LOG = logging.getLogger(__name__)

#: How long a save process without work may take to end, seconds.
_END_S: Final = 10.0
#: How often it is looked whether a silent save process is still there, seconds.
_LOOK_EVERY_S: Final = 1.0
_START: Final = "import sys; sys.path[:] = {path!r}; from shardbook.dcp.save_process import main; main({descriptor})"
#: It needs no device, and a context on one takes half a gigabyte: DCP's writer makes one where it sees a device.
_NO_DEVICE: Final = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


class HandedOver:
    """A save that was handed over. Thread-safe.

    Args:
        packed: The memory; its descriptor is closed once the save process has the save, or nobody will.

    Attributes:
        packed: The memory.
        future: How the save ends.
        is_taken: The save process has the save, and may have written some of it.
        is_registered: The service has this rank's registration.
    """

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.future: Future[SaveResult] = Future()
        self.is_taken = False
        self.is_registered = False

    def take(self) -> None:
        """Notes that the save process has the save."""
        self.is_taken = True
        os.close(self.packed.descriptor)


class SaveProcess:
    """A save process, seen from its trainer. Thread-safe."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._pending: dict[int, HandedOver] = {}
        self._is_closed = False
        mine, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs.fileno())
        self._connection = Connection(mine.detach())
        with contextlib.suppress(OSError):  # seen again by whoever sends a save
            self._connection.send(_hello(runtime))
        self._reader = threading.Thread(target=self._read, name="shardbook-save-process", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """True while it runs and takes saves."""
        return not self._is_closed and self._process.poll() is None

    def send(self, prepared: PreparedSave, packed: Packed) -> HandedOver | None:
        """Hands a save over; returns None when the process is gone.

        Args:
            prepared: The save.
            packed: The memory that holds its objects; the result's from now on when there is one.
        """
        handed, number = HandedOver(packed), next(self._numbers)
        request = SaveRequest(
            number=number,
            attempt=prepared.attempt,
            checkpoint_id=prepared.checkpoint_id,
            options=replace(prepared.options, labels=None, metrics=None, note=None),
            sessions=self._runtime.sessions,
            lease_ttl_s=self._runtime.lease_ttl_s,
            directory=_directory(),
            places=packed.places,
            said=prepared.said,
        )
        with self._lock:
            if self._is_closed:
                return None
            self._pending[number] = handed
            try:
                self._connection.send(request)
                reduction.send_handle(self._connection, packed.descriptor, self._process.pid)
            except OSError:
                del self._pending[number]
                self._shut()  # whatever is half sent makes no sense of what comes next
                return None
        return handed

    def close(self) -> None:
        """Takes no more saves. The process ends once it has none; one that is idle has ended when this returns."""
        with self._lock:
            if not self._is_closed:
                self._shut()
            is_idle = not self._pending
        if is_idle and threading.current_thread() is not self._reader:
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _shut(self) -> None:
        """Ends what is said to the process, also where a forked child of the trainer holds the socket too."""
        self._is_closed = True
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as one:
            one.shutdown(socket.SHUT_WR)

    def _read(self) -> None:
        """Takes what the process says until it is gone."""
        with contextlib.suppress(EOFError, OSError):
            while self._awaits():
                content = self._connection.recv_bytes()
                try:
                    self._take(pickle.loads(content))  # noqa: S301 - from our own process, over a socket of ours alone
                except Exception:  # noqa: BLE001 - whatever it is, other saves go on
                    _LOG.exception("what the save process says is not understood")
        self._gone()

    def _awaits(self) -> bool:
        """Waits until there is something to receive; False when the process is gone and has said all.

        A forked child of the trainer may hold the other end by chance, so that the end of the stream says nothing.
        """
        while not self._connection.poll(_LOOK_EVERY_S):
            if self._process.poll() is not None:
                return self._connection.poll()
        return True

    def _take(self, message: object) -> None:
        match message:
            case Logged(record):
                logger = logging.getLogger(record.name)
                if logger.isEnabledFor(record.levelno):
                    logger.handle(record)
            case KeepLease(part, sessions, lease_ttl_s):
                self._runtime.adopt_sessions(sessions, lease_ttl_s)
                self._runtime.start_keeping(part)
            case Taken(number):
                self._pending[number].take()
            case Registered(number):
                self._pending[number].is_registered = True
            case Answer(number, result, error, traceback):
                with self._lock:
                    handed = self._pending.pop(number)
                if result is not None:
                    handed.future.set_result(result)
                else:
                    error = error or RuntimeError("the save process gave no answer")
                    error.add_note(f"\nIn the save process:\n{traceback}")
                    handed.future.set_exception(error)

    def _gone(self) -> None:
        """Fails what the process leaves undone."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        with self._lock:
            self._is_closed = True
            left = list(self._pending.values())
            self._pending.clear()
            self._connection.close()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        for handed in left:
            told = "; this rank's share is registered, so the step may be committed" if handed.is_registered else ""
            handed.future.set_exception(
                SaveProcessError(
                    f"the save process {self.pid} was ended {how} before the save was over{told}",
                    metadata={"exit_code": str(code)},
                )
            )


_processes: Final[dict[Runtime, SaveProcess]] = {}
_processes_lock: Final = threading.Lock()


def save_process_of(runtime: Runtime) -> SaveProcess:
    """Returns the save process of a session, started anew when it is not there.

    Raises:
        SaveProcessError: It cannot be started.
    """
    with _processes_lock:
        process = _processes.get(runtime)
        if process is not None and process.is_usable:
            return process
        try:
            started = _processes[runtime] = SaveProcess(runtime)
        except (OSError, RuntimeError) as error:  # no thread is started any more when the interpreter ends
            raise SaveProcessError(f"the save process cannot be started: {error}") from error
        if process is None:
            runtime.at_close.append(lambda: end_save_process(runtime))
        return started


def end_save_process(runtime: Runtime) -> None:
    """Ends a session's save process, once it has no saves left; see ``SaveProcess.close``."""
    with _processes_lock:
        process = _processes.pop(runtime, None)
    if process is not None:
        process.close()


def _spawn(descriptor: int) -> subprocess.Popen[bytes]:
    """Starts the interpreter: a session of its own, so that a terminal's Ctrl-C and a launcher's signals miss it."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter
        [
            os.fsdecode(spawn.get_executable() or sys.executable),
            *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing
            "-c",
            _START.format(path=sys.path, descriptor=descriptor),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        start_new_session=True,
        env={**os.environ, **_NO_DEVICE},
    )


def _hello(runtime: Runtime) -> Hello:
    return Hello(
        session=runtime.session,
        config=runtime.config,
        alone=runtime.alone,
        joined=runtime.joined,
        began_s=runtime.began_s,
        parent_pid=os.getpid(),
        log_levels={name: logging.getLogger(name).getEffectiveLevel() for name in ("", "shardbook")},
        thread_count=torch.get_num_threads(),
    )


def _directory() -> str:
    with contextlib.suppress(OSError):  # it may have been removed
        return os.getcwd()  # noqa: PTH109 - a string is what is sent
    return "."
