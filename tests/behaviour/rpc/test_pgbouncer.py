"""A server whose database is behind pgbouncer in transaction mode: each transaction may be on another connection."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from shardbook.v1 import catalog_pb2, metadata_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.app import Server, prepare_database, running_server
from shardbook_server.settings import Settings
from shardbook_server.storage import migrate
from tests.behaviour.rpc.api import Job, api_of, payload, row, settings_in
from tests.conftest import MakeDatabases
from tests.pgbouncer import running_pgbouncer
from tests.postgres import Postgres

#: Connections to Postgres, fewer than the server has to pgbouncer: transactions of one take turns with others'.
SERVER_CONNECTIONS = 2
WORLD_SIZE = 4


@pytest.fixture(scope="module")
def direct_url(make_databases: MakeDatabases) -> str:
    """The database without pgbouncer, as migrations need it."""
    return make_databases("postgres").new()


@pytest.fixture(scope="module")
def settings(postgres: Postgres, direct_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a server behind it."""
    with running_pgbouncer(postgres, size=SERVER_CONNECTIONS) as bouncer:
        yield settings_in(
            tmp_path_factory.mktemp("pgbouncer"),
            database_url=bouncer.url_of(direct_url),
            migration_url=direct_url,
            postgres_prepared_statements=False,
        )


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[Server]:
    """A server on it; no connection may be left checked out."""
    with running_server(settings) as server:
        yield server
        assert 0 == server.database.checked_out()


def test_a_server_starts_behind_it(settings: Settings) -> None:
    """Rule: the schema and the durability are looked at through it."""
    assert migrate.HEAD == prepare_database(settings)


def test_saves_of_several_jobs_at_once(server: Server, run: str) -> None:
    """Rule: session, plan, register, commit and read, again and again: nothing of a transaction outlives it."""

    def save(name: str) -> list[int]:
        with api_of(server.address) as api, ThreadPoolExecutor(WORLD_SIZE) as ranks:
            job = Job.start(api, f"{run}-{name}", WORLD_SIZE)
            plans = [payload([row("w", rank, WORLD_SIZE), row("bias", 0, 1)]) for rank in range(WORLD_SIZE)]
            for step in range(1, 6):
                planned = ranks.map(
                    lambda rank, step=step: job.plan(rank, plans[rank], step, wait_s=10), range(WORLD_SIZE)
                )
                assert {pb.PlanSaveResponse.STATE_DECIDED} == {answer.state for answer in planned}
                shards = ranks.map(lambda rank, step=step: job.register(rank, plans[rank], step), range(WORLD_SIZE))
                assert not any(answer.unknown for answer in shards)
                assert types_pb2.CHECKPOINT_STATE_COMMITTED == job.commit(step).state
            parent = f"{job.run}/parts/default"
            read = api.metadata.GetMetadata(metadata_pb2.GetMetadataRequest(name=f"{parent}/checkpoints/latest"))
            assert len(list(read)) > 1
            listed = api.catalog.ListCheckpoints(catalog_pb2.ListCheckpointsRequest(parent=parent)).checkpoints
            return sorted(checkpoint.step for checkpoint in listed)

    with ThreadPoolExecutor(3) as jobs:
        assert [[1, 2, 3, 4, 5]] * 3 == list(jobs.map(save, "abc"))


def test_connections_come_back_as_they_were(server: Server, settings: Settings, direct_url: str) -> None:
    """Rule: locks and settings are of transactions, never of connections: other users of the pool find nothing."""
    server.database.ping()
    with psycopg.connect(settings.database_url, autocommit=True, prepare_threshold=None) as other:
        assert ("0",) == other.execute("SHOW statement_timeout").fetchone()
        assert ("off",) == other.execute("SHOW transaction_read_only").fetchone()
    with psycopg.connect(direct_url) as direct:
        count = direct.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
        assert count is not None
        assert 1 <= count[0] <= SERVER_CONNECTIONS
        locks = "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database AND datname = current_database() "
        assert (0,) == direct.execute(locks + "WHERE locktype = 'advisory'").fetchone()
