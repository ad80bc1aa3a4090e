"""Requests with an id of their own: one effect and one answer, however often they are made, and by whom beside."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from shardbook.errors import InvalidArgumentError, NotFoundError, UnavailableError
from shardbook_server.service.describing import Changes
from shardbook_server.service.requests import REMEMBERED_S, parse_request_id
from shardbook_server.service.services import Services, build_services
from shardbook_server.storage import requests as request_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.request_tables import requests
from shardbook_server.storage.requests import RequestKey
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, whole

KEY = RequestKey("llm", "", "/shardbook.v1.CatalogService/UpdateCheckpoint", uuid.uuid4().bytes)
DIGEST = bytes(32)
REF = "llm/8b@1"


@pytest.fixture
def saved(job: Job) -> Job:
    """A job with a checkpoint."""
    job.register(1, whole(job.model))
    job.commit(1)
    return job


def note(services: Services, text: str) -> Callable[[], bytes]:
    """A write: keeps a note with the checkpoint, and answers what note it had before."""

    def write() -> bytes:
        before = services.catalog.get_checkpoint(REF).note
        services.descriptions.update(REF, Changes({}, {}, text, ("note",)))
        return before.encode()

    return write


def held(services: Services) -> str:
    """The note that is kept."""
    return services.catalog.get_checkpoint(REF).note


def count(database: Database) -> int:
    """Requests that are remembered."""
    with database.read() as connection:
        return connection.execute(select(func.count()).select_from(requests)).scalar_one()


def test_the_same_request_has_one_effect_and_one_answer(saved: Job) -> None:
    """Also where somebody else has written since: what he wrote stays."""
    services = saved.services
    assert b"" == services.requests.once(KEY, DIGEST, note(services, '"first"'))
    services.descriptions.update(REF, Changes({}, {}, '"second"', ("note",)))
    assert b"" == services.requests.once(KEY, DIGEST, note(services, '"first"'))
    assert '"second"' == held(services)


def test_large_answers_are_kept_whole(saved: Job, database: Database) -> None:
    """And packed."""
    answer = b"projects/llm/runs/8b" * 100_000
    for _ in range(2):
        assert answer == saved.services.requests.once(KEY, DIGEST, lambda: answer)
    with database.read() as connection:
        assert 10_000 > len(connection.execute(select(requests.c.answer)).scalar_one())


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, project="vision"),
        replace(KEY, principal="eve"),
        replace(KEY, method="/shardbook.v1.CatalogService/SetAlias"),
        replace(KEY, request_id=uuid.uuid4().bytes),
    ],
    ids=("project", "principal", "method", "id"),
)
def test_another_key_is_another_request(saved: Job, other: RequestKey) -> None:
    """An id is its maker's own: by itself it says nothing."""
    services = saved.services
    services.requests.once(KEY, DIGEST, note(services, '"first"'))
    assert b'"first"' == services.requests.once(other, b"x" * 32, note(services, '"second"'))
    assert '"second"' == held(services)


def test_an_id_is_not_used_for_something_else(saved: Job) -> None:
    """The second request is refused, and nothing is done."""
    services = saved.services
    services.requests.once(KEY, DIGEST, note(services, '"first"'))
    with pytest.raises(InvalidArgumentError) as refused:
        services.requests.once(KEY, b"x" * 32, note(services, '"second"'))
    assert ("REQUEST_ID_REUSED", ["request_id"]) == (
        refused.value.reason,
        [one.field for one in refused.value.violations],
    )
    assert '"first"' == held(services)


def test_what_fails_is_undone_and_not_remembered(saved: Job, database: Database) -> None:
    """However much of it was written, by how many calls: the next try does all of it."""
    services = saved.services

    def write() -> bytes:
        note(services, '"first"')()
        services.descriptions.update(REF, Changes({"a": "b"}, {}, "", ("labels.a",)))
        services.descriptions.update("llm/8b@7", Changes({}, {}, '"x"', ("note",)))
        return b"never"

    with pytest.raises(NotFoundError):
        services.requests.once(KEY, DIGEST, write)
    found = services.catalog.get_checkpoint(REF)
    assert ("", {}, 0) == (found.note, dict(found.labels), count(database))
    services.requests.once(KEY, DIGEST, note(services, '"first"'))
    assert '"first"' == held(services)


