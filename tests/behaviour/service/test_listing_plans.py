"""Pages of listings are found by an index, in order, whatever the catalogue has grown to; none counts rows to skip."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from benchmarks.catalogue_rows import Saved, catalogue, store
from shardbook_server.service.services import build_services
from shardbook_server.storage import listing
from shardbook_server.storage.database import Database
from shardbook_server.storage.urls import is_postgres
from tests.databases import Databases, opened

EVERYTHING = "projects/-/runs/-/parts/-"
PROJECT = "projects/llm/runs/-/parts/-"
RUN = "projects/llm/runs/run-001/parts/-"
#: SQLite has a name of its own for the index of a constraint.
BY_PART = r"uq_checkpoints_attempt|sqlite_autoindex_checkpoints_1 \(part_id=\?"

#: parent, filter, order, whether every attempt is listed, and the index that has them in order.
WALKED = {
    "a run": (RUN, "", "", False, BY_PART),
    "a run, every attempt": (RUN, "", "", True, BY_PART),
    "a run by metric": (RUN, "", "metrics.val_loss", False, "ix_metrics_part"),
    "everything": (EVERYTHING, "", "", False, "ix_checkpoints_by_time"),
    "everything, every attempt": (EVERYTHING, "", "", True, "ix_checkpoints_by_time"),
    "a project": (PROJECT, "", "", False, "ix_checkpoints_by_time"),
    "by session": (EVERYTHING, "", "session desc, step desc", False, "ix_checkpoints_by_session"),
    "by step": (EVERYTHING, "", "step", False, "ix_checkpoints_by_step"),
    "by size": (PROJECT, "", "bytes desc", False, "ix_checkpoints_by_size"),
    "by world": (EVERYTHING, "", "world_size", True, "ix_checkpoints_by_world"),
    "by state": (EVERYTHING, "", "state", True, "ix_checkpoints_by_state"),
    "by part": (PROJECT, "", "part", True, "ix_parts_name"),
    "by part, what is live": (EVERYTHING, "", "part desc", False, "ix_parts_name"),
    "by label": (EVERYTHING, "", "labels.team desc", False, "ix_labels_value"),
    "by metric": (PROJECT, "", "metrics.val_loss desc", False, "ix_metrics_value"),
    "label": (EVERYTHING, 'labels.team = "red"', "", False, "ix_checkpoints_by_time"),
    "label by metric": (PROJECT, 'labels.team = "red"', "metrics.val_loss", False, "ix_metrics_value"),
    "range of the order": (EVERYTHING, "metrics.val_loss < 0.5", "metrics.val_loss desc", False, "ix_metrics_value"),
    "size of a world": (EVERYTHING, "world_size = 8", "step", False, "ix_checkpoints_by_step"),
    "either": (EVERYTHING, "world_size = 8 OR metrics.val_loss < 1", "", False, "ix_checkpoints_by_time"),
    "failed": (EVERYTHING, "state = FAILED", "", True, "ix_checkpoints_by_time"),
}
#: filter, and the index that has the few that meet it.
LOOKED_UP = {
    'labels.keep = "yes"': "ix_labels_value",
    "labels.keep:*": "ix_labels_value",
    'labels.keep = "y*"': "ix_labels_value",
    "metrics.mmlu > 0.5": "ix_metrics_value",
    "step = 700": "ix_checkpoints_by_step",
    "bytes < 1000000000": "ix_checkpoints_by_size",
    "world_size = 7": "ix_checkpoints_by_world",
    'create_time < "2026-01-01T00:05:00Z"': "ix_checkpoints_by_time",
    'labels.team = "red" AND labels.keep = "yes"': "ix_labels_value",
    'labels.keep = "yes" OR metrics.mmlu > 0.5': "ix_metrics_value",
    'labels.keep = "yes" OR (step = 700 AND world_size != 8)': "ix_checkpoints_by_step",
    "NOT (step < 59800 OR step != 59900)": "ix_checkpoints_by_step",
}


@pytest.fixture(scope="module")
def catalogued(module_databases: Databases) -> Iterator[tuple[Database, dict[int, Saved]]]:
    """2,400 checkpoints of four runs, which the planner of Postgres has looked at; and five of another one."""
    with opened(module_databases.new()) as database:
        rare = [
            Saved("llm", "rare", "default", 1, step, world_size=7, metrics={"mmlu": 0.9, "val_loss": step / 10})
            for step in range(5)
        ]
        saves = store(database, [*catalogue(4, 600), *(replace(one, labels={"team": "red"}) for one in rare)])
        if is_postgres(database.url):
            with database.write() as connection:
                connection.execute(text("ANALYZE"))
        yield database, saves


@pytest.fixture
def stored(catalogued: tuple[Database, dict[int, Saved]]) -> Database:
    """The database of the catalogue."""
    return catalogued[0]


@pytest.fixture
def saves(catalogued: tuple[Database, dict[int, Saved]]) -> dict[int, Saved]:
    """What is in it."""
    return catalogued[1]


@contextmanager
def statements_of(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Statements of readers, with their parameters."""
    seen: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        seen.append((statement, parameters))

    event.listen(database.backend.readers, "before_cursor_execute", note)
    yield seen
    event.remove(database.backend.readers, "before_cursor_execute", note)


