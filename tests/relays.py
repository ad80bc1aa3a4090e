"""``shardbook relay`` in a process of its own, which can be killed and started again at the same address."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

_END_S = 20.0


class RelayProcess:
    """The real command, on a socket below a short path: those of test folders are longer than a socket's may be.

    Args:
        server: Address of the server.
        socket: Another one than its own.

    Attributes:
        address: Where ranks find it.
        lines: What it printed when it was started last.
    """

    def __init__(self, server: str, socket: Path | None = None) -> None:
        self._server = server
        self._folder = Path(tempfile.mkdtemp(prefix="relay-")) if socket is None else None
        self.socket = socket or Path(f"{self._folder}/relay.sock")
        self.address = f"unix://{self.socket}"
        self.lines: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Id of the process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it listens."""
        command = [sys.executable, "-m", "shardbook.cli", "relay", "--listen", self.address, "--server", self._server]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.lines = [self._process.stdout.readline().rstrip("\n") for _ in range(3)]

    def terminate(self) -> None:
        """Asks it to drain."""
        assert self._process is not None
        self._process.terminate()

    def await_exit(self) -> int:
        """Waits until it has ended; returns its exit code."""
        assert self._process is not None
        self._process.communicate(timeout=_END_S)
        return self._process.returncode

    def kill(self) -> None:
        """Ends it without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> RelayProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder)
