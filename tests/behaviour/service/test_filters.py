"""Filters and orders of listings: whatever is asked, both databases answer what plain Python would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.catalogue_rows import Saved, store
from shardbook.errors import InvalidArgumentError
from shardbook_server.service.filters import parse_filter, parse_order
from shardbook_server.service.places import parse_parent, part_ids_of
from shardbook_server.storage import candidates, listing
from shardbook_server.storage.database import Database
from shardbook_server.storage.filters import AllOf, AnyOf, Compare, Field, Match, Not, Present
from shardbook_server.storage.keyset import Key
from shardbook_server.storage.listing_statements import Listing, OrderBy
from tests.behaviour.service.filter_texts import Judge, conditions, some_rows
from tests.databases import Databases, opened

EVERYTHING = "projects/-/runs/-/parts/-"
#: How each field is read from a row, to be ordered by.
READ = {
    "step": lambda one: one.step,
    "session": lambda one: one.session,
    "state": lambda one: one.state,
    "world_size": lambda one: one.world_size,
    "bytes": lambda one: one.bytes,
    "create_time": lambda one: one.save_time_us,
    "part": lambda one: one.part,
    "labels.team": lambda one: one.labels.get("team"),
    "metrics.loss": lambda one: one.metrics.get("loss"),
    "metrics.eval/mmlu": lambda one: one.metrics.get("eval/mmlu"),
}


@dataclass(frozen=True)
class Stored:
    """A catalogue and what is in it."""

    database: Database
    rows: dict[int, Saved]

    def listed(self, text: str, order_by: str = "step", parent: str = EVERYTHING, page_size: int = 1000) -> list[int]:
        """Keys of everything that a listing shows, page by page."""
        place = parse_parent(parent)
        found: list[Key] = []
        with self.database.read() as connection:
            part_ids = tuple(part_ids_of(connection, place)) if place.one_run else None
            asked = Listing(part_ids, place.conditions, parse_filter(text), parse_order(order_by), show_all=True)
            while True:
                page = listing.page(connection, asked, found[-1] if found else None, page_size)
                found += page
                if len(page) < page_size:
                    return [int(key[-1]) for key in found]


@pytest.fixture(scope="module")
def stored(module_databases: Databases) -> Iterator[Stored]:
    """A catalogue in which every value of every field comes up, in many combinations."""
    with opened(module_databases.new()) as database:
        yield Stored(database, store(database, some_rows()))


_NOT_FEW = {"FEW": 0, "FEW_BY_COLUMN": 0}
#: Ways to a page, by what is few and how long a walk goes on: along the index of the order, judging every row, or
#: knowing which may meet a condition; the same with pauses, then looked up after all, or walked on; looked up at once.
WAYS = {
    "walked": {**_NOT_FEW, "SOME": 0},
    "guided": _NOT_FEW,
    "walked, then looked up": {**_NOT_FEW, "SOME": 0, "STRETCH": 5},
    "walked on": {**_NOT_FEW, "SOME": 0, "STRETCH": 5, "MANY": 0},
    "guided, then looked up": {**_NOT_FEW, "GUIDED_STRETCH": 5},
    "walked, then looked up by the first values": {**_NOT_FEW, "SOME": 0, "STRETCH": 5, "VALUES": 3},
    "looked up": {},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A way to a page, whatever the filter."""
    for name, rows in WAYS[request.param].items():
        monkeypatch.setattr(candidates if name == "VALUES" else listing, name, rows)
    # Statements have the number of values in them.
    listing.kept.cache_clear()
    yield
    listing.kept.cache_clear()


@pytest.mark.usefixtures("way")
def test_a_filter_finds_what_it_means(stored: Stored) -> None:
    """Rule: the same as every condition judged in Python, row by row."""

    @settings(max_examples=60, deadline=None)
    @given(conditions)
    def check(asked: tuple[str, Judge]) -> None:
        text, judge = asked
        assert {one for one, row in stored.rows.items() if judge(row)} == set(stored.listed(text))

    check()


