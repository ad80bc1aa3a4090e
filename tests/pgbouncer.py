"""A pgbouncer in transaction mode, in front of a Postgres."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo

from tests.postgres import Postgres, as_user, free_port, unprivileged_user

_START_S = 15.0
_CONFIG = """\
[databases]
* = {server}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {size}
"""


@contextmanager
def running_pgbouncer(postgres: Postgres, *, size: int) -> Iterator[Pgbouncer]:
    """Runs one until the block ends.

    Args:
        postgres: What it leads to.
        size: Connections to each database of it, however many clients there are.
    """
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        raise RuntimeError("the tests need pgbouncer: apt-get install pgbouncer")
    folder, user, port = Path(tempfile.mkdtemp(prefix="shardbook-pgbouncer-")), unprivileged_user(), free_port()
    given = conninfo.conninfo_to_dict(postgres.url)
    server = {name: str(value) for name, value in given.items() if name in {"host", "port", "user", "password"}}
    try:
        config = folder / "pgbouncer.ini"
        config.write_text(_CONFIG.format(server=conninfo.make_conninfo(**server), port=port, size=size))
        if user is not None:
            for path in (folder, config):
                shutil.chown(path, user)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*as_user(user), program, config], stdout=log, stderr=log, cwd=folder)
        try:
            bouncer = Pgbouncer(port)
            _await(bouncer.url_of(postgres.url), process, folder / "log")
            yield bouncer
        finally:
            process.kill()
            process.wait(_START_S)
    finally:
        shutil.rmtree(folder)


class Pgbouncer:
    """One that runs.

    Args:
        port: Where it listens, on this machine.
    """

    def __init__(self, port: int) -> None:
        self._port = port

    def url_of(self, url: str) -> str:
        """Returns the URL that leads to a database through it."""
        return urlsplit(url)._replace(netloc=f"shardbook@127.0.0.1:{self._port}").geturl()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + _START_S
    while True:
        try:
            with psycopg.connect(url, connect_timeout=2):
                return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"pgbouncer did not start:\n{log.read_text()[-2000:]}") from error
            time.sleep(0.05)