def plan_of(connection: Connection, statement: str, parameters: Any) -> str:
    """How the database finds what a statement asks for."""
    if connection.dialect.name != "postgresql":
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        return "\n".join(str(row[3]) for row in rows)
    # In a small table anything is cheap: as it would be in a large one.
    for setting in ("seqscan", "sort", "bitmapscan", "hashjoin", "mergejoin"):
        connection.exec_driver_sql(f"SET LOCAL enable_{setting} = off")
    return "\n".join(line for (line,) in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters))


def plans(database: Database, parent: str, filter_text: str, order_by: str, *, show_all: bool) -> list[str]:
    """Plans of a first page and the one behind it."""
    with statements_of(database) as seen:
        asked: dict[str, Any] = {"filter_text": filter_text, "order_by": order_by, "show_all": show_all}
        catalog = build_services(database).catalog
        first = catalog.list_checkpoints(parent, page_size=3, **asked)
        catalog.list_checkpoints(parent, page_size=3, page_token=first.next_page_token, **asked)
    # Those that read pages: they are ordered.
    statements = [one for one in seen if "key_0" in one[0]]
    assert len(statements) >= 2
    # For SQLite one is always spelled out. What is passed before a walk pauses has a bound.
    skipped = [
        one.get("passed", 0) if isinstance(one, dict) else one[-1] for text, one in statements if "OFFSET" in text
    ]
    assert all(rows < max(listing.STRETCH, listing.GUIDED_STRETCH) for rows in skipped)
    with database.read() as connection:
        return [plan_of(connection, *one) for one in statements]


def is_sorted(plan: str) -> bool:
    """True when rows are sorted, but for those that are equal in what the index has."""
    of_sqlite = re.search(r"USE TEMP B-TREE FOR (?!LAST )", plan)
    of_postgres = re.search(r"(?<!Incremental )Sort  \(", plan)
    return bool(of_sqlite or of_postgres)


@pytest.mark.parametrize("some", [20, listing.SOME], ids=["judged", "guided"])
@pytest.mark.parametrize("name", WALKED)
def test_what_many_match_is_walked_in_order(
    stored: Database, monkeypatch: pytest.MonkeyPatch, name: str, some: int
) -> None:
    """Along one index, whatever else is asked; nothing is sorted and no table read as a whole."""
    for constant, rows in {"FEW": 20, "FEW_BY_COLUMN": 20, "SOME": some}.items():
        monkeypatch.setattr(listing, constant, rows)
    parent, filter_text, order_by, show_all, index = WALKED[name]
    for plan in plans(stored, parent, filter_text, order_by, show_all=show_all):
        assert re.search(index, plan), plan
        assert not is_sorted(plan), plan
        assert not re.search(r"Seq Scan on (checkpoints|labels|metrics)", plan), plan
        assert not re.search(r"SCAN (checkpoints|labels|metrics)\w*(?! USING)$", plan, re.MULTILINE), plan


@pytest.mark.parametrize("filter_text", LOOKED_UP)
@pytest.mark.parametrize("order_by", ["", "bytes", "metrics.val_loss", "labels.team desc, step"])
def test_what_few_match_is_looked_up(stored: Database, filter_text: str, order_by: str) -> None:
    """By the index of what few match, whatever the order: only those are sorted."""
    for plan in plans(stored, EVERYTHING, filter_text, order_by, show_all=False):
        assert LOOKED_UP[filter_text] in plan, plan
        assert is_postgres(stored.url) or re.search(
            r"SEARCH checkpoints USING (INTEGER PRIMARY KEY|.*\(live=\? AND )", plan
        )
        assert re.search(r"MATERIALIZE matching|CTE matching", plan), plan
        # Nothing but what was found is scanned: rows are looked up by key.
        assert not re.search(r"(?:SCAN|Seq Scan on) (checkpoints|labels|metrics)\b", plan), plan


@pytest.mark.parametrize(
    "filter_text", ['labels.keep = "yes"', "labels.keep:*", 'labels.keep = "y*"', "metrics.mmlu > 0.5"]
)
def test_values_that_were_found_are_not_looked_up_again(stored: Database, filter_text: str) -> None:
    """The index of labels or metrics has the value beside the key: one lookup for each row, its checkpoint's."""
    for plan in plans(stored, EVERYTHING, filter_text, "bytes", show_all=False):
        assert not re.search(r"SubPlan|CORRELATED SCALAR SUBQUERY", plan), plan