@pytest.mark.usefixtures("way")
def test_pages_join_to_everything_in_order(stored: Stored) -> None:
    """Rule: whatever the order and the size of a page, nothing twice, nothing left out, none out of order."""
    fields = st.lists(st.tuples(st.sampled_from(sorted(READ)), st.booleans()), min_size=1, max_size=3, unique_by=_first)
    parents = st.sampled_from([EVERYTHING, "projects/llm/runs/-/parts/-", "projects/llm/runs/8b/parts/-"])

    @settings(max_examples=30, deadline=None)
    @given(fields, parents, st.sampled_from([7, 50, 299, 1000]), conditions)
    def check(order: list[tuple[str, bool]], parent: str, page_size: int, asked: tuple[str, Judge]) -> None:
        wanted = {
            one: row
            for one, row in stored.rows.items()
            if asked[1](row)
            and ("llm" not in parent or row.project == "llm")
            and ("8b" not in parent or row.run == "8b")
            and all(READ[field](row) is not None for field, _ in order)
        }
        order_by = ", ".join(f"{field} desc" if down else field for field, down in order)
        found = stored.listed(asked[0], order_by, parent, page_size)
        assert sorted(wanted) == sorted(found)
        keys = [[READ[field](wanted[one]) for field, _ in order] for one in found]
        assert all(_in_order(one, other, order) for one, other in pairwise(keys))

    check()


@pytest.mark.parametrize(
    "pair",
    [
        (
            ("labels.team = a", lambda one: one.labels.get("team") == "a"),
            ("labels.team = b", lambda one: one.labels.get("team") == "b"),
        ),
        (("step < 2", lambda one: one.step < 2), ("step < 4", lambda one: one.step < 4)),
        (("step < 2", lambda one: one.step < 2), ("session < 2", lambda one: one.session < 2)),
        (
            ("metrics.loss <= 0", lambda one: one.metrics.get("loss", 1) <= 0),
            ("metrics.loss <= 0.25", lambda one: one.metrics.get("loss", 1) <= 0.25),
        ),
        (
            ("labels.team:a OR step = 1", lambda one: "a" in one.labels.get("team", "") or one.step == 1),
            ("labels.team:b OR step = 1", lambda one: "b" in one.labels.get("team", "") or one.step == 1),
        ),
    ],
    ids=lambda pair: pair[0][0],
)
def test_what_is_kept_of_a_listing_is_of_no_other(stored: Stored, pair: tuple[tuple[str, Judge], ...]) -> None:
    """Listings that differ in one value or field, asked in turn: statements are kept, those of one form are shared."""
    for text, judge in pair * 2:
        wanted = {one for one, row in stored.rows.items() if judge(row)}
        found = stored.listed(text, page_size=50)
        assert sorted(wanted) == sorted(found)


def _first(pair: tuple[str, bool]) -> str:
    return pair[0]


