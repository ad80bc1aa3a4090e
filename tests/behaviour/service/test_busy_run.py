"""A run that is held for long, by a replica that hangs, costs its own ranks a retry and no other run anything.

On Postgres alone: on SQLite there is one writer at a time, whatever the run.
"""

from __future__ import annotations

import pytest

from shardbook.core.names import RunName
from shardbook.errors import UnavailableError
from shardbook_server.service.services import Services
from shardbook_server.service.views import PlanAnswer, RegistrationAnswer
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, whole
from tests.conftest import MakeDatabases
from tests.databases import Databases


@pytest.fixture
def databases(make_databases: MakeDatabases) -> Databases:
    """Those with locks of runs."""
    return make_databases("postgres")


def test_a_batch_fails_for_the_run_that_is_held_alone(services: Services, database: Database) -> None:
    """Plans and registrations of the other run are stored, in the order they were given."""
    held, free = (
        Job(services, Model(2), run="projects/llm/runs/held"),
        Job(services, Model(2), run="projects/llm/runs/free"),
    )
    jobs = (held, free)
    for job in jobs:
        job.start()
    blobs = whole(Model(2))
    with database.write([RunName.parse(held.run)]):
        plans = services.plans.plan_batch([job.plan_entry(1, one, job.check(one)) for one in blobs for job in jobs])
        registrations = services.registrations.register_batch(
            [job.entry(1, one, job.check(one)) for one in blobs for job in jobs]
        )
    for verdicts, kind in ((plans, PlanAnswer), (registrations, RegistrationAnswer)):
        refused = [one for one in verdicts[::2] if isinstance(one, UnavailableError)]
        assert ["DATABASE_BUSY"] * 2 == [one.reason for one in refused]
        assert all(one.retry_delay_s for one in refused)
        assert [kind] * 2 == [type(one) for one in verdicts[1::2]]
    assert free.commit(1).live
