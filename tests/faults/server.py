"""A server in a process of its own, which can be killed and started again over the same database."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from shardbook import Client, UnavailableError

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
        self._process: subprocess.Popen[bytes] | None = None
        self.failpoints = ""

    @property
    def pid(self) -> int:
        """Id of the process."""
        assert self._process is not None
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
        with self._log.open("ab") as log:
            self._process = self._spawn(log)
        self._await_answer()

    def _spawn(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from shardbook_server.cli import main; main()",
                "serve",
                "--listen",
                self.address,
                "--database-url",
                self._database_url,
            ],
            env={**os.environ, **self._settings, "SHARDBOOK_FAILPOINTS": self.failpoints},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )

    def _await_answer(self) -> None:
        end_s = time.monotonic() + _START_S
        while True:
            try:
                list(Client(self.address, timeout_s=1.0).list_runs())
            except UnavailableError:
                if time.monotonic() > end_s or self.has_ended:
                    raise
                time.sleep(0.1)
            else:
                return

    @property
    def has_ended(self) -> bool:
        """True when it was killed, or has ended by itself."""
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """Ends it as an operator would: it drains first."""
        assert self._process is not None
        self._process.terminate()
        assert 0 == self._process.wait(_START_S), self._log.read_text()[-2000:]
        self._process = None

    def freeze(self) -> None:
        """Stops it where it is; ``kill`` ends it all the same."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def restart(self, failpoints: str = "") -> None:
        """Kills it when it still runs, and starts it over the same database."""
        self.kill()
        self.start(failpoints)

    def await_exit(self) -> int:
        """Waits until it has ended by itself; returns its exit code."""
        assert self._process is not None
        return self._process.wait(_START_S)

    def kill(self) -> None:
        """Ends it without a word."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
