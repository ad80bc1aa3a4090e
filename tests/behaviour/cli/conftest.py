"""Fixtures of the command line's tests."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import structlog

from shardbook.cli import main
from shardbook.client import Client
from shardbook_server.app import Server, running_server
from shardbook_server.settings import Settings
from tests.behaviour.rpc.api import wait_until
from tests.databases import Databases


@pytest.fixture(scope="package", autouse=True)
def _quiet_server() -> Iterator[None]:
    """A server in this process logs to nobody: its lines are no part of a command's output."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@dataclass(frozen=True)
class Ran:
    """What a command did.

    Attributes:
        code: Exit code.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
    """

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON object on stdout."""
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the table on stdout, header first."""
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in self.out.splitlines()]


Shardbook = Callable[..., Ran]


@pytest.fixture
def shardbook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shardbook:
    """Runs the command in this process."""

    def run(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["shardbook", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ran(code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over an SQLite database of its own; no connection may be left in use."""
    url = f"sqlite:///{tmp_path_factory.mktemp('server') / 'db'}"
    with running_server(Settings(listen="127.0.0.1:0", http_listen="", database_url=url, drain_s=5)) as one:
        yield one
        wait_until(lambda: 0 == one.database.checked_out())


@pytest.fixture(scope="module")
def either_server(module_databases: Databases) -> Iterator[Server]:
    """A server over a database of its own, of either kind."""
    settings = Settings(listen="127.0.0.1:0", http_listen="", database_url=module_databases.new(), drain_s=5)
    with running_server(settings) as one:
        yield one
        wait_until(lambda: 0 == one.database.checked_out())


@pytest.fixture
def client(either_server: Server, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client, and the setting that the commands read."""
    monkeypatch.setenv("SHARDBOOK_SERVER", either_server.address)
    return Client(either_server.address)
