"""The `shardbook-server` command, as an operator meets it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from grpc_health.v1 import health_pb2
from typer.testing import CliRunner, Result

from shardbook_server import cli
from shardbook_server.storage import migrate
from shardbook_server.storage.urls import shown_url
from tests.behaviour.rpc.api import api_of
from tests.databases import Databases

COMMAND = [sys.executable, "-m", "shardbook_server.cli"]
#: Stands before a command that is to begin with few files that it may open.
FEW_FILES = ["/bin/sh", "-c", 'ulimit -Sn 96 && exec "$@"', "sh"]
TIMEOUT_S = 30


def _run(*arguments: str, **environment: str) -> Result:
    """Runs a command that ends before it would serve, in this process: a fresh one takes a second to start."""
    return CliRunner().invoke(cli.app, arguments, env=environment)


def _run_serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `serve` where it is to be refused late: it sets up the log of its whole process."""
    variables = {**os.environ, "SHARDBOOK_LISTEN": "127.0.0.1:0", **environment}
    return subprocess.run(
        [*COMMAND, "serve", *arguments], env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@contextmanager
def _serving(*arguments: str, within: list[str] | None = None, **environment: str) -> Iterator[dict[str, str]]:
    """Runs `serve` on a free port; yields the lines it prints by their first word."""
    variables = {**os.environ, "SHARDBOOK_LISTEN": "127.0.0.1:0", **environment}
    process = subprocess.Popen(
        [*(within or ()), *COMMAND, "serve", *arguments],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().split(maxsplit=1)]
        while lines[-1] and lines[-1][0] != "export":
            lines.append(process.stdout.readline().split(maxsplit=1))
        assert all(lines), process.communicate()[1]
        yield {line[0]: line[1].strip() for line in lines}
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=TIMEOUT_S)
        assert 0 == process.returncode, log
        for line in log.splitlines():
            assert "event" in json.loads(line)
    finally:
        process.kill()
        process.communicate()


def test_serve_without_options_keeps_its_data_in_one_printed_place(tmp_path: Path) -> None:
    """Rule: it says where the data is and what to export; the log is JSON off a terminal; data outlive the server."""
    for _ in range(2):
        with _serving(XDG_DATA_HOME=str(tmp_path)) as lines:
            assert str(tmp_path / "shardbook" / "shardbook.db") == lines["data"]
            assert f"SHARDBOOK_SERVER={lines['address']}" == lines["export"]
            with api_of(lines["address"]) as api:
                assert (
                    health_pb2.HealthCheckResponse.SERVING == api.health.Check(health_pb2.HealthCheckRequest()).status
                )
    assert 0o700 == (tmp_path / "shardbook").stat().st_mode & 0o777


def test_serve_prints_where_http_is_and_ends_with_it(tmp_path: Path) -> None:
    """Rule: pages are there once the lines are printed; SIGTERM is the server's own, and its exit code 0."""
    with _serving(XDG_DATA_HOME=str(tmp_path), SHARDBOOK_HTTP_LISTEN="127.0.0.1:0") as lines:
        with urlopen(f"{lines['http']}/readyz", timeout=TIMEOUT_S) as page:
            assert 200 == page.status
        with urlopen(f"{lines['http']}/metrics", timeout=TIMEOUT_S) as page:
            assert f'schema="{migrate.HEAD}"'.encode() in page.read()


@pytest.mark.soak
def test_more_clients_get_in_than_the_shell_lets_a_process_open_files(tmp_path: Path) -> None:
    """Rule: the soft limit of open files is raised to the hard one: clients beyond it would hang without a word."""
    with ExitStack() as open_sockets, _serving(within=FEW_FILES, XDG_DATA_HOME=str(tmp_path)) as lines:
        host, _, port = lines["address"].rpartition(":")
        for _ in range(150):
            connection = open_sockets.enter_context(socket.create_connection((host, int(port)), timeout=TIMEOUT_S))
            # The preface of HTTP/2 and empty settings; a server that has accepted the connection sends its own.
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            assert connection.recv(9)


