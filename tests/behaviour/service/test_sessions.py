"""Sessions: who may write a (run, part)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shardbook.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RunBusyError,
    SessionFencedError,
    SessionUnknownError,
)
from shardbook_server.service.services import Services
from shardbook_server.service.types import OnLive, SessionKey, SessionStart
from shardbook_server.service.views import CheckpointState
from tests.behaviour.service.conftest import LEASE_TTL_S, Clock
from tests.behaviour.service.saves import RUN, Job, Model, whole


def test_numbers_grow_within_a_part_and_apart_between_parts(services: Services) -> None:
    """A number is handed out once per (run, part), and always a larger one."""
    numbers = []
    for part in ("", "optim", "", "", "optim"):
        job = Job(services, Model(1), part=part)
        numbers.append((part, job.start(on_live=OnLive.TAKEOVER).session))
    assert [("", 1), ("optim", 1), ("", 2), ("", 3), ("optim", 2)] == numbers


def test_an_empty_part_is_the_default_part(services: Services) -> None:
    """``part`` may be left out; it is then ``default``."""
    Job(services, Model(1)).start()
    second = Job(services, Model(1), part="default").start(on_live=OnLive.TAKEOVER)
    assert 2 == second.session


def test_starting_again_with_the_same_incarnation_returns_the_same_session(job: Job) -> None:
    """StartSession is idempotent by incarnation."""
    assert job.start() == job.start()
    assert 1 == job.session


def test_starting_again_as_another_job_is_refused(job: Job) -> None:
    """P4: the same incarnation with other content; one UUID is not two jobs."""
    with pytest.raises(AlreadyExistsError) as caught:
        job.services.sessions.start(SessionStart(RUN, "", job.incarnation, "slurm-2"))
    assert "job_id" == caught.value.violations[0].field


def test_a_late_start_of_an_old_incarnation_does_not_fence_the_restarted_job(
    services: Services, other_job: Callable[[], Job], clock: Clock
) -> None:
    """The restarted job takes over at once; what its predecessor sends later is refused, be the lease alive or over."""
    first, old, new = (Job(services, Model(1)) for _ in range(3))
    first.start("slurm-1")
    clock.advance(100)  # the old incarnation begins, and cannot reach the service
    clock.advance(100)  # the new one does
    assert 2 == new.start("slurm-1", known_session=1).session
    clock.advance(1)
    for on_live in OnLive:
        with pytest.raises(SessionFencedError) as caught:
            old.start("slurm-1", on_live=on_live, known_session=2, age_us=101_000_000)
        assert "2" == caught.value.metadata["session"]
    clock.advance(1_000)
    with pytest.raises(SessionFencedError):
        old.start("slurm-1", known_session=2, age_us=1_101_000_000)
    assert new.start("slurm-1").current


def test_a_late_start_of_the_newest_incarnation_takes_over(services: Services, clock: Clock) -> None:
    """Which of two incarnations is the later one does not depend on whose word arrives first."""
    old, new = Job(services, Model(1)), Job(services, Model(1))
    clock.advance(1_000)
    assert 1 == old.start("slurm-1", age_us=200_000_000).session
    clock.advance(1)
    assert 2 == new.start("slurm-1", age_us=100_000_000, known_session=1).session
    with pytest.raises(SessionFencedError):
        Job(services, Model(1)).start("slurm-1", age_us=150_000_000)


def test_a_start_that_was_long_on_its_way_fences_nobody(services: Services) -> None:
    """However young it says it is: what it knew when it was sent is not so any more."""
    old, new = Job(services, Model(1)), Job(services, Model(1))
    new.start("slurm-1", known_session=0)
    with pytest.raises(FailedPreconditionError) as caught:
        old.start("slurm-1", known_session=0)
    assert ("SESSION_MOVED", "1") == (caught.value.reason, caught.value.metadata["session"])
    assert 1 == new.start("slurm-1", known_session=0).session  # the natural key comes first


def test_nobody_takes_over_from_a_job_that_began_later(services: Services, clock: Clock) -> None:
    """Not late: a takeover is meant for what runs now. Once that is done, the part is free."""
    early, late = Job(services, Model(1)), Job(services, Model(1))
    clock.advance(1_000)
    late.start("slurm-2")
    with pytest.raises(RunBusyError):
        early.start("slurm-1", OnLive.TAKEOVER, age_us=900_000_000)
    clock.advance(1_000)
    assert 2 == early.start("slurm-1", age_us=1_900_000_000).session


def test_a_superseded_incarnation_learns_that_it_is_not_current(job: Job, other_job: Callable[[], Job]) -> None:
    """A late retry of StartSession neither takes the run back nor gets another number."""
    other_job().start(on_live=OnLive.TAKEOVER)
    info = job.start()
    assert (1, False) == (info.session, info.current)


def test_another_job_facing_a_live_lease_is_told_who_holds_the_run(job: Job, other_job: Callable[[], Job]) -> None:
    """A copied script must not fence a running job: RUN_BUSY names host, user and last sign of life."""
    with pytest.raises(RunBusyError) as caught:
        other_job().start(job_id="slurm-2")
    assert "RUN_BUSY" == caught.value.reason
    assert {"host": "node0", "user": "ada", "job_id": "slurm-1", "last_seen": "2027-01-15T08:00:00Z"} == (
        caught.value.metadata
    )
    assert LEASE_TTL_S == caught.value.retry_delay_s
    assert 'on_live="takeover"' in caught.value.message


@pytest.mark.parametrize("on_live", [OnLive.FAIL, OnLive.WAIT])
def test_the_same_job_takes_over_at_once(job: Job, other_job: Callable[[], Job], on_live: OnLive) -> None:
    """A restart of the same scheduler job does not wait for the lease of its own dead incarnation."""
    assert 2 == other_job().start(job_id="slurm-1", on_live=on_live).session


def test_an_empty_job_id_is_nobodys(services: Services, other_job: Callable[[], Job]) -> None:
    """Two jobs without an id are not the same job."""
    other_job().start()
    with pytest.raises(RunBusyError):
        other_job().start()


def test_whoever_waits_can_ask_cheaply_how_long(job: Job, other_job: Callable[[], Job], clock: Clock) -> None:
    """``lease_remaining_s`` is 0 exactly when ``start`` would not be refused."""
    waiting = SessionStart(RUN, "", b"w" * 16, on_live=OnLive.WAIT)
    taking = SessionStart(RUN, "", b"t" * 16, on_live=OnLive.TAKEOVER)
    sessions = job.services.sessions
    assert (60.0, 0.0) == (sessions.lease_remaining_s(waiting), sessions.lease_remaining_s(taking))
    clock.advance(59)
    assert 1.0 == sessions.lease_remaining_s(waiting)
    clock.advance(1)
    assert 0.0 == sessions.lease_remaining_s(waiting)
    assert 2 == sessions.start(waiting).session


def test_nobody_waits_for_a_run_that_does_not_exist(services: Services) -> None:
    """There is no lease on what nobody writes."""
    assert 0.0 == services.sessions.lease_remaining_s(SessionStart("projects/p/runs/new", "", b"w" * 16))


def test_a_new_session_expires_what_the_old_one_left_open(job: Job, other_job: Callable[[], Job]) -> None:
    """Nobody will finish it, and its staging is gone."""
    job.register(5, whole(job.model)[:1])
    other_job().start(on_live=OnLive.TAKEOVER)
    progress = job.services.progress.progress(job.key(5))
    assert (CheckpointState.EXPIRED, 0) == (progress.counts.state, progress.counts.registered_count)


def test_keep_alive_and_writes_say_when_the_lease_ends(job: Job, clock: Clock) -> None:
    """A lease ends its time to live after the last sign of life."""
    key = SessionKey(RUN, "", 1, job.incarnation)
    clock.advance(10)
    assert clock.now_us + 60_000_000 == job.services.sessions.keep_alive(key).expire_time_us


def test_a_released_lease_lets_the_next_job_in_at_once(job: Job, other_job: Callable[[], Job]) -> None:
    """The job is done: nobody has to wait for its lease to run out."""
    job.services.sessions.keep_alive(SessionKey(RUN, "", 1, job.incarnation), release=True)
    assert 2 == other_job().start().session


@pytest.mark.parametrize("error", [SessionFencedError, SessionUnknownError])
def test_keep_alive_is_fenced(job: Job, other_job: Callable[[], Job], error: type[Exception]) -> None:
    """Both the number and the incarnation have to be right, and current."""
    other_job().start(on_live=OnLive.TAKEOVER)
    incarnation = job.incarnation if error is SessionFencedError else b"x" * 16
    with pytest.raises(error):
        job.services.sessions.keep_alive(SessionKey(RUN, "", 1, incarnation))


def test_resumed_from_moves_latest(job: Job, other_job: Callable[[], Job]) -> None:
    """A rollback is not undone by the next restart: ``latest`` is what was resumed."""
    first, second = job.save(100), job.save(200)
    assert second.name == job.services.catalog.get_checkpoint("llm/8b@latest").name
    info = other_job().start(on_live=OnLive.TAKEOVER, resumed_from="llm/8b@100")
    assert first.name == info.latest
    assert first.name == other_job().start(on_live=OnLive.TAKEOVER).latest


@pytest.mark.parametrize(
    ("resumed_from", "error", "field"),
    [
        ("llm/8b@300", NotFoundError, None),
        ("llm/other@100", InvalidArgumentError, "resumed_from"),
        ("llm/8b:optim@100", InvalidArgumentError, "resumed_from"),
        ("not a ref", InvalidArgumentError, "resumed_from"),
        ("llm/8b@200.s1.a1", FailedPreconditionError, "resumed_from"),
    ],
)
def test_resumed_from_names_a_committed_checkpoint_of_the_part(
    job: Job, other_job: Callable[[], Job], resumed_from: str, error: type[Exception], field: str | None
) -> None:
    """Anything else is refused, and no session was started."""
    job.save(100)
    job.register(200, whole(job.model)[:1])
    with pytest.raises(error) as caught:
        other_job().start(on_live=OnLive.TAKEOVER, resumed_from=resumed_from)
    fields = [violation.field for violation in caught.value.violations]  # type: ignore[attr-defined]
    assert [field] * (field is not None) == fields
    assert 2 == other_job().start(on_live=OnLive.TAKEOVER).session
