"""Ranks and servers that the tests of this folder may hurt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.behaviour.rpc.api import Api, api_of
from tests.databases import Databases
from tests.faults.server import ServerProcess
from tests.torch.harness import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks of a job."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def later_pool() -> Iterator[RankPool]:
    """Ranks of a job that starts while the first one's are still there."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose address stays; tests of the module may hurt it, and leave it alive and without faults."""
    with ServerProcess(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def either_server(tmp_path_factory: pytest.TempPathFactory, module_databases: Databases) -> Iterator[ServerProcess]:
    """The same over a database of either kind."""
    with ServerProcess(tmp_path_factory.mktemp("server"), module_databases.new()) as running:
        yield running


@pytest.fixture
def server(either_server: ServerProcess) -> Iterator[ServerProcess]:
    """A server that ends where a test says; without faults again after the test."""
    yield either_server
    if either_server.has_ended or either_server.failpoints:
        either_server.restart()


@pytest.fixture
def api(either_server: ServerProcess) -> Iterator[Api]:
    """Calls without retries."""
    with api_of(either_server.address) as calls:
        yield calls


_numbers = itertools.count(1)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"faults/run-{next(_numbers)}"
