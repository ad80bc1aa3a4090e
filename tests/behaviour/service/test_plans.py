"""PlanSave: deduplication without a collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from shardbook.core.planning import decide
from shardbook.core.structure import BlobKind
from shardbook.errors import (
    AlreadyExistsError,
    CheckpointClosedError,
    InvalidArgumentError,
    NotFoundError,
    SessionFencedError,
    SessionUnknownError,
)
from shardbook_server.service.services import build_services
from shardbook_server.service.types import AttemptLocation, BlobRef, OnLive
from shardbook_server.service.views import PlanAnswer, PlanState
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, blobs_of, fine, whole


@pytest.fixture
def job_of_one(job: Job) -> Job:
    """A job of one rank."""
    one = Job(job.services, Model(1), run="projects/llm/runs/one")
    one.start()
    return one


def test_a_plan_the_server_lacks_is_asked_for_level_by_level(job: Job) -> None:
    """Unknown content is an answer, not an error: cold starts are no storm of errors."""
    blobs = whole(job.model)[0]
    plan, table = BlobRef(BlobKind.PLAN, blobs.plan.digest), BlobRef(BlobKind.TABLE, blobs.table.digest)
    plans = job.services.plans

    def ask(*kinds: BlobKind) -> PlanAnswer:
        checked = job.check(blobs, *kinds) if kinds else None
        return fine(plans.plan_batch([job.plan_entry(1, blobs, checked)]))[0]

    assert (PlanState.STRUCTURE_UNKNOWN, (plan,)) == (ask().state, ask().unknown)
    assert (table, plan) == ask(BlobKind.PLAN).unknown
    assert PlanState.WAITING == ask(BlobKind.TABLE, BlobKind.PLAN).state
    assert PlanState.WAITING == ask().state


def test_tables_that_arrive_first_are_kept(job: Job) -> None:
    """A rank whose blobs do not fit into one call sends them in several."""
    blobs = whole(job.model)[0]
    job.services.plans.plan_batch([job.plan_entry(1, blobs, job.check(blobs, BlobKind.TABLE))])
    answers = job.services.plans.plan_batch([job.plan_entry(1, blobs, job.check(blobs, BlobKind.PLAN))])
    assert PlanState.WAITING == fine(answers)[0].state


def test_the_decision_comes_when_every_rank_is_in(job: Job) -> None:
    """Until then the answer is WAITING with the number of ranks that are in."""
    first, second = whole(job.model)
    [waiting] = job.plan(1, [first])
    assert (PlanState.WAITING, 1) == (waiting.state, waiting.planned_count)
    assert PlanState.WAITING == job.services.plans.decide(waiting.checkpoint_id, 0).state
    [complete] = job.plan(1, [second])
    assert (PlanState.WAITING, 2) == (complete.state, complete.planned_count)
    assert PlanState.DECIDED == job.services.plans.decide(waiting.checkpoint_id, 0).state


def test_every_item_is_written_by_exactly_one_rank(job: Job) -> None:
    """The drops are those of ``shardbook.core.planning``, as bits over the items as sent."""
    drops = job.decide(1)
    plans = [job.model.plan(rank) for rank in range(2)]
    expected = decide(plans, np.arange(2))
    item_count = plans[0].item_count
    unpacked = [np.unpackbits(np.frombuffer(drop, np.uint8), count=item_count).astype(bool) for drop in drops]
    assert [drop.tolist() for drop in expected] == [drop.tolist() for drop in unpacked]
    assert 2 == sum(drop.sum() for drop in unpacked)


def test_a_rank_that_drops_nothing_gets_no_bits(job_of_one: Job) -> None:
    """Empty means 0 everywhere."""
    assert [b""] == job_of_one.decide(1)


def test_asking_again_after_the_decision_answers_at_once(job: Job) -> None:
    """Plans are idempotent: the same plan again is how a rank asks again."""
    drops = job.decide(1)
    answers = job.plan(1, whole(job.model))
    assert [(PlanState.DECIDED, drop) for drop in drops] == [(answer.state, answer.drop) for answer in answers]


def test_a_restarted_server_decides_the_same(job: Job, database: Database) -> None:
    """Nothing of a decision lives in memory only: it is a function of the stored plans."""
    drops = job.decide(1)
    restarted = build_services(database)
    [answer, _] = fine(restarted.plans.plan_batch([job.plan_entry(1, blobs) for blobs in whole(job.model)]))
    assert drops == [restarted.plans.decide(answer.checkpoint_id, rank).drop for rank in range(2)]


def test_save_to_lowest_rank_gives_replicas_to_the_lowest(job: Job) -> None:
    """The option of DCP's ``dedup_save_to_lowest_rank``."""
    entries = [
        replace(entry, submission=replace(entry.submission, save_to_lowest_rank=True))
        for entry in (
            job.plan_entry(1, blobs, job.check(blobs, BlobKind.TABLE, BlobKind.PLAN)) for blobs in whole(job.model)
        )
    ]
    checkpoint_id = fine(job.services.plans.plan_batch(entries))[0].checkpoint_id
    drops = [job.services.plans.decide(checkpoint_id, rank).drop for rank in range(2)]
    assert [b"", np.packbits([0, 0, 0, 1, 1]).tobytes()] == drops


