"""What nobody refers to is dropped, and nothing else, also while saves go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import pytest
from sqlalchemy import func, select

from shardbook.core.structure import BlobKind
from shardbook.errors import CheckpointClosedError, UnavailableError
from shardbook_server.service import garbage
from shardbook_server.service.garbage import GarbageService
from shardbook_server.service.services import build_services
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointState
from shardbook_server.storage import tables
from shardbook_server.storage.database import Database
from shardbook_server.storage.registrations import RegistrationRow, insert_registrations
from tests.behaviour.service.conftest import LEASE_TTL_S, Clock
from tests.behaviour.service.saves import Job, Model, whole

T = TypeVar("T")

DAY_S = 86_400
_COLLECTED = (tables.checkpoint_structures, tables.structure_tensors, tables.rank_structures, tables.save_plans)


def sizes(database: Database) -> dict[str, int]:
    """Rows of what may be dropped."""
    with database.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one() for table in _COLLECTED
        }


def collect(database: Database, days: int = 0, *, dry_run: bool = False) -> dict[str, int]:
    """Drops; returns how many of each kind, without zeros."""
    found = GarbageService(database).collect(older_than_days=days, dry_run=dry_run)
    assert [one for one in found if (one.count == 0) != (one.size_bytes == 0)] == []
    return {one.kind: one.count for one in found if one.count}


@pytest.fixture
def other(database: Database, clock: Clock) -> Iterator[Database]:
    """The same database as another process sees it."""
    opened = Database(database.url, clock=clock)
    yield opened
    assert opened.checked_out() == 0
    opened.close()


def persist(call: Callable[[], T]) -> T:
    """Makes a call that met a conflict again, as the bridge does."""
    try:
        return call()
    except UnavailableError as error:
        assert "DATABASE_CONFLICT" == error.reason
        return call()


def loads(job: Job, step: int) -> list[bytes]:
    """Everything that a loader of a step gets."""
    return [repr(message).encode() for message in job.services.metadata.get_metadata(f"llm/8b@{step}")]


def test_what_is_referred_to_stays(database: Database, job: Job) -> None:
    """Rule: committed, registered or planned in an open attempt: however old, it is kept."""
    job.save(1)
    job.model = Model(2, sharded=4)
    job.register(2, whole(job.model)[:1])
    job.model = Model(2, sharded=5)
    job.plan(3, whole(job.model)[:1])
    before = sizes(database)
    assert {} == collect(database)
    assert before == sizes(database)


def test_what_nothing_refers_to_is_dropped(database: Database, job: Job) -> None:
    """Rule: of a failed attempt nothing stays; the checkpoint beside it loads as before, tensor by tensor."""
    job.save(1)
    held, loaded = sizes(database), loads(job, 1)
    job.model = Model(2, sharded=7)
    job.decide(2)
    job.register(2, whole(job.model))
    job.services.commits.abort(job.key(2), "enough")
    assert held != sizes(database)
    expected = {"rank structures": 2, "rank plans": 2, "rank tables": 1, "save plans": 1}
    assert expected == collect(database)
    assert held == sizes(database)
    assert loaded == loads(job, 1)


def test_a_structure_without_a_checkpoint_goes_with_its_tensors(database: Database, job: Job) -> None:
    """Rule: assembled, never committed: the structure, its tensors and what ranks sent; shared tensors stay."""
    job.save(1)
    held = sizes(database)
    # The first three tensors are those of the checkpoint; what lies behind the fourth lies elsewhere in the files.
    job.model = Model(2, sharded=4)
    job.register(2, whole(job.model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardbook_server.service.commit.commit_attempt", _lost)
        with pytest.raises(UnavailableError):
            job.commit(2)
    job.services.commits.abort(job.key(2), "enough")
    assert {"checkpoint structures": 1, "tensors": 3} | _of_ranks(2, 2, 1) == collect(database, dry_run=True)
    assert {"checkpoint structures": 1, "tensors": 3} | _of_ranks(2, 2, 1) == collect(database)
    assert held == sizes(database)


def _of_ranks(structures: int, plans: int, name_tables: int) -> dict[str, int]:
    return {"rank structures": structures, "rank plans": plans, "rank tables": name_tables}


def _lost(*_: object, **__: object) -> None:
    raise UnavailableError("the connection was lost", reason="DATABASE_UNAVAILABLE")


def test_what_was_used_lately_stays(database: Database, job: Job, clock: Clock) -> None:
    """Rule: unused for whole days, by the day of the last use; a save that names it again is a use."""
    ranks = whole(job.model)
    job.register(1, ranks)
    job.services.commits.abort(job.key(1), "enough")
    for _ in range(5):
        clock.advance(3 * DAY_S)
        assert {} == collect(database, 7)
        # By digest alone, from memory: no rank sends it again.
        job.services.registrations.register_batch([job.entry(2, blobs) for blobs in ranks])
        job.services.commits.abort(job.key(2), "enough")
    clock.advance(7 * DAY_S)
    assert {} == collect(database, 7)
    clock.advance(DAY_S)
    assert _of_ranks(2, 2, 1) == collect(database, 7)


def test_a_dry_run_drops_nothing(database: Database, job: Job) -> None:
    """Rule: it says what a run would drop, which then does."""
    job.register(1, whole(job.model))
    job.services.commits.abort(job.key(1), "enough")
    before = sizes(database)
    said = GarbageService(database).collect(older_than_days=0, dry_run=True)
    assert before == sizes(database)
    assert said == GarbageService(database).collect(older_than_days=0)
    assert dict.fromkeys(before, 0) == sizes(database)


def test_projects_are_apart(database: Database, job: Job) -> None:
    """Rule: what one project drops another one keeps, though it is the same content."""
    theirs = Job(job.services, job.model, run="projects/other/runs/8b")
    theirs.start()
    theirs.save(1)
    job.register(1, whole(job.model))
    job.services.commits.abort(job.key(1), "enough")
    assert _of_ranks(2, 2, 1) == collect(database)
    assert theirs.save(2).live


def test_what_a_server_has_in_mind_is_asked_for_again(job: Job, other: Database) -> None:
    """Rule: dropped by another process, the structure is answered as unknown, not as stored."""
    ranks = whole(job.model)
    job.register(1, ranks)
    job.services.commits.abort(job.key(1), "enough")
    assert collect(other)
    entries = [job.entry(2, blobs) for blobs in ranks]
    # The bridge makes a call again that met this; see ``Bridge``.
    with pytest.raises(UnavailableError) as caught:
        job.services.registrations.register_batch(entries)
    assert "DATABASE_CONFLICT" == caught.value.reason
    answers = job.services.registrations.register_batch(entries)
    assert [BlobKind.STRUCTURE] * 2 == [answer.unknown[0].kind for answer in answers]  # type: ignore[union-attr]
    assert [] == [blob for answer in job.register(2, ranks) for blob in answer.unknown]
    assert job.commit(2).live


def test_a_structure_that_went_between_assembly_and_commit_is_assembled_again(job: Job, other: Database) -> None:
    """Rule: the commit is refused as one to make again, and made again it commits."""
    job.register(1, whole(job.model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardbook_server.service.commit.commit_attempt", _lost)
        with pytest.raises(UnavailableError):
            job.commit(1)
    folder = job.services.commits._folder
    fold, is_first = folder.fold, True

    def folded_then_dropped(*arguments: object) -> object:
        nonlocal is_first
        folded = fold(*arguments)  # type: ignore[arg-type]
        if is_first:
            is_first = False
            assert {"checkpoint structures": 1, "tensors": 5} == collect(other)
        return folded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "fold", folded_then_dropped)
        with pytest.raises(UnavailableError) as caught:
            job.commit(1)
        assert "DATABASE_CONFLICT" == caught.value.reason
        assert job.commit(1).live
    assert loads(job, 1)


def test_no_structure_is_assembled_of_what_is_gone(database: Database, job: Job, other: Database) -> None:
    """Rule: an attempt that was closed while it was assembled leaves no lists of keys that mean nothing."""
    job.register(1, whole(job.model))
    blobs = job.services.blobs
    load = blobs.structures

    def loaded_then_closed(*arguments: object) -> object:
        loaded = load(*arguments)  # type: ignore[arg-type]
        job.services.commits.abort(job.key(1), "enough")
        assert _of_ranks(2, 2, 1) == collect(other)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blobs, "structures", loaded_then_closed)
        with pytest.raises(UnavailableError):
            job.commit(1)
    assert dict.fromkeys(sizes(database), 0) == sizes(database)
    persist(lambda: job.register(2, whole(job.model)))
    assert job.commit(2).live


def test_what_another_transaction_is_about_to_refer_to_stays(database: Database, job: Job, other: Database) -> None:
    """Rule: a row that a running transaction refers to is passed over, without waiting for it to see the reference."""
    job.register(1, whole(job.model))
    job.register(2, whole(job.model)[:1])
    job.services.commits.abort(job.key(1), "enough")
    with database.read() as connection:
        staged = RegistrationRow(*connection.execute(select(tables.registrations)).one())
        checkpoint_ids = connection.scalars(select(tables.checkpoints.c.id)).all()
        unused = connection.scalars(
            select(tables.rank_structures.c.id).where(
                tables.rank_structures.c.kind == int(BlobKind.STRUCTURE),
                tables.rank_structures.c.id != staged.structure_id,
            )
        ).one()
    late = replace(staged, checkpoint_id=max(checkpoint_ids), rank=1, structure_id=unused)
    begun, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with database.write() as connection:
            insert_registrations(connection, [late])
            begun.set()
            assert go_on.wait(30)

    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(write)
        assert begun.wait(30)
        collecting = pool.submit(collect, other)
        if database.backend.single_writer:
            go_on.set()
        # On Postgres it ends while the other one is still open.
        assert {} == {name: count for name, count in collecting.result(30).items() if name == "rank structures"}
        go_on.set()
        writing.result(30)
    assert job.commit(2).live


def test_what_an_expired_attempt_staged_goes_when_its_writers_stay_away(
    database: Database, job: Job, clock: Clock
) -> None:
    """Rule: for as long as things are kept it may be revived; then it is closed, and its structures go."""
    job.register(1, whole(job.model))
    job.services.sessions.expire_leases()
    for _ in range(8):
        clock.advance(10)
        job.services.sessions.expire_leases()
    clock.advance(6 * DAY_S)
    assert {} == collect(database, 7)
    clock.advance(2 * DAY_S)
    assert {"abandoned attempts": 1} == collect(database, 7, dry_run=True)
    assert {"abandoned attempts": 1} | _of_ranks(2, 2, 1) == collect(database, 7)
    assert CheckpointState.EXPIRED == job.services.progress.progress(job.key(1)).counts.state
    with pytest.raises(CheckpointClosedError):
        job.register(1, whole(job.model))
    # The data are on storage all the same: a sync records them.
    assert CheckpointState.COMMITTED == persist(lambda: job.record(1)).state


def test_an_open_attempt_of_a_live_job_is_nobody_s_to_give_up(database: Database, job: Job) -> None:
    """Rule: also when nothing is to be kept."""
    job.register(1, whole(job.model)[:1])
    assert {} == collect(database)
    job.register(1, whole(job.model)[1:])
    assert job.commit(1).live


def test_lists_may_be_long_and_batches_many(database: Database, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: pages and batches of one row give what one large one gives."""
    monkeypatch.setattr("shardbook_server.storage.garbage._PAGE", 1)
    monkeypatch.setattr("shardbook_server.storage.garbage._LISTS", 1)
    monkeypatch.setattr(garbage, "_FIRST_COUNT", 1)
    for step, sharded in enumerate((3, 4, 5)):
        job.model = Model(2, sharded=sharded)
        job.save(step)
    held = sizes(database)
    for step, sharded in enumerate((6, 7)):
        job.model = Model(2, sharded=sharded)
        job.register(10 + step, whole(job.model))
        job.services.commits.abort(job.key(10 + step), "enough")
    assert _of_ranks(4, 4, 2) == collect(database)
    assert held == sizes(database)
    restarted = Job(build_services(database, lease_ttl_s=LEASE_TTL_S), Model(2))
    restarted.start(on_live=OnLive.TAKEOVER)
    assert restarted.save(20).live
    for step in range(3):
        assert loads(job, step)
