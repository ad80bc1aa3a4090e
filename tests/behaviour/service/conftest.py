"""A migrated database, services on it, and a clock that tests move."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shardbook_server.service.services import Services, build_services
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model
from tests.databases import Databases

LEASE_TTL_S = 60.0


class Clock:
    """The database's clock, moved by hand."""

    def __init__(self) -> None:
        self.now_us = 1_800_000_000_000_000

    def __call__(self) -> int:
        """The time, microseconds since the epoch."""
        return self.now_us

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now_us += round(seconds * 1e6)


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still until it is moved."""
    return Clock()


@pytest.fixture
def database(databases: Databases, clock: Clock) -> Iterator[Database]:
    """A database of the test's own, of either kind; no connection may be left in use."""
    database = Database(databases.new(), clock=clock)
    yield database
    assert database.checked_out() == 0
    database.close()


@pytest.fixture
def services(database: Database) -> Services:
    """All services over the database of the test."""
    return build_services(database, lease_ttl_s=LEASE_TTL_S)


@pytest.fixture
def job(services: Services) -> Job:
    """A job of two ranks whose session has started."""
    job = Job(services, Model(2))
    job.start(job_id="slurm-1")
    return job


@pytest.fixture
def other_job(services: Services) -> Callable[[], Job]:
    """Makes further jobs on the same run; their sessions are not started."""
    return lambda: Job(services, Model(2))
