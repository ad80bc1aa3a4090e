"""A server for each test module, and stubs to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import structlog

from shardbook_server.app import Server, running_server
from tests.behaviour.rpc.api import Api, api_of, settings_in, wait_until
from tests.databases import Databases

_numbers = itertools.count()


@pytest.fixture(scope="package", autouse=True)
def _plain_log() -> Iterator[None]:
    """Log lines as they are: a traceback with every local variable takes seconds to draw."""
    structlog.configure(processors=[structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)])
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, module_databases: Databases) -> Iterator[Server]:
    """A server in this process on a database of its own, of either kind; no connection may be left checked out."""
    settings = settings_in(tmp_path_factory.mktemp("server"), database_url=module_databases.new())
    with running_server(settings) as server:
        yield server
        # The server's own looks come and go; what was leaked stays.
        wait_until(lambda: 0 == server.database.checked_out())


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[Api]:
    """Stubs to the module's server."""
    with api_of(server.address) as api:
        yield api


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"projects/test/runs/run-{next(_numbers)}"