def test_the_same_request_at_the_same_time_waits_for_the_first(saved: Job, databases: object) -> None:
    """On another replica too: the second one neither writes nor answers before the first is durable."""
    url = saved.services.requests._database.url
    replicas = [Database(url), Database(url)]
    begun, may_end = threading.Event(), threading.Event()
    written: list[int] = []

    def ask(number: int) -> bytes:
        services = build_services(replicas[number])

        def write() -> bytes:
            written.append(number)
            begun.set()
            assert may_end.wait(20)
            services.descriptions.update(REF, Changes({}, {}, f'"{number}"', ("note",)))
            return str(number).encode()

        return services.requests.once(KEY, DIGEST, write)

    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, 0)
            assert begun.wait(20)
            second = pool.submit(ask, 1)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
            may_end.set()
            assert [b"0", b"0"] == [first.result(20), second.result(20)]
    finally:
        for replica in replicas:
            replica.close()
    assert [0] == written
    assert '"0"' == held(saved.services)


def test_who_waited_for_one_that_failed_makes_it(saved: Job) -> None:
    """What fails is not remembered for those who wait either."""
    services, begun, may_fail = saved.services, threading.Event(), threading.Event()
    other = Database(services.requests._database.url)

    def fail() -> bytes:
        begun.set()
        assert may_fail.wait(20)
        raise NotFoundError("there is no such thing")

    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(services.requests.once, KEY, DIGEST, fail)
            assert begun.wait(20)
            replica = build_services(other)
            second = pool.submit(replica.requests.once, KEY, DIGEST, note(replica, '"second"'))
            may_fail.set()
            with pytest.raises(NotFoundError):
                first.result(20)
            assert b"" == second.result(20)
    finally:
        other.close()
    assert '"second"' == held(services)


def test_one_that_is_being_forgotten_is_asked_for_again(saved: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two statements it is there, and then not: a conflict as any other, which the server makes again."""
    services = saved.services
    services.requests.once(KEY, DIGEST, lambda: b"old")
    monkeypatch.setattr(request_rows, "_is", lambda key: requests.c.project == f"{key.project} no more")
    with pytest.raises(UnavailableError) as refused:
        services.requests.once(KEY, DIGEST, lambda: b"new")
    assert "DATABASE_CONFLICT" == refused.value.reason


def test_requests_are_forgotten_after_a_day(saved: Job, clock: Clock, database: Database) -> None:
    """Not before: then the same id is a new request."""
    services, age_us = saved.services, round(REMEMBERED_S * 1e6)
    for number in range(1_005):
        services.requests.once(replace(KEY, request_id=number.to_bytes(16, "big")), DIGEST, lambda: b"old")
    clock.advance(1)
    services.requests.once(KEY, DIGEST, lambda: b"young")
    clock.advance(REMEMBERED_S)
    assert 1_005 == services.requests.forget_old(age_us)
    assert 1 == count(database)
    assert b"young" == services.requests.once(KEY, DIGEST, lambda: b"younger")
    clock.advance(1)
    assert (1, 0) == (services.requests.forget_old(age_us), services.requests.forget_old(age_us))
    assert b"youngest" == services.requests.once(KEY, DIGEST, lambda: b"youngest")


@pytest.mark.parametrize(
    "text",
    ["x", "0" * 32, str(uuid.UUID(int=0)), "{3f1d7a2e-9c40-4a8e-8f5b-0f6f2f1f9a11}", "\x00", " " * 36, "é" * 36],
)
def test_an_id_is_a_uuid(text: str) -> None:
    """In its usual form, and not one that was left at nothing."""
    with pytest.raises(InvalidArgumentError) as refused:
        parse_request_id(text)
    assert ["request_id"] == [one.field for one in refused.value.violations]


def test_upper_case_is_the_same_id() -> None:
    """As RFC 9562 has it."""
    some = uuid.uuid4()
    assert some.bytes == parse_request_id(str(some)) == parse_request_id(str(some).upper())