def _in_order(one: list[Any], other: list[Any], order: list[tuple[str, bool]]) -> bool:
    for mine, its, (_, down) in zip(one, other, order, strict=True):
        if mine != its:
            return bool(mine > its if down else mine < its)
    return True


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("", None),
        ("  \n", None),
        ("step=1", Compare(Field("step"), "=", 1)),
        ("state != FAILED", Compare(Field("state"), "!=", 3)),
        ("metrics.val_loss<=-2.5e-3", Compare(Field("metrics", "val_loss"), "<=", -0.0025)),
        ("labels.a/b.c-d = 'x y'", Compare(Field("labels", "a/b.c-d"), "=", "x y")),
        ("labels.x=ANDROID", Compare(Field("labels", "x"), "=", "ANDROID")),
        ("run = llm-*", Match(Field("run"), ("llm-", ""))),
        ("labels.x:*", Present(Field("labels", "x"))),
        (
            "step=1 AND step=2 OR NOT step=3",
            AllOf(
                (
                    Compare(Field("step"), "=", 1),
                    AnyOf((Compare(Field("step"), "=", 2), Not(Compare(Field("step"), "=", 3)))),
                )
            ),
        ),
        (
            "(step=1 AND step=2) OR step=3",
            AnyOf(
                (
                    AllOf((Compare(Field("step"), "=", 1), Compare(Field("step"), "=", 2))),
                    Compare(Field("step"), "=", 3),
                )
            ),
        ),
        ("create_time > 2026-11-23", Compare(Field("create_time"), ">", 1_795_392_000_000_000)),
        ('create_time > "2026-11-23T01:00:00.5+01:00"', Compare(Field("create_time"), ">", 1_795_392_000_500_000)),
    ],
)
def test_what_a_filter_says(text: str, condition: object) -> None:
    """As AIP-160 has it OR binds more tightly than AND."""
    assert condition == parse_filter(text)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("step", 5),
        ("step =", 7),
        ("step = 1 AND", 13),
        ("(step = 1", 10),
        ("step = 1)", 9),
        ("step ! 1", 6),
        ("step = 1 step = 2", 10),
        ("step = one", 8),
        ("step = 1_0", 8),
        ("step = 1.5", 8),
        ("step = \u0663", 8),
        ("step = 9223372036854775808", 8),
        ("step : 1", 1),
        ("color = red", 1),
        ("labels = red", 1),
        ("labels. = red", 1),
        ("labels.\u00e9 = red", 1),
        ("metrics.m = nan", 13),
        ("metrics.m = 1e999", 13),
        ("metrics.m = red", 13),
        ("state = DONE", 9),
        ("state < FAILED", 1),
        ("create_time > yesterday", 15),
        ("create_time > 0000-01-01", 15),
        ("labels.x < a*", 12),
        ("labels.x = *a*b*c*d*", 12),
        ("labels.x = 'a", 12),
        ("labels.x = a\x00", 13),
        ("step = 1 AND labels.x = '\u202e'", 26),
        ("AND", 1),
        ("NOT", 4),
    ],
)
def test_a_bad_filter_names_the_place(text: str, position: int) -> None:
    """INVALID_ARGUMENT about ``filter``, with the character that it cannot be read from."""
    with pytest.raises(InvalidArgumentError) as caught:
        parse_filter(text)
    assert ["filter"] == [violation.field for violation in caught.value.violations]
    assert (str(position), "INVALID_FILTER") == (caught.value.metadata["position"], caught.value.reason)
    assert caught.value.message.startswith(f"character {position} of the filter: ")


@pytest.mark.parametrize(
    "text",
    [
        "step=1 AND " * 400 + "step=1",
        " OR ".join(["step=1"] * 65),
        "(" * 17 + "step=1" + ")" * 17,
        "NOT " * 17 + "step=1",
        "(" * 2000,
    ],
)
def test_filters_are_bounded(text: str) -> None:
    """In length, comparisons and depth; nothing recurses before it is told."""
    with pytest.raises(InvalidArgumentError) as caught:
        parse_filter(text)
    assert ["filter"] == [violation.field for violation in caught.value.violations]


def test_what_an_order_says() -> None:
    """Fields, ascending unless it says otherwise."""
    loss = OrderBy(Field("metrics", "val_loss"), descending=True)
    assert (loss, OrderBy(Field("step"))) == parse_order(" metrics.val_loss desc,step asc ")
    assert () == parse_order(" ")


@pytest.mark.parametrize(
    "text", ["color", "step down", "step,", "project", "run", "step, step", "a.b", "labels.", "x" * 5000]
)
def test_orders_that_are_none(text: str) -> None:
    """INVALID_ARGUMENT about ``order_by``."""
    with pytest.raises(InvalidArgumentError) as caught:
        parse_order(text)
    assert ["order_by"] == [violation.field for violation in caught.value.violations]
    assert "filter" not in caught.value.message
