"""A failover to a standby that lagged behind loses commits under servers that go on running.

On Postgres alone: nobody takes the file of a running server's SQLite away from it.
"""

from __future__ import annotations

import pytest
from sqlalchemy import delete, update

from shardbook.errors import UnavailableError
from shardbook_server.service.services import Services
from shardbook_server.service.views import PlanState
from shardbook_server.storage import tables
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, fine, whole
from tests.conftest import MakeDatabases
from tests.databases import Databases


@pytest.fixture
def databases(make_databases: MakeDatabases) -> Databases:
    """Those that can fail over."""
    return make_databases("postgres")


def test_blobs_that_are_gone_are_asked_for_again(job: Job, database: Database) -> None:
    """The first write finds out and fails as a whole; made again, it asks the ranks for what is stored no more."""
    blobs = whole(job.model)
    job.register(1, blobs)
    with database.write() as connection:
        connection.execute(delete(tables.registrations))
        connection.execute(update(tables.rank_structures).values(reference_id=None))
        connection.execute(delete(tables.rank_structures))
    entries = [job.entry(1, one) for one in blobs]
    with pytest.raises(UnavailableError) as caught:
        job.services.registrations.register_batch(entries)
    assert "DATABASE_CONFLICT" == caught.value.reason
    assert all(answer.unknown for answer in fine(job.services.registrations.register_batch(entries)))
    job.register(1, blobs)
    assert job.commit(1).live


def test_a_decision_is_not_taken_for_that_of_another_attempt(job: Job, database: Database, services: Services) -> None:
    """The key of an attempt that was lost is handed out again; its decision must not be."""
    job.decide(1)
    with database.write() as connection:
        connection.execute(delete(tables.plan_submissions))
        connection.execute(update(tables.checkpoints).values(create_time_us=tables.checkpoints.c.create_time_us + 1))
    answer = fine(services.plans.plan_batch([job.plan_entry(1, whole(job.model)[0])]))[0]
    assert (PlanState.WAITING, 1) == (answer.state, answer.planned_count)