def test_an_http_address_that_is_taken_is_refused(tmp_path: Path) -> None:
    """Rule: exit 1 with one line that names the flag."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = _run_serve("--http-listen", listen, SHARDBOOK_DATABASE_URL=f"sqlite:///{tmp_path}/x.db")
    assert 1 == ran.returncode
    assert "--http-listen" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_print_config_says_what_is_in_effect_and_exits(tmp_path: Path) -> None:
    """Rule: TOML on standard output, nothing is opened or made; a setting that is wrong is refused as ever."""
    url = f"sqlite:///{tmp_path}/absent/x.db"
    ran = _run("serve", "--print-config", "--database-url", url, SHARDBOOK_ACCESS_LOG="none")
    assert 0 == ran.exit_code
    printed = tomllib.loads(ran.stdout)
    assert (url, "none") == (printed["database_url"], printed["access_log"])
    assert f'database_url = "{url}"  # flag' in ran.stdout.splitlines()
    assert not (tmp_path / "absent").exists()
    assert 1 == _run("serve", "--print-config", "--listen", "nowhere").exit_code


def test_serve_on_every_interface_prints_an_address_that_can_be_used(tmp_path: Path) -> None:
    """Rule: the line to export works on this machine; options win over the environment."""
    database = f"sqlite:///{tmp_path / 'x.db'}"
    with _serving("--listen", "0.0.0.0:0", "--database-url", database, SHARDBOOK_DATABASE_URL="nonsense") as lines:
        port = lines["address"].rpartition(":")[2]
        assert f"SHARDBOOK_SERVER=127.0.0.1:{port}" == lines["export"]
        assert str(tmp_path / "x.db") == lines["data"]


def test_serve_on_a_socket(tmp_path: Path) -> None:
    """Rule: unix:/path is an address like another."""
    with _serving("--listen", f"unix:{tmp_path}/s", SHARDBOOK_DATABASE_URL=f"sqlite:///{tmp_path}/x.db") as lines:
        assert f"unix:{tmp_path}/s" == lines["address"]
        with api_of(lines["address"]) as api:
            api.health.Check(health_pb2.HealthCheckRequest())


@pytest.fixture
def stale(databases: Databases) -> str:
    """A database of either kind that somebody migrated back."""
    url = databases.new()
    migrate.downgrade(url, "base")
    return url


def test_a_stale_database_is_refused_with_the_command_that_helps(stale: str) -> None:
    """Rule: a database that is not the embedded one is somebody's to migrate."""
    refused = _run_serve(SHARDBOOK_DATABASE_URL=stale)
    assert 1 == refused.returncode
    assert "shardbook-server db upgrade" in refused.stderr
    assert "Traceback" not in refused.stderr
    checked = _run("db", "check", SHARDBOOK_DATABASE_URL=stale)
    assert (1, "base\n") == (checked.exit_code, _run("db", "current", "--database-url", stale).stdout)
    upgraded = _run("db", "upgrade", SHARDBOOK_DATABASE_URL=stale)
    assert (0, "") == (upgraded.exit_code, upgraded.stderr)
    assert f"{migrate.HEAD}\n" == _run("db", "current", SHARDBOOK_DATABASE_URL=stale).stdout
    assert 0 == _run("db", "check", SHARDBOOK_DATABASE_URL=stale).exit_code
    with _serving(SHARDBOOK_DATABASE_URL=stale) as lines:
        shown = stale.removeprefix("sqlite:///") if stale.startswith("sqlite") else shown_url(stale)
        assert shown == lines["data"]


def test_the_embedded_database_is_upgraded_without_being_asked(tmp_path: Path) -> None:
    """Rule: `pip install --upgrade` and `serve` is all that a user of the embedded default does."""
    url = f"sqlite:///{tmp_path / 'shardbook' / 'shardbook.db'}"
    migrate.upgrade(url)
    migrate.downgrade(url, "base")
    with _serving(XDG_DATA_HOME=str(tmp_path)):
        pass
    assert migrate.HEAD == migrate.check(url)


