"""Servers with HTTP, which look at their database often."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from shardbook_server import operations
from shardbook_server.app import Server, running_server
from shardbook_server.failpoints import Failpoints
from tests.behaviour.rpc.api import Api, api_of, settings_in, wait_until
from tests.databases import Databases

_numbers = itertools.count()


@pytest.fixture(scope="package", autouse=True)
def _plain_log() -> Iterator[None]:
    """Log lines as they are: a traceback with every local variable takes seconds to draw."""
    structlog.configure(processors=[structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)])
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="package", autouse=True)
def _looks_often() -> Iterator[None]:
    """The server looks at sizes, staging and runs every 100 ms, so that tests need not wait for 15 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "LOOK_EVERY_S", 0.1)
        yield


@dataclass(frozen=True)
class Ops:
    """A server with HTTP: stubs, and a client of its pages."""

    server: Server
    api: Api
    http: httpx.Client

    def sample(self, name: str, **labels: str) -> float:
        """Returns the sum of the samples of a metric that have these labels; 0 when there is none."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.http.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def running_ops(folder: Path, *, failpoints: str = "", tracing: Any = None, **changes: object) -> Iterator[Ops]:
    """Runs a server with HTTP on a free port."""
    settings = settings_in(folder, http_listen="127.0.0.1:0", **changes)
    with (
        running_server(settings, failpoints=Failpoints.parse(failpoints), tracing=tracing) as server,
        api_of(server.address) as api,
        httpx.Client(base_url=f"http://{server.http_address}", timeout=10) as http,
    ):
        yield Ops(server, api, http)
        # A look for calls that have just been cancelled may be under way.
        wait_until(lambda: server.database.checked_out() == 0)


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory, module_databases: Databases) -> Iterator[Ops]:
    """A server of the module's own, on a database of either kind."""
    with running_ops(tmp_path_factory.mktemp("ops"), database_url=module_databases.new()) as ops:
        yield ops


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"projects/test/runs/ops-{next(_numbers)}"
