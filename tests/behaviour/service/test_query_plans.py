"""Statements find their rows by an index, whatever the tables have grown to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert

from shardbook.core.lineage import LineageKind, Origin
from shardbook.core.wanted import Wanted, encode_wanted
from shardbook_server.service.describing import Description
from shardbook_server.service.lineage import EdgeRequest
from shardbook_server.service.services import Services
from shardbook_server.service.types import OnLive
from shardbook_server.service.vitals import VitalsService
from shardbook_server.storage import lineage as lineage_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.lineage import LOCK
from shardbook_server.storage.tables import lineage
from shardbook_server.storage.urls import is_postgres
from tests.behaviour.service.saves import Job, Model, whole

#: Tables that grow with every save, run or structure.
GROWING = {
    "checkpoints",
    "checkpoint_structures",
    "events",
    "extent_segments",
    "leases",
    "lineage",
    "parts",
    "plan_submissions",
    "rank_structures",
    "registrations",
    "sessions",
    "structure_tensors",
}


@pytest.fixture
def statements(database: Database) -> dict[str, Any]:
    """Every statement that the test makes, with its parameters."""
    seen: dict[str, Any] = {}

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *rest: Any) -> None:
        if rest[-1] is False:
            seen[statement] = parameters

    engines: list[Engine] = [database.backend.writer, database.backend.readers]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    return seen


def test_no_growing_table_is_walked_through(services: Services, database: Database, statements: dict[str, Any]) -> None:
    """A walk over a partial index is fine: it holds what is open, not what there is."""
    job = Job(services, Model(2))
    job.start()
    for step in range(3):
        drops = job.decide(step)
        assert 2 == len(drops)
        job.save(step)
    job.record(7)
    job.register(9, whole(job.model)[:1])
    services.progress.counts([1])
    services.progress.progress(job.key(9))
    services.sessions.expire_leases()
    assert 1 == VitalsService(database).measure().staging_rows
    for name in ("llm/8b@1", "llm/8b@1.s1", "llm/8b@1.s1.a1", "llm/8b@latest"):
        services.catalog.get_checkpoint(name)
        assert list(services.metadata.get_metadata(name, b"model"))
        assert services.queries.query_chunks(name, encode_wanted(Wanted.all_of(("extra",)))).found
    for show_all in (True, False):
        parent = "projects/llm/runs/8b/parts/default"
        page = services.catalog.list_checkpoints(parent, page_size=2, show_all=show_all)
        services.catalog.list_checkpoints(parent, page_token=page.next_page_token, show_all=show_all)
    services.catalog.get_run("projects/llm/runs/8b")
    services.status.run_status("projects/llm/runs/8b")
    services.metadata.list_tensors("llm/8b@1")
    edge = EdgeRequest("llm/8b@2", LineageKind.RESUMED_FROM, "llm/8b@1")
    services.lineage.add(edge)
    services.lineage.get("llm/8b@2")
    services.lineage.list("llm/8b@1")
    services.lineage.remove(edge)
    job.register(3, whole(job.model), 2)
    origins = (Origin(LineageKind.RESUMED_FROM, "llm/8b@2"), Origin(LineageKind.FINE_TUNED_FROM, "a name"))
    services.commits.commit(job.key(3, 2), Description(origins=origins))
    Job(services, Model(2)).start(on_live=OnLive.TAKEOVER)
    walks = _walks_of_postgres if is_postgres(database.url) else _walks_of_sqlite
    kept = {one: given for one, given in statements.items() if one.split()[0] in ("SELECT", "UPDATE", "DELETE", "WITH")}
    assert [] == list(walks(database, kept))
    assert len(statements) > 40


def test_a_walk_looks_up_its_edges(services: Services, database: Database, statements: dict[str, Any]) -> None:
    """Rule: in a table of which there are no statistics yet, every step of a walk finds its edges by their index.

    Postgres would read all of them, at each step: 9,000 ancestors then took longer than a statement may.
    """
    job = Job(services, Model(1))
    job.start()
    made = job.save(1)
    rows = [
        {"kind": 1, "parent_id": None, "child_id": made.checkpoint_id, "name": f"{at}", "create_time_us": 1}
        for at in range(5000)
    ]
    with database.write(lock=LOCK) as connection:
        connection.execute(insert(lineage), rows)
        statements.clear()
        lineage_rows.ancestors(connection, made.checkpoint_id, 10)
        for up in (True, False):
            lineage_rows.walk(connection, made.checkpoint_id, up=up, max_depth=10, limit=10)
        walks = {one: given for one, given in statements.items() if one.startswith("WITH")}
        assert 3 == len(walks)
        explain = "EXPLAIN" if is_postgres(database.url) else "EXPLAIN QUERY PLAN"
        for statement, given in walks.items():
            plan = [str(row[-1]) for row in connection.exec_driver_sql(f"{explain} {statement}", given)]
            assert [] == [line for line in plan if re.search(r"Seq Scan on lineage|SCAN lineage|Hash Join", line)]


def _walks_of_sqlite(database: Database, statements: Mapping[str, Any]) -> Iterator[str]:
    with database.read() as connection:
        for statement, parameters in statements.items():
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters):
                detail = str(row[3])
                if detail.startswith("SCAN") and detail.split()[1] in GROWING and " INDEX ix_" not in detail:
                    yield f"{detail}: {statement}"


def _walks_of_postgres(database: Database, statements: Mapping[str, Any]) -> Iterator[str]:
    """Yields the walks that are left when the planner is told to avoid them, as it would in a large table."""
    with database.read() as connection:
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, parameters in statements.items():
            for (line,) in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters):
                found = re.search(r"Seq Scan on (\w+)", line)
                if found is not None and found[1] in GROWING:
                    yield f"{line}: {statement}"
