"""Ranks and a server that the tests of this folder share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import fsspec
import pytest

from shardbook import dcp
from shardbook_server.app import running_server
from shardbook_server.settings import Settings
from tests.conftest import MakeDatabases
from tests.databases import KINDS
from tests.torch.harness import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session", params=KINDS)
def server(request: pytest.FixtureRequest, make_databases: MakeDatabases) -> Iterator[str]:
    """Address of a server, on a database of either kind."""
    settings = Settings(listen="127.0.0.1:0", http_listen="", database_url=make_databases(request.param).new())
    with running_server(settings) as running:
        yield running.address


_numbers = itertools.count(1)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"tests/run-{next(_numbers)}"


@pytest.fixture
def session(server: str, run: str) -> Iterator[dcp.Session]:
    """A session of this process, on a run of its own."""
    yield dcp.init(run=run, server=server)
    dcp.close()


@pytest.fixture
def offline(run: str) -> Iterator[dcp.Session]:
    """A session without a server."""
    yield dcp.init(run=run, mode="offline")
    dcp.close()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket on an S3-compatible server of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        kind = fsspec.get_filesystem_class("s3")
        kind.clear_instance_cache()  # of another module's server
        fsspec.filesystem("s3").makedirs("checkpoints", exist_ok=True)
        yield "s3://checkpoints"
        kind.clear_instance_cache()
    server.stop()
