"""Decisions about plans are made once, stored, and found again by whoever has the same plans in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import text

from shardbook.core import limits
from shardbook.core.planning import decide
from shardbook.core.structure import RankPlan
from shardbook.errors import UnavailableError
from shardbook_server.service import decisions
from shardbook_server.service.admission import MemoryBudget
from shardbook_server.service.blobs import BlobService
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.views import PlanState
from shardbook_server.storage.blobs import DAY_US
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, fine, whole


@contextmanager
def _no_deciding() -> Iterator[None]:
    """Whatever is answered within the block was not decided there."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decided anew")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions, "decide", refuse)
        yield


def _refuse(*_: object, **__: object) -> None:
    raise UnavailableError("no room", reason="STORAGE_FULL")


def _drops(job: Job, services: Services, step: int) -> list[bytes]:
    """What the ranks are told by ``services``, which were sent the digests only."""
    answers = fine(services.plans.plan_batch([job.plan_entry(step, blobs) for blobs in whole(job.model)]))
    decided = [services.plans.decide(answers[0].checkpoint_id, rank) for rank in range(job.model.world_size)]
    assert {PlanState.DECIDED} == {answer.state for answer in decided}
    return [answer.drop for answer in decided]


def test_a_later_save_and_a_restarted_server_find_the_decision(job: Job, database: Database) -> None:
    """Rule: the same plans are decided about once, whoever asks."""
    drops = job.decide(1)
    with _no_deciding():
        assert drops == _drops(job, job.services, 2)
        assert drops == _drops(job, build_services(database), 3)


def test_another_job_of_the_project_finds_it_and_another_project_does_not(job: Job, database: Database) -> None:
    """Rule: decisions are shared within a project; nothing learned in another one opens anything."""
    drops = job.decide(1)
    cousin = Job(build_services(database), job.model, run="projects/llm/runs/cousin")
    cousin.start()
    with _no_deciding():
        assert drops == _drops(cousin, cousin.services, 7)
    stranger = Job(build_services(database), job.model, run="projects/other/runs/8b")
    stranger.start()
    with _no_deciding(), pytest.raises(AssertionError, match="decided anew"):
        stranger.decide(1)


def test_other_plans_or_another_order_are_decided_anew(job: Job) -> None:
    """Rule: a decision belongs to the ordered plans: swapped ranks must not get each other's drops."""
    # Rank 1 holds other rows, so the swapped world has other plans by rank.
    job.decide(1)
    first, second = whole(job.model)
    answers = job.plan(2, [replace(second, rank=0), replace(first, rank=1)])
    drops = [job.services.plans.decide(answer.checkpoint_id, rank).drop for rank, answer in enumerate(answers)]
    plans = [job.model.plan(1), job.model.plan(0)]
    expected = [np.packbits(drop).tobytes() if drop.any() else b"" for drop in decide(plans, np.arange(2))]
    assert expected == drops


def test_a_large_world_is_stored_in_segments(database: Database, job: Job) -> None:
    """Rule: what a replica reads for one rank does not grow with the world."""
    world = Job(job.services, Model(limits.SEGMENT_RANKS + 44), run="projects/llm/runs/large")
    world.start()
    drops = world.decide(1)
    with database.read() as connection:
        rows = connection.execute(text("SELECT first_rank FROM save_plans ORDER BY first_rank")).scalars().all()
    assert [0, limits.SEGMENT_RANKS] == list(rows)
    with _no_deciding():
        assert drops == _drops(world, build_services(database), 2)


def test_a_damaged_decision_is_made_anew(job: Job, database: Database) -> None:
    """Rule: what is stored about a decision is never the reason that a save fails."""
    drops = job.decide(1)
    for payload in (b"", b"\x00junk", b"\x00SBSP\x01\x00\x00"):
        with database.write() as connection:
            connection.execute(text("UPDATE save_plans SET payload = :payload"), {"payload": payload})
        assert drops == _drops(job, build_services(database), 2)


def test_a_decision_that_cannot_be_stored_is_given_all_the_same(
    job: Job, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: ranks that wait for their plan do not fail for want of a cache."""
    monkeypatch.setattr("shardbook_server.storage.decisions.insert_decision", _refuse)
    drops = job.decide(1)
    with database.read() as connection:
        assert 0 == connection.execute(text("SELECT count(*) FROM save_plans")).scalar_one()
    assert drops == _drops(job, job.services, 2)


def test_use_is_noted_once_a_day(job: Job, database: Database) -> None:
    """Rule: what is in use is not collected, at the price of one write a day."""
    job.decide(1)
    with database.write() as connection:
        connection.execute(text("UPDATE save_plans SET last_used_day = 5"))
    with _no_deciding():
        _drops(job, build_services(database), 2)
    with database.read() as connection:
        today = database.now_us(connection) // DAY_US
        assert today - connection.execute(text("SELECT last_used_day FROM save_plans")).scalar_one() <= 1


def test_plans_are_loaded_within_the_memory_that_they_take(
    job: Job, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: two large decisions that do not fit together are not both loaded, also by a server that was restarted."""
    job.plan(1, whole(job.model))
    restarted = build_services(database)
    held: list[int] = []
    at_load: list[list[int]] = []
    hold, load = MemoryBudget.hold, BlobService.plans

    @contextmanager
    def noted_hold(budget: MemoryBudget, size_bytes: int) -> Iterator[None]:
        with hold(budget, size_bytes):
            held.append(size_bytes)
            yield
            held.remove(size_bytes)

    def noted_load(blobs: BlobService, project: str, digests: Sequence[bytes]) -> list[RankPlan]:
        at_load.append(list(held))
        return load(blobs, project, digests)

    monkeypatch.setattr(MemoryBudget, "hold", noted_hold)
    monkeypatch.setattr(BlobService, "plans", noted_load)
    _drops(job, restarted, 1)
    items = sum(job.model.plan(rank).item_count for rank in range(job.model.world_size))
    assert [[items * (decisions._BYTES_PER_ITEM + decisions._BYTES_PER_SEEN)]] == at_load