def test_ranks_that_disagree_on_the_option_are_told(job: Job) -> None:
    """No decision is better than one that half of the ranks did not ask for."""
    first, second = (
        job.plan_entry(1, blobs, job.check(blobs, BlobKind.TABLE, BlobKind.PLAN)) for blobs in whole(job.model)
    )
    second = replace(second, submission=replace(second.submission, save_to_lowest_rank=True))
    checkpoint_id = fine(job.services.plans.plan_batch([first, second]))[0].checkpoint_id
    with pytest.raises(InvalidArgumentError) as caught:
        job.services.plans.decide(checkpoint_id, 0)
    assert ["save_to_lowest_rank"] == [violation.field for violation in caught.value.violations]


def test_a_rank_that_plans_otherwise_is_refused_alone(job: Job) -> None:
    """Other content for the same key is ALREADY_EXISTS; the rest of the batch is untouched."""
    first, second = whole(job.model)
    other = replace(whole(Model(2, sharded=2))[0], rank=0)
    job.plan(1, [first])
    verdicts = job.services.plans.plan_batch(
        [
            job.plan_entry(1, other, job.check(other, BlobKind.TABLE, BlobKind.PLAN)),
            job.plan_entry(1, second, job.check(second, BlobKind.TABLE, BlobKind.PLAN)),
        ]
    )
    assert isinstance(verdicts[0], AlreadyExistsError)
    assert isinstance(verdicts[1], PlanAnswer)
    assert 2 == verdicts[1].planned_count


def test_of_two_unlike_plans_in_one_batch_the_first_counts(job: Job) -> None:
    """Being in the same batch makes no difference."""
    first = whole(job.model)[0]
    other = whole(Model(2, sharded=2))[0]
    verdicts = job.services.plans.plan_batch(
        [job.plan_entry(1, blobs, job.check(blobs, BlobKind.TABLE, BlobKind.PLAN)) for blobs in (first, other)]
    )
    assert [PlanAnswer, AlreadyExistsError] == [type(verdict) for verdict in verdicts]


def test_bad_entries_fail_alone(job: Job, other_job: Callable[[], Job]) -> None:
    """One transaction, one verdict an entry: unknown and fenced sessions beside a good one."""
    blobs = whole(job.model)[0]
    fenced = Job(job.services, job.model, part="optim")
    fenced.start()
    Job(job.services, job.model, part="optim").start(on_live=OnLive.TAKEOVER)
    stranger = other_job()
    stranger.session = 1
    nowhere = Job(job.services, job.model, run="projects/nowhere/runs/x", session=1)
    jobs = [stranger, job, fenced, nowhere]
    verdicts = job.services.plans.plan_batch(
        [one.plan_entry(1, blobs, one.check(blobs, BlobKind.TABLE, BlobKind.PLAN)) for one in jobs]
    )
    assert [SessionUnknownError, PlanAnswer, SessionFencedError, SessionUnknownError] == [
        type(verdict) for verdict in verdicts
    ]


def test_session_0_cannot_plan(job: Job) -> None:
    """It is for attempts that were made offline and are recorded afterwards."""
    job.session = 0
    [verdict] = job.services.plans.plan_batch([job.plan_entry(1, whole(job.model)[0])])
    assert isinstance(verdict, InvalidArgumentError)
    assert ["key.session"] == [violation.field for violation in verdict.violations]


@pytest.mark.parametrize("field", ["location.location", "location.prefix", "key.world_size"])
def test_what_the_first_call_said_of_the_attempt_holds(job: Job, field: str) -> None:
    """The first call opens the checkpoint; a later one that says otherwise names its field."""
    first, second = whole(job.model)
    job.plan(1, [first])
    entry = job.plan_entry(1, second)
    submission = entry.submission
    where = {
        "location.location": replace(submission, location=AttemptLocation("elsewhere:x", submission.location.prefix)),
        "location.prefix": replace(submission, location=AttemptLocation(submission.location.location, "other")),
        "key.world_size": replace(submission, key=replace(submission.key, world_size=3)),
    }
    [verdict] = job.services.plans.plan_batch([replace(entry, submission=where[field])])
    assert isinstance(verdict, InvalidArgumentError)
    assert [field] == [violation.field for violation in verdict.violations]


def test_a_closed_attempt_takes_no_plan_and_makes_no_decision(job: Job) -> None:
    """CHECKPOINT_CLOSED says what became of it."""
    [answer] = job.plan(1, whole(job.model)[:1])
    job.services.commits.abort(job.key(1), "node lost")
    [verdict] = job.services.plans.plan_batch([job.plan_entry(1, whole(job.model)[1])])
    assert isinstance(verdict, CheckpointClosedError)
    assert {"state": "FAILED"} == verdict.metadata
    with pytest.raises(CheckpointClosedError, match="node lost"):
        job.services.plans.decide(answer.checkpoint_id, 0)


def test_deciding_for_an_unknown_attempt_is_not_found(job: Job) -> None:
    """The key comes from the answer to a plan."""
    with pytest.raises(NotFoundError):
        job.services.plans.decide(999, 0)


def test_a_save_after_the_decision_holds_every_item_once(job: Job) -> None:
    """The whole point: replicas are deduplicated, and the checkpoint is complete."""
    drops = job.decide(1)
    job.register(1, [blobs_of(job.model, rank, drop) for rank, drop in enumerate(drops)])
    info = job.commit(1)
    assert (4, 7, 1) == (info.tensor_count, info.chunk_count, info.bytes_entry_count)
    assert 6 * (32 + 1500) + 16 + 1500 + 900 == info.size_bytes
