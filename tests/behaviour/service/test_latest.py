"""What ``@step`` and ``@latest`` mean, and what moves them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shardbook.errors import NotFoundError
from shardbook_server.service.services import Services
from shardbook_server.service.types import OnLive
from tests.behaviour.service.saves import Job, Model, whole


def latest(services: Services) -> tuple[int, int]:
    """(session, step) of what ``latest`` means."""
    info = services.catalog.get_checkpoint("llm/8b@latest")
    return info.session, info.step


def test_a_commit_of_the_current_session_moves_latest(job: Job) -> None:
    """In its own step order."""
    for step in (10, 30, 20):
        job.save(step)
    assert (1, 30) == latest(job.services)


def test_a_new_session_that_begins_further_back_moves_latest_back(job: Job, other_job: Callable[[], Job]) -> None:
    """An abandoned branch never hides the live one."""
    job.save(100)
    newer = other_job()
    newer.start(on_live=OnLive.TAKEOVER)
    assert (1, 100) == latest(job.services)
    newer.save(60)
    assert (2, 60) == latest(job.services)


def test_a_rollback_survives_the_next_restart(job: Job, other_job: Callable[[], Job]) -> None:
    """``resumed_from`` moved ``latest``; a restart that crashes before its first save changes nothing."""
    job.save(100)
    job.save(200)
    other_job().start(on_live=OnLive.TAKEOVER, resumed_from="llm/8b@100")
    other_job().start(on_live=OnLive.TAKEOVER)
    assert (1, 100) == latest(job.services)


def test_a_later_session_supersedes_a_step(job: Job, other_job: Callable[[], Job]) -> None:
    """``@step`` is the newest; the old one stays loadable as ``@step.sN``."""
    old = job.save(5)
    newer = other_job()
    newer.start(on_live=OnLive.TAKEOVER)
    new = newer.save(5)
    find = job.services.catalog.get_checkpoint
    assert new.name == find("llm/8b@5").name
    assert [old.name, new.name] == [find("llm/8b@5.s1").name, find("llm/8b@5.s2").name]
    assert [False, True] == [find(old.name).live, find(new.name).live]
    assert "llm/8b@5.s1.a1" == find(old.name).ref


def test_a_later_attempt_supersedes_an_earlier_one(job: Job) -> None:
    """Within a session, ``@step.sN`` is the newest committed attempt."""
    job.save(5)
    job.register(5, whole(job.model), attempt=3)
    second = job.save(5, attempt=2)
    find = job.services.catalog.get_checkpoint
    assert [second.name] * 2 == [find("llm/8b@5").name, find("llm/8b@5.s1").name]
    assert not find("llm/8b@5.s1.a1").live


def test_an_earlier_attempt_that_commits_late_does_not_take_the_step(job: Job) -> None:
    """The newer attempt stays what the step means; both are committed."""
    job.register(5, whole(job.model), attempt=1)
    second = job.save(5, attempt=2)
    first = job.commit(5, attempt=1)
    assert not first.live
    assert second.name == job.services.catalog.get_checkpoint("llm/8b@5").name


@pytest.mark.parametrize(
    "ref", ["llm/8b@7", "llm/8b@5.s2", "llm/8b@5.s1.a9", "llm/8b@best", "llm/none@5", "llm/8b:x@5"]
)
def test_names_that_mean_nothing_are_not_found(job: Job, ref: str) -> None:
    """NOT_FOUND, with a hint where to look."""
    job.save(5)
    with pytest.raises(NotFoundError):
        job.services.catalog.get_checkpoint(ref)


def test_latest_of_a_run_without_a_commit_is_not_found(job: Job) -> None:
    """An open attempt never is ``latest``."""
    job.register(5, whole(job.model))
    with pytest.raises(NotFoundError):
        job.services.catalog.get_checkpoint("llm/8b@latest")


def test_parts_have_their_own_latest(services: Services) -> None:
    """Weights and optimizer saved apart do not move each other."""
    for part, step in (("weights", 10), ("optim", 20)):
        job = Job(services, Model(2), part=part)
        job.start()
        job.save(step)
    find = services.catalog.get_checkpoint
    assert [10, 20] == [find("llm/8b:weights@latest").step, find("llm/8b:optim@latest").step]