def test_metrics_of_a_run_are_looked_up_by_the_index_of_its_parts(stored: Database) -> None:
    """Those of other runs are not read."""
    for plan in plans(stored, RUN, "metrics.val_loss < 0.5", "bytes", show_all=False):
        assert "ix_metrics_part" in plan, plan


#: Conditions that hold of many rows each: of others each, of those at the end of the order, or of none of the first.
LONG_WALKS: dict[str, Callable[[Saved], bool]] = {
    'labels.seed = "1" AND run = "run-002"': lambda one: False,
    "step < 10000": lambda one: one.step < 10_000,
    "NOT step >= 10000 AND world_size = 8": lambda one: one.step < 10_000 and one.world_size == 8,
    'labels.team:"x"': lambda one: False,
    "session != 2 AND session != 3": lambda one: one.session not in (2, 3),
}


@pytest.mark.parametrize("parent", [EVERYTHING, RUN])
@pytest.mark.parametrize("filter_text", LONG_WALKS)
def test_a_walk_that_finds_too_little_is_given_up(
    stored: Database, saves: dict[int, Saved], monkeypatch: pytest.MonkeyPatch, filter_text: str, parent: str
) -> None:
    """After a stretch, when the index of a condition has fewer rows than are left: those are looked up."""
    for name, rows in {"FEW": 20, "FEW_BY_COLUMN": 20, "SOME": 20, "STRETCH": 100}.items():
        monkeypatch.setattr(listing, name, rows)
    with statements_of(stored) as seen:
        page = build_services(stored).catalog.list_checkpoints(parent, filter_text=filter_text)
    wanted = {
        one
        for one, saved in saves.items()
        if saved.live and LONG_WALKS[filter_text](saved) and (parent == EVERYTHING or saved.run == "run-001")
    }
    assert min(50, len(wanted)) == len(page.items)
    assert {one.checkpoint_id for one in page.items} <= wanted
    pages = [statement for statement, _ in seen if "key_0" in statement]
    # Nothing is looked up where a count says that there is nothing.
    assert "MATERIALIZED" in pages[-1] or not wanted


#: parent, filter, order, and statements of a page at most: those that find keys, what is listed, what is said of it.
COSTS = {
    "everything": (EVERYTHING, "", "", 1 + 2),
    "by metric": (EVERYTHING, "", "metrics.val_loss", 1 + 2),
    "a project": (PROJECT, "", "", 3 + 2),
    "rare label": (EVERYTHING, 'labels.keep = "yes"', "", 2 + 2),
    # How many rows each condition has, how far to walk, and what is found on the way.
    "three conditions": (EVERYTHING, 'step > 100 AND world_size = 8 AND labels.team = "red"', "", 3 + 2),
    "two labels, found as a set": (EVERYTHING, 'labels.seed = "1" AND labels.team = "red"', "", 2 + 2),
    # Its parts are found first, and each of the two is walked.
    "a run": (RUN, "", "", 1 + 2 + 2),
}


@pytest.mark.parametrize("page_size", [3, 50, 200])
@pytest.mark.parametrize("name", COSTS)
def test_a_page_takes_few_statements(stored: Database, name: str, page_size: int) -> None:
    """However many checkpoints it has, the first page and one further on. To begin is one more, settings and all."""
    parent, filter_text, order_by, most = COSTS[name]
    asked: dict[str, Any] = {"filter_text": filter_text, "order_by": order_by, "page_size": page_size}
    catalog = build_services(stored).catalog
    # The key of tokens is read once.
    token = catalog.list_checkpoints(parent, **asked).next_page_token
    for page_token in ("", token):
        with statements_of(stored) as seen:
            catalog.list_checkpoints(parent, page_token=page_token, **asked)
        assert seen[0][0].startswith("BEGIN")
        assert len(seen) <= 1 + most, [statement for statement, _ in seen]


def test_a_page_is_of_one_moment(databases: Databases) -> None:
    """What is written while a page is read is not in it, neither as a checkpoint nor as what is said of one."""
    with opened(databases.new()) as database:
        (first,) = store(database, [Saved("llm", "8b", "default", 1, 1, labels={"keep": "yes"})])
        catalog = build_services(database).catalog
        moments: list[int] = []

        def write(*_: object) -> None:
            moments.append(len(moments))
            # A moment begins with the first look at a table, which is behind BEGIN.
            if len(moments) > 1:
                with database.write() as connection:
                    connection.execute(text("UPDATE labels SET value = 'no'"))
                    connection.execute(text("UPDATE checkpoints SET live = 0, size_bytes = size_bytes + 1"))

        listens = (database.backend.readers, "after_cursor_execute", write)
        event.listen(*listens)
        try:
            (found,) = catalog.list_checkpoints(EVERYTHING, filter_text='labels.keep = "yes"').items
        finally:
            event.remove(*listens)
        assert len(moments) >= 4
    assert (first, {"keep": "yes"}, 1000) == (found.checkpoint_id, found.labels, found.size_bytes)
