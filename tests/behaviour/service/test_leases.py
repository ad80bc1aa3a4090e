"""Leases: open attempts end with their writers, and come back with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shardbook.errors import CheckpointClosedError, RunBusyError, SessionFencedError
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointState
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import sessions as session_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.urls import is_postgres
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, whole

PERIOD_S = 10.0


def reap(job: Job) -> int:
    """Runs the reaper once."""
    return job.services.sessions.expire_leases()


def state(job: Job, step: int) -> CheckpointState:
    """Where an attempt is in its life."""
    return job.services.progress.progress(job.key(step)).counts.state


def run_reaper(job: Job, clock: Clock, seconds: float) -> int:
    """Lets time pass with the reaper running; returns how many attempts it ended."""
    count = 0
    for _ in range(round(seconds / PERIOD_S)):
        clock.advance(PERIOD_S)
        count += reap(job)
    return count


def test_an_attempt_whose_writers_fell_silent_expires(job: Job, clock: Clock) -> None:
    """The coordinator died: the attempt does not stay open for ever, and never is ``latest``."""
    job.register(1, whole(job.model)[:1])
    reap(job)
    assert 0 == run_reaper(job, clock, 50)
    assert 1 == run_reaper(job, clock, 20)
    assert CheckpointState.EXPIRED == state(job, 1)


def test_any_write_renews_the_lease(job: Job, clock: Clock) -> None:
    """Ranks that still plan or register keep the session alive without KeepAlive."""
    first, second = whole(job.model)
    job.register(1, [first])
    reap(job)
    run_reaper(job, clock, 50)
    job.register(1, [second])
    assert 0 == run_reaper(job, clock, 50)
    assert CheckpointState.OPEN == state(job, 1)


def test_writers_that_come_back_revive_their_attempt(job: Job, clock: Clock) -> None:
    """Nobody superseded it, so what was registered before still counts."""
    first, second = whole(job.model)
    job.register(1, [first])
    reap(job)
    run_reaper(job, clock, 100)
    job.register(1, [second])
    assert CheckpointState.OPEN == state(job, 1)
    assert CheckpointState.COMMITTED == job.commit(1).state


def test_a_complete_expired_attempt_can_be_committed(job: Job, clock: Clock) -> None:
    """The coordinator was slow, not dead."""
    job.register(1, whole(job.model))
    reap(job)
    run_reaper(job, clock, 100)
    assert CheckpointState.EXPIRED == state(job, 1)
    assert CheckpointState.COMMITTED == job.commit(1).state


def test_an_expired_attempt_that_was_superseded_stays_so(job: Job, other_job: Callable[[], Job], clock: Clock) -> None:
    """A new session fences the writers of the old one for good."""
    job.register(1, whole(job.model))
    reap(job)
    run_reaper(job, clock, 100)
    other_job().start()
    with pytest.raises(SessionFencedError):
        job.commit(1)
    with pytest.raises(SessionFencedError):
        job.register(1, whole(job.model))


def test_an_outage_is_credited(job: Job, clock: Clock) -> None:
    """The service was away for an hour: nobody could renew, so nobody is punished for it."""
    job.register(1, whole(job.model)[:1])
    reap(job)
    run_reaper(job, clock, 30)
    clock.advance(3600)
    assert 0 == reap(job)
    assert 0 == run_reaper(job, clock, 20)
    assert CheckpointState.OPEN == state(job, 1)
    assert 1 == run_reaper(job, clock, 30)


def test_a_job_that_waits_is_not_quicker_than_the_credit(job: Job, other_job: Callable[[], Job], clock: Clock) -> None:
    """The service is back, and the reaper has not been round yet: the live job must not be fenced meanwhile."""
    reap(job)
    run_reaper(job, clock, 30)
    clock.advance(3600)
    other = other_job()
    with pytest.raises(RunBusyError):
        other.start(on_live=OnLive.WAIT)
    assert 0 == reap(job)
    run_reaper(job, clock, 90)
    assert 2 == other.start(on_live=OnLive.WAIT).session


def test_a_round_of_the_reaper_in_between_does_not_take_the_credit_away(
    job: Job, other_job: Callable[[], Job], database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: the live job is not fenced when the reaper is round while another one is judged."""
    reap(job)
    run_reaper(job, clock, 30)
    clock.advance(300)
    rounds: list[int] = []

    def then_reap(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*arguments: Any) -> Any:
            found = read(*arguments)
            if not rounds:
                rounds.append(-1)  # the reaper looks, too
                rounds[0] = reap(job)
            return found

        return reading

    if is_postgres(database.url):
        monkeypatch.setattr(session_rows, "current_lease", then_reap(session_rows.current_lease))
        monkeypatch.setattr(event_rows, "read_reap_time", then_reap(event_rows.read_reap_time))
    else:  # SQLite's writers go one after the other
        rounds.append(reap(job))
    with pytest.raises(RunBusyError):
        other_job().start(on_live=OnLive.FAIL)
    assert [0] == rounds


def test_a_lease_that_ended_before_the_outage_gets_no_credit(job: Job, clock: Clock) -> None:
    """Only what was alive when the service went away is extended."""
    job.register(1, whole(job.model)[:1])
    clock.advance(70)
    job.services.sessions.expire_leases()
    assert CheckpointState.EXPIRED == state(job, 1)
    clock.advance(36_000)
    assert 0 == reap(job)
    assert CheckpointState.EXPIRED == state(job, 1)


def test_a_committed_checkpoint_outlives_its_session(job: Job, clock: Clock) -> None:
    """Leases are about open attempts only."""
    job.save(1)
    reap(job)
    assert 0 == run_reaper(job, clock, 200)
    assert CheckpointState.COMMITTED == state(job, 1)


def test_a_recording_whose_sync_died_expires_after_a_day_and_may_begin_anew(job: Job, clock: Clock) -> None:
    """Session 0 has no lease; its staging must not stay for ever either."""
    offline = Job(job.services, job.model, incarnation=b"o" * 16)
    ranks = whole(job.model)
    checked = job.services.blobs.check("llm", [upload for blobs in ranks for upload in blobs.uploads()])
    request = offline.record_request(7, ranks[:1], complete=False)
    job.services.records.record(request, checked)
    reap(job)
    clock.advance(86_400)
    reap(job)
    clock.advance(PERIOD_S)
    assert 1 == reap(job)
    assert CheckpointState.EXPIRED == state(offline, 7)
    assert CheckpointState.COMMITTED == offline.record(7).state


def test_takeover_does_not_end_other_parts(job: Job) -> None:
    """Sessions and leases are per (run, part)."""
    optim = Job(job.services, job.model, part="optim")
    optim.start()
    optim.register(1, whole(job.model))
    Job(job.services, job.model).start(on_live=OnLive.TAKEOVER)
    assert CheckpointState.COMMITTED == optim.commit(1).state
    with pytest.raises(CheckpointClosedError):
        optim.services.commits.abort(optim.key(1), "too late")
