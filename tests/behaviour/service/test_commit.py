"""Commit and abort: one short transaction proves that every rank is there and the geometry is whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest

from shardbook.errors import (
    CheckpointClosedError,
    InvalidArgumentError,
    InvalidGeometryError,
    NotFoundError,
    RanksMissingError,
    SessionFencedError,
    SessionUnknownError,
)
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.types import AttemptKey, OnLive
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from shardbook_server.storage import events as event_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.events import EventKind
from tests.behaviour.service.saves import RUN, Job, Model, blobs_of, whole


def test_committing_again_returns_the_same_checkpoint(job: Job) -> None:
    """The answer to a commit whose first answer was lost."""
    assert job.save(1) == job.commit(1)


def test_a_commit_says_what_it_holds(job: Job) -> None:
    """Counts of tensors, chunks and bytes come from the assembled structure."""
    info = job.save(1)
    assert (CheckpointState.COMMITTED, True, 4, 7, 1) == (
        info.state,
        info.live,
        info.tensor_count,
        info.chunk_count,
        info.bytes_entry_count,
    )
    assert ("llm/8b@1", f"{RUN}/parts/default/checkpoints/1.s1.a1") == (info.ref, info.name)


def test_missing_ranks_are_named_with_their_hosts(services: Services) -> None:
    """The first 50 and the count; hosts of those that planned."""
    job = Job(services, Model(80))
    job.start()
    ranks = whole(job.model)
    job.plan(1, ranks[:25])
    job.register(1, ranks[:20])
    with pytest.raises(RanksMissingError) as caught:
        job.commit(1)
    metadata = caught.value.metadata
    assert "60" == metadata["missing_count"]
    assert list(range(20, 70)) == json.loads(metadata["ranks"])
    assert [f"node{rank}" for rank in range(20, 25)] + [""] * 45 == json.loads(metadata["hosts"])
    assert "20 (node20)" in caught.value.message
    assert "and 50 more" in caught.value.message


def test_an_attempt_nobody_spoke_of_is_not_found(job: Job) -> None:
    """There is nothing to commit, abort or watch."""
    for call in (job.services.commits.commit, job.services.progress.progress):
        with pytest.raises(NotFoundError):
            call(job.key(1))
    with pytest.raises(NotFoundError):
        job.services.commits.abort(job.key(1), "")


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Model(2, overlap=1), "GEOMETRY_OVERLAP"), (Model(2, hole=1), "GEOMETRY_HOLE")],
)
def test_wrong_geometry_fails_the_attempt(services: Services, model: Model, reason: str) -> None:
    """FAILED_PRECONDITION naming tensor and ranks; the checkpoint is FAILED with the same words, nothing is stored."""
    job = Job(services, model)
    job.start()
    with pytest.raises(InvalidGeometryError) as caught:
        job.save(1)
    assert reason == caught.value.reason
    assert "model.w0" in caught.value.message
    info = services.catalog.get_checkpoint("llm/8b@1.s1.a1")
    assert (CheckpointState.FAILED, caught.value.message, b"") == (info.state, info.failure, info.structure_digest)
    with pytest.raises(CheckpointClosedError, match="w0"):
        job.commit(1)


def test_the_next_attempt_of_the_step_may_succeed(services: Services) -> None:
    """An attempt that failed does not spoil its step."""
    job = Job(services, Model(2, hole=1))
    job.start()
    with pytest.raises(InvalidGeometryError):
        job.save(1)
    job.model = Model(2)
    assert "llm/8b@1" == job.save(1, attempt=2).ref


def test_a_fenced_session_cannot_commit(job: Job, other_job: Callable[[], Job]) -> None:
    """Whatever it has registered; and what the new session does is unaffected."""
    job.register(1, whole(job.model))
    newer = other_job()
    newer.start(on_live=OnLive.TAKEOVER)
    newer.register(1, whole(job.model))
    with pytest.raises(SessionFencedError):
        job.commit(1)
    with pytest.raises(SessionFencedError):
        job.services.commits.abort(job.key(1), "")
    with pytest.raises(SessionFencedError):
        job.commit(2)
    assert 2 == newer.commit(1).session


def test_an_unknown_session_cannot_commit(job: Job) -> None:
    """A number alone is no identity."""
    stranger = Job(job.services, job.model, session=1)
    with pytest.raises(SessionUnknownError):
        stranger.commit(1)


def test_a_commit_of_before_the_fence_is_still_answered(job: Job, other_job: Callable[[], Job]) -> None:
    """The retry of a commit that happened gets its answer, even when a new session has started since."""
    job.save(1)
    other_job().start(on_live=OnLive.TAKEOVER)
    assert CheckpointState.COMMITTED == job.commit(1).state


def test_a_commit_with_another_world_size_is_refused(job: Job) -> None:
    """A restarted job of another size must not take over shards of the old one."""
    job.register(1, whole(job.model))
    key = AttemptKey(RUN, "", 1, job.session, job.incarnation, 1, 3)
    with pytest.raises(InvalidArgumentError) as caught:
        job.services.commits.commit(key)
    assert ["key.world_size"] == [violation.field for violation in caught.value.violations]


def test_racing_committers_get_the_identical_answer(job: Job, database: Database) -> None:
    """On two servers: exactly one commits."""
    job.register(1, whole(job.model))
    servers = [build_services(database) for _ in range(2)] + [job.services]
    answers: list[CheckpointInfo] = []

    def commit(services: Services) -> None:
        answers.append(services.commits.commit(job.key(1)))

    threads = [threading.Thread(target=commit, args=(services,)) for services in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[0]] * 3 == answers
    with database.read() as connection:
        kinds = [stored.event.kind for stored in event_rows.read_after(connection, 0, 100)]
    assert [EventKind.COMMITTED, EventKind.LATEST_MOVED] == kinds


def test_an_aborted_attempt_is_failed_with_its_reason(job: Job) -> None:
    """Aborting again is fine, and the first reason stays."""
    job.register(1, whole(job.model)[:1])
    first = job.services.commits.abort(job.key(1), "rank 1 does not answer")
    again = job.services.commits.abort(job.key(1), "again")
    assert (CheckpointState.FAILED, "rank 1 does not answer") == (first.state, first.failure)
    assert first == again
    with pytest.raises(CheckpointClosedError):
        job.commit(1)


def test_a_committed_attempt_cannot_be_aborted(job: Job) -> None:
    """COMMITTED metadata never changes."""
    job.save(1)
    with pytest.raises(CheckpointClosedError):
        job.services.commits.abort(job.key(1), "")


def test_staging_is_empty_after_a_commit(job: Job, database: Database) -> None:
    """Registrations are folded away in the transaction that commits."""
    job.decide(1)
    job.register(1, whole(job.model))
    job.commit(1)
    with database.read() as connection:
        for table in ("plan_submissions", "registrations"):
            assert 0 == connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar()


def test_one_changed_rank_stores_one_tensor_anew(services: Services, database: Database) -> None:
    """Tensors of a structure are content-addressed one by one."""
    job = Job(services, Model(2, sharded=50))
    job.start()
    drops = job.decide(1)
    ranks = whole(job.model)
    job.register(1, ranks)
    job.commit(1)

    def stored() -> int:
        with database.read() as connection:
            count: int = connection.exec_driver_sql("SELECT count(*) FROM structure_tensors").scalar_one()
        return count

    assert 52 == stored()
    # Rank 0 drops one replicated entry now: the others keep their blocks, except those that lie behind it.
    job.register(2, [blobs_of(job.model, 0, drops[0]), ranks[1]])
    job.commit(2)
    assert stored() <= 52 + 2


def test_uneven_worlds_share_nothing_but_the_run(services: Services) -> None:
    """A job restarted at another size saves the same step anew; the old one still loads its own bytes."""
    old = Job(services, Model(2))
    old.start()
    first = old.save(1)
    new = Job(services, Model(4))
    new.start(on_live=OnLive.TAKEOVER)
    second = new.save(1)
    assert (2, 4) == (first.world_size, services.catalog.get_checkpoint("llm/8b@1").world_size)
    superseded = services.catalog.get_checkpoint("llm/8b@1.s1")
    assert (False, CheckpointState.COMMITTED, 2) == (superseded.live, superseded.state, superseded.world_size)
    assert second.location != superseded.location