def test_a_database_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    """Rule: an old server never writes a schema that it does not know."""
    url = f"sqlite:///{tmp_path / 'shardbook' / 'shardbook.db'}"
    migrate.upgrade(url)
    with closing(sqlite3.connect(tmp_path / "shardbook" / "shardbook.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute("UPDATE schema_compat SET oldest = '9999'")
        connection.commit()
    refused = _run_serve(XDG_DATA_HOME=str(tmp_path))
    assert 1 == refused.returncode
    assert "newer" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["serve", "--listen", "nowhere"], {}, "--listen is not valid: write host:port, [ipv6]:port or unix:/path"),
        (["serve", "--log-level", "loud"], {}, "--log-level is not one of 'debug', 'info', 'warning' or 'error'"),
        (["serve"], {"SHARDBOOK_WORKER_THREADS": "none"}, "SHARDBOOK_WORKER_THREADS is not a whole number"),
        (["serve"], {"SHARDBOOK_WORKER_THREADS": "0"}, "SHARDBOOK_WORKER_THREADS is below 1"),
        (["serve"], {"SHARDBOOK_DRAIN_S": "0"}, "SHARDBOOK_DRAIN_S is not above 0"),
        (["serve"], {"SHARDBOOK_DRAIN_S": "inf"}, "SHARDBOOK_DRAIN_S is "),
        (["serve"], {"SHARDBOOK_OTEL": "perhaps"}, "SHARDBOOK_OTEL is not true or false"),
        (["serve"], {"SHARDBOOK_DATABASE_URL": "sqlite:///rel.db"}, "sqlite:////absolute/path, with four slashes"),
        (["serve"], {"SHARDBOOK_CONFIG": "/no/such/file"}, "/no/such/file"),
        (["db", "upgrade"], {"SHARDBOOK_DATABASE_URL": "mysql://x"}, "mysql://x"),
        (["db", "check"], {"SHARDBOOK_DATABASE_URL": "sqlite:////no/such/database"}, "db upgrade"),
        (["db", "current"], {"SHARDBOOK_DATABASE_URL": "sqlite:////no/such/database"}, "db upgrade"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    """Rule: a refusal names what is wrong, without a traceback."""
    database = {"SHARDBOOK_DATABASE_URL": f"sqlite:///{tmp_path / 'x.db'}"}
    refused = _run(*arguments, **(database | environment))
    assert (1, "") == (refused.exit_code, refused.stdout)
    assert refused.stderr.startswith("error: ")
    assert said in refused.stderr
    assert 1 == len(refused.stderr.splitlines())


def test_a_file_with_wrong_settings_is_refused_by_their_names(tmp_path: Path) -> None:
    """Rule: a misspelt name gets the nearest one; a wrong value is named with its file and not repeated."""
    config = tmp_path / "c.toml"
    config.write_text('databse_url = "postgresql://me:secret@host/x"\nnonsense = 1\nbatch_max_count = "secret"\n')
    refused = _run("serve", "--config", str(config))
    assert 1 == refused.exit_code
    assert f"databse_url in {config} is no setting: did you mean database_url?" in refused.stderr
    assert f"nonsense in {config} is no setting; docs/SETTINGS.md lists them" in refused.stderr
    assert f"batch_max_count in {config} is not a whole number" in refused.stderr
    assert "secret" not in refused.stderr


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        ("192.0.2.1:7070", "it is not an address of this machine"),
        ("no-such-host.invalid:7070", "its host cannot be looked up"),
        ("unix:/no/such/folder/s", "there is no directory /no/such/folder"),
    ],
)
def test_an_address_that_cannot_be_had_is_refused_with_the_reason(tmp_path: Path, listen: str, why: str) -> None:
    """Rule: no other server is suspected where there is none, and gRPC's own lines stay off the terminal."""
    refused = _run_serve("--listen", listen, SHARDBOOK_DATABASE_URL=f"sqlite:///{tmp_path}/x.db")
    assert 1 == refused.returncode
    lines = [line for line in refused.stderr.splitlines() if not line.startswith("{")]
    assert 1 == len(lines)
    assert lines[0].startswith(f"error: cannot listen on {listen}: {why}")


def test_an_address_that_is_taken_is_refused(tmp_path: Path) -> None:
    """Rule: two servers never share a port; the second says so."""
    with _serving(SHARDBOOK_DATABASE_URL=f"sqlite:///{tmp_path}/one.db") as lines:
        refused = _run_serve("--listen", lines["address"], SHARDBOOK_DATABASE_URL=f"sqlite:///{tmp_path}/two.db")
    assert 1 == refused.returncode
    assert f"error: cannot listen on {lines['address']}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_failpoint_that_does_not_exist_keeps_the_server_from_starting(tmp_path: Path) -> None:
    """Rule: a test with a misspelt fault would prove nothing."""
    variables = {"SHARDBOOK_DATABASE_URL": f"sqlite:///{tmp_path}/x.db", "SHARDBOOK_FAILPOINTS": "commit=never"}
    refused = _run_serve(**variables)
    assert 1 == refused.returncode
    assert "error: SHARDBOOK_FAILPOINTS" in refused.stderr


def test_usage() -> None:
    """Rule: a command line that does not parse exits 2; the version is the distribution's."""
    assert 2 == _run("serve", "--nonsense").exit_code
    assert _run("--version").stdout.startswith("shardbook-server 0")
    assert {"serve", "db"} <= set(_run("--help").stdout.split())


@pytest.mark.parametrize("words", [(), ("serve",), ("db",), ("db", "upgrade")])
def test_help_is_plain(words: tuple[str, ...]) -> None:
    """Rule: `-h` works everywhere, and what stands in brackets is text, not markup."""
    ran = _run(*words, "-h")
    assert 0 == ran.exit_code
    assert ran.stdout.isascii()
    if words == ("serve",):
        assert "host:port, [ipv6]:port or unix:/path" in " ".join(ran.stdout.split())


def test_help_needs_nothing_heavy() -> None:
    """Rule: help and version answer without loading SQL, numpy or gRPC."""
    code = "import sys, shardbook_server.cli; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("sqlalchemy", "numpy", "grpc", "alembic", "torch"):
        assert f"'{heavy}'" not in loaded
