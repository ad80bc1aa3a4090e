"""What a server drops by itself: events and requests that are old, round after round, whatever one of them meets."""

from __future__ import annotations

import asyncio
import threading
import uuid

import pytest
from sqlalchemy import func, select

from shardbook.errors import UnavailableError
from shardbook_server import upkeep
from shardbook_server.failpoints import Failpoints
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.service.requests import REMEMBERED_S
from shardbook_server.service.services import build_services
from shardbook_server.storage.database import Database
from shardbook_server.storage.event_tables import events
from shardbook_server.storage.request_tables import requests
from shardbook_server.storage.requests import RequestKey
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model
from tests.databases import Databases

RETENTION_S = 3_600.0


def test_what_is_old_goes_and_what_is_young_stays(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round fails for events, which keeps neither requests nor the next round from being dropped."""
    monkeypatch.setattr(upkeep, "EVERY_S", 0.02)
    clock = Clock()
    database = Database(databases.new(), clock=clock)
    services = build_services(database)

    def ask(name: str) -> None:
        key = RequestKey(name, "", "/shardbook.v1.CatalogService/SetAlias", uuid.uuid4().bytes)
        services.requests.once(key, bytes(32), lambda: b"")

    def left() -> tuple[list[str], int]:
        with database.read() as connection:
            names = list(connection.scalars(select(requests.c.project).order_by(requests.c.project)))
            return names, connection.execute(select(func.count()).select_from(events)).scalar_one()

    job = Job(services, Model(2))
    job.start(job_id="slurm-1")
    job.save(1)
    ask("old")
    clock.advance(1)
    ask("young")
    clock.advance(REMEMBERED_S)
    job.save(2)
    assert (["old", "young"], True) == (left()[0], left()[1] > 1)
    event_count = left()[1]
    old, *others = upkeep.old_things(services, RETENTION_S)
    tries: list[int] = []
    thrice = threading.Event()

    def drop(age_us: int) -> int:
        tries.append(age_us)
        if len(tries) == 1:
            raise UnavailableError("the database is away")
        if len(tries) == 3:
            thrice.set()
        return old.drop(age_us)

    async def run() -> None:
        bridge = Bridge(threads=2, heavy_threads=1, writers=1, queue_limit=8, failpoints=Failpoints({}))
        things = (upkeep.Old(old.what, drop, old.age_s), *others)
        task = asyncio.create_task(upkeep.drop_what_is_old(bridge, things))
        assert await asyncio.to_thread(thrice.wait, 20)
        task.cancel()
        await bridge.close()

    asyncio.run(run())
    assert [round(RETENTION_S * 1e6)] * 3 == tries[:3]
    assert ["young"] == left()[0]
    assert 0 < left()[1] < event_count
    database.close()
