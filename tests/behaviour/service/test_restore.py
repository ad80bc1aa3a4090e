"""Row 32: a database that was put back hands no session number out twice, and takes back what directories prove."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select

from shardbook.errors import AlreadyExistsError, FailedPreconditionError, SessionUnknownError
from shardbook_server.service.services import Services, build_services
from shardbook_server.storage import migrate, tables
from shardbook_server.storage.backup import SESSION_GAP, backup, mark_restored
from shardbook_server.storage.database import Database
from shardbook_server.storage.urls import is_postgres
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model, whole


def epoch(database: Database) -> bytes:
    """The epoch of a catalogue."""
    with database.read() as connection:
        found: bytes = connection.execute(select(tables.catalog.c.epoch)).scalar_one()
        return found


def test_a_backup_is_whole_and_of_one_moment(database: Database, services: Services, job: Job, tmp_path: Path) -> None:
    """Made while a write is open, checked by SQLite itself, served as it is; a Postgres is told its own tools."""
    job.save(1)
    target = tmp_path / "copy.db"
    if is_postgres(database.url):
        with pytest.raises(FailedPreconditionError, match="pg_dump"):
            backup(database.url, target)
        return
    with database.write() as connection:
        connection.execute(tables.runs.insert().values(project_id=1, name="unfinished", create_time_us=0))
        size_bytes = backup(database.url, target)
    assert target.stat().st_size == size_bytes
    with pytest.raises(AlreadyExistsError):
        backup(database.url, target)
    copy = Database(f"sqlite:///{target}")
    with copy.read() as connection:
        assert "ok" == connection.exec_driver_sql("PRAGMA integrity_check").scalar_one()
    again = build_services(copy)
    assert services.catalog.get_checkpoint("llm/8b@1") == again.catalog.get_checkpoint("llm/8b@1")
    assert ["projects/llm/runs/8b"] == [run.name for run in again.catalog.list_runs("projects/-").items]
    assert migrate.HEAD == migrate.check(copy.url)
    copy.close()


def test_no_session_number_is_handed_out_twice(database: Database, job: Job, clock: Clock) -> None:
    """The session that the backup does not know is unknown, the next one's number is beyond all of them."""
    lost = Job(job.services, Model(2), incarnation=b"lost-since-then!", session=job.session + 1)
    before = epoch(database)
    mark_restored(database.url)
    assert before != epoch(database)
    with pytest.raises(SessionUnknownError):
        lost.register(1, whole(lost.model))
    clock.advance(3600)
    later = Job(job.services, Model(2))
    assert job.session + SESSION_GAP + 1 == later.start().session
    assert later.save(2).live


def test_what_was_saved_since_is_recorded_as_history(database: Database, job: Job) -> None:
    """A directory proves an attempt of a session that the restored catalogue has never heard of."""
    job.save(1)
    mark_restored(database.url)
    lost = Job(job.services, Model(2), incarnation=b"lost-since-then!", session=job.session + 1)
    recorded = lost.record(2)
    assert (2, job.session + 1, True) == (recorded.step, recorded.session, recorded.recovered)
    assert job.save(3).live
