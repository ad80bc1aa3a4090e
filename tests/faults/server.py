"""A server in a process of its own, which can be killed and started again over the same database.

It is forked, see ``tests.forks``: a test may start ten of them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

from shardbook import Client, UnavailableError
from shardbook.errors import DeadlineExceededError
from tests.forks import forked

_START_S = 30.0


class ServerProcess:
    """``shardbook-server serve`` on a port that stays the same.

    Args:
        directory: Where its SQLite database is; made when it is not there.
        database_url: Another, migrated database instead.
        settings: Environment variables.

    Attributes:
        address: Where it answers.
        failpoints: Where and how it fails, since it was started last.
    """

    def __init__(self, directory: Path, database_url: str = "", **settings: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._database_url = database_url or f"sqlite:///{directory / 'shardbook.sqlite'}"
        self._log = directory / "server.log"
        self._settings = settings
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{found.getsockname()[1]}"
        self._process: BaseProcess | None = None
        self.failpoints = ""

    @property
    def pid(self) -> int:
        """Id of the process."""
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    @property
    def client(self) -> Client:
        """A client of it."""
        return Client(self.address, timeout_s=10.0)

    def start(self, failpoints: str = "") -> None:
        """Starts it and waits until it answers.

        Args:
            failpoints: Where and how it is to fail, see ``shardbook_server.failpoints``.
        """
        self.failpoints = failpoints
        command = ["serve", "--listen", self.address, "--database-url", self._database_url]
        environment = {**os.environ, **self._settings, "SHARDBOOK_FAILPOINTS": failpoints}
        self._process = forked(_run, command, environment, self._log)
        self._await_answer()

    def _await_answer(self) -> None:
        end_s = time.monotonic() + _START_S
        # A port that listens before a client's channel is told to look: who is refused waits ever longer.
        while not self._listens() and not self.has_ended and time.monotonic() < end_s:
            time.sleep(0.02)
        while True:
            try:
                list(Client(self.address, timeout_s=5.0).list_runs())
            except (UnavailableError, DeadlineExceededError):
                if time.monotonic() > end_s or self.has_ended:
                    raise
                time.sleep(0.1)
            else:
                return

    @property
    def has_ended(self) -> bool:
        """True when it was killed, or has ended by itself."""
        return self._process is None or not self._process.is_alive()

    def _listens(self) -> bool:
        host, _, port = self.address.rpartition(":")
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1.0):
            return True
        return False

    def stop(self) -> None:
        """Ends it as an operator would: it drains first."""
        assert self._process is not None
        self._process.terminate()
        assert 0 == self.await_exit(), self._log.read_text()[-2000:]
        self._process = None

    def freeze(self) -> None:
        """Stops it where it is; ``kill`` ends it all the same."""
        os.kill(self.pid, signal.SIGSTOP)

    def restart(self, failpoints: str = "") -> None:
        """Kills it when it still runs, and starts it over the same database."""
        self.kill()
        self.start(failpoints)

    def await_exit(self) -> int:
        """Waits until it has ended by itself; returns its exit code."""
        assert self._process is not None
        self._process.join(_START_S)
        assert self._process.exitcode is not None, "it has not ended"
        return self._process.exitcode

    def kill(self) -> None:
        """Ends it without a word."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self._process.kill()
            self._process.join()
            self._process = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _run(command: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Runs ``shardbook-server``; the main function of the server's process."""
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream, target in ((1, os.open(os.devnull, os.O_WRONLY)), (2, descriptor)):
        os.dup2(target, stream)
    from shardbook_server.cli import main

    sys.argv = ["shardbook-server", *command]
    main()
