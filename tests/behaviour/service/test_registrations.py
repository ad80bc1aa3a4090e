"""RegisterShards and ReportFailure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from shardbook.core.columns import frame, unframe
from shardbook.core.extents import Extents, encode_extents, encode_volatile
from shardbook.core.structure import BlobKind
from shardbook.errors import (
    AlreadyExistsError,
    CheckpointClosedError,
    InvalidArgumentError,
    RankFailedError,
    SessionFencedError,
    SessionUnknownError,
    ShardbookError,
)
from shardbook_server.service.registration import RegistrationEntry
from shardbook_server.service.services import build_services
from shardbook_server.service.types import BlobRef, FailureReport, OnLive, RankFailure
from shardbook_server.service.views import CheckpointState, RegistrationAnswer
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, RankBlobs, whole


def send(job: Job, *entries: RegistrationEntry) -> list[RegistrationAnswer | ShardbookError]:
    """Registers a batch."""
    return job.services.registrations.register_batch(entries)


def count(job: Job, step: int) -> int:
    """Ranks that are registered."""
    return job.services.progress.progress(job.key(step)).counts.registered_count


def test_a_structure_the_server_lacks_is_asked_for(job: Job) -> None:
    """The reply lists it by digest, with what it refers to as far as the server can tell."""
    blobs = whole(job.model)[0]
    [answer] = send(job, job.entry(1, blobs))
    assert RegistrationAnswer((BlobRef(BlobKind.STRUCTURE, blobs.structure.digest),)) == answer
    [answer] = send(job, job.entry(1, blobs, job.check(blobs, BlobKind.STRUCTURE)))
    assert isinstance(answer, RegistrationAnswer)
    assert [BlobKind.PLAN, BlobKind.STRUCTURE] == [ref.kind for ref in answer.unknown]
    assert 0 == count(job, 1)


def test_a_known_structure_needs_a_digest_and_extents_only(job: Job, database: Database) -> None:
    """The second save sends no structure, and neither does the first after a restart of the server."""
    ranks = whole(job.model)
    job.register(1, ranks)
    restarted = replace(job, services=build_services(database))
    for step, one in ((2, job), (3, restarted)):
        answers = send(one, *(one.entry(step, blobs) for blobs in ranks))
        assert [()] * 2 == [answer.unknown for answer in answers if isinstance(answer, RegistrationAnswer)]


def test_structures_are_apart_between_projects(job: Job) -> None:
    """Content addressing is per project: a digest learned elsewhere opens nothing."""
    ranks = whole(job.model)
    job.register(1, ranks)
    stranger = Job(job.services, job.model, run="projects/other/runs/8b")
    stranger.start()
    [answer] = send(stranger, stranger.entry(1, ranks[0]))
    assert isinstance(answer, RegistrationAnswer)
    assert [BlobKind.STRUCTURE] == [ref.kind for ref in answer.unknown]


def test_the_same_registration_again_is_fine(job: Job) -> None:
    """Also when its payload was compressed otherwise: the content counts."""
    first, second = whole(job.model)
    job.register(1, [first, second])
    raw = b"\0" + unframe(first.extents)
    again = replace(first, extents=raw)
    answers = send(job, job.entry(1, first), job.entry(1, again), job.entry(1, second))
    assert [RegistrationAnswer] * 3 == [type(answer) for answer in answers]
    assert 2 == count(job, 1)


def test_other_content_is_refused_alone(job: Job) -> None:
    """The first registration of a rank counts; the error names the rank."""
    first, second = whole(job.model)
    other = replace(first, extents=encode_extents(Extents(np.array([901]))))
    job.register(1, [first])
    verdicts = send(job, job.entry(1, other), job.entry(1, second, job.check(second)))
    assert [AlreadyExistsError, RegistrationAnswer] == [type(verdict) for verdict in verdicts]
    assert "rank 0" in str(verdicts[0])


def test_of_unlike_registrations_in_one_batch_the_first_counts(job: Job) -> None:
    """Retries of one rank may land in one batch."""
    first = whole(job.model)[0]
    checked = job.check(first)
    other = replace(first, extents=encode_extents(Extents(np.array([901]))))
    verdicts = send(job, job.entry(1, first, checked), job.entry(1, other, checked), job.entry(1, first, checked))
    assert [RegistrationAnswer, AlreadyExistsError, RegistrationAnswer] == [type(verdict) for verdict in verdicts]


def test_the_same_registration_after_the_commit_is_fine(job: Job) -> None:
    """A rank whose answer was lost asks again when the coordinator has already committed."""
    ranks = whole(job.model)
    job.register(1, ranks)
    job.commit(1)
    other = replace(ranks[0], extents=encode_extents(Extents(np.array([901]))))
    verdicts = send(job, job.entry(1, ranks[1]), job.entry(1, other))
    assert [RegistrationAnswer, AlreadyExistsError] == [type(verdict) for verdict in verdicts]


def test_a_closed_attempt_takes_no_registration(job: Job) -> None:
    """CHECKPOINT_CLOSED says what became of it and why."""
    first, second = whole(job.model)
    job.register(1, [first])
    job.services.commits.abort(job.key(1), "out of time")
    [verdict] = send(job, job.entry(1, second, job.check(second)))
    assert isinstance(verdict, CheckpointClosedError)
    assert "out of time" in verdict.message


def test_bad_entries_fail_alone(job: Job, other_job: Callable[[], Job]) -> None:
    """A fenced, an unknown and a malformed registration beside a good one."""
    first, second = whole(job.model)
    fenced = Job(job.services, job.model, part="optim")
    fenced.start()
    Job(job.services, job.model, part="optim").start(on_live=OnLive.TAKEOVER)
    stranger = other_job()
    stranger.session = 1
    malformed = replace(second, extents=b"\7nonsense")
    verdicts = send(
        job,
        fenced.entry(1, first, fenced.check(first)),
        stranger.entry(1, first),
        job.entry(1, malformed),
        job.entry(1, first, job.check(first)),
    )
    assert [SessionFencedError, SessionUnknownError, InvalidArgumentError, RegistrationAnswer] == [
        type(verdict) for verdict in verdicts
    ]
    assert 1 == count(job, 1)


def test_a_fenced_session_stores_nothing(job: Job, other_job: Callable[[], Job]) -> None:
    """Not even blobs: a straggler must not fill the database."""
    blobs = whole(Model(2, sharded=5))[0]
    other_job().start(on_live=OnLive.TAKEOVER)
    [verdict] = send(job, job.entry(1, blobs, job.check(blobs)))
    assert isinstance(verdict, SessionFencedError)
    newer = other_job()
    newer.start(on_live=OnLive.TAKEOVER)
    [answer] = send(newer, newer.entry(1, blobs))
    assert isinstance(answer, RegistrationAnswer)
    assert answer.unknown


def volatile_of(entry_count: int) -> bytes:
    """Properties of so many entries, all requiring gradients."""
    return encode_volatile(np.ones(entry_count, bool), np.zeros(entry_count, bool))


@pytest.mark.parametrize(
    ("extents", "volatile", "field"),
    [
        (encode_extents(Extents(np.array([1, 2]))), b"", "registration.extents"),
        (encode_extents(Extents()), b"", "registration.extents"),
        (encode_extents(Extents(lengths=np.array([1]), starts=np.array([0]))), b"", "registration.extents"),
        (b"", b"", "registration.extents"),
        (frame(b"\2\0\0"), b"", "registration.extents"),
        (encode_extents(Extents(np.array([900]))), volatile_of(3), "registration.volatile_properties"),
        (encode_extents(Extents(np.array([900]))), b"\1\1", "registration.volatile_properties"),
    ],
)
def test_payloads_that_do_not_fit_the_structure_name_their_field(
    job: Job, extents: bytes, volatile: bytes, field: str
) -> None:
    """INVALID_ARGUMENT with the path, and nothing was stored."""
    blobs = whole(job.model)[0]
    entry = job.entry(1, blobs, job.check(blobs))
    shard = replace(entry.registration.registration, extents=extents, volatile_properties=volatile)
    [verdict] = send(job, replace(entry, registration=replace(entry.registration, registration=shard)))
    assert isinstance(verdict, InvalidArgumentError)
    assert [field] == [violation.field for violation in verdict.violations]


def test_volatile_properties_are_kept_with_the_extents(job: Job) -> None:
    """They change between a sync and an async save, and must not make another structure."""
    ranks = whole(job.model)
    entries = [job.entry(1, blobs, job.check(blobs)) for blobs in ranks]
    entries = [
        replace(
            entry,
            registration=replace(
                entry.registration,
                registration=replace(entry.registration.registration, volatile_properties=volatile_of(5)),
            ),
        )
        for entry in entries
    ]
    assert all(isinstance(answer, RegistrationAnswer) for answer in send(job, *entries))
    assert job.commit(1).structure_digest == job.save(2).structure_digest


def failure(job: Job, rank: int = 1, reason: str = "No space left on device") -> FailureReport:
    """A rank's report of ENOSPC."""
    return FailureReport(job.key(1), job.location(1), RankFailure(rank, "node1", "write", reason))


def test_a_reported_failure_fails_the_commit_at_once(job: Job) -> None:
    """RANK_FAILED with rank, host and reason, not RANKS_MISSING at the deadline."""
    job.register(1, whole(job.model)[:1])
    assert CheckpointState.FAILED == job.services.registrations.report_failure(failure(job))
    with pytest.raises(RankFailedError, match="rank 1 on node1 failed to write: No space left on device") as caught:
        job.commit(1)
    assert {"rank": "1", "host": "node1", "phase": "write"} == caught.value.metadata
    progress = job.services.progress.progress(job.key(1))
    assert RankFailure(1, "node1", "write", "No space left on device") == progress.failure


def test_the_first_failure_counts(job: Job) -> None:
    """Others follow from it, as a rule; reporting again is fine."""
    report = job.services.registrations.report_failure
    assert [CheckpointState.FAILED] * 3 == [report(failure(job)), report(failure(job, 0)), report(failure(job))]
    assert 1 == job.services.progress.progress(job.key(1)).failure.rank  # type: ignore[union-attr]


def test_a_failure_before_anything_else_opens_the_attempt(job: Job) -> None:
    """The coordinator then hears of it instead of waiting for a rank that never plans."""
    job.services.registrations.report_failure(failure(job))
    assert CheckpointState.FAILED == job.services.progress.progress(job.key(1)).counts.state


def test_a_failure_after_the_commit_changes_nothing(job: Job) -> None:
    """COMMITTED metadata never changes."""
    job.save(1)
    assert CheckpointState.COMMITTED == job.services.registrations.report_failure(failure(job))


def test_a_strange_reason_is_kept_printable(job: Job) -> None:
    """A failing rank must not be refused because its message holds a strange character."""
    job.services.registrations.report_failure(failure(job, reason="bad \0 \ud800 name\n" + "x" * 5000))
    kept = job.services.catalog.get_checkpoint("llm/8b@1.s1.a1").failure
    assert "bad \\x00 \\ud800 name\n" in kept
    assert len(kept) < 2100


def test_a_fenced_rank_cannot_fail_the_new_sessions_attempt(job: Job, other_job: Callable[[], Job]) -> None:
    """The key of an attempt names its session."""
    other_job().start(on_live=OnLive.TAKEOVER)
    with pytest.raises(SessionFencedError):
        job.services.registrations.report_failure(failure(job))


def test_hosts_of_missing_ranks_are_known_when_they_planned(job: Job) -> None:
    """Progress names the ranks that are not registered yet."""
    blobs: list[RankBlobs] = whole(job.model)
    job.plan(1, blobs[1:])
    missing = job.services.progress.progress(job.key(1)).missing
    assert [(0, ""), (1, "node1")] == [(one.rank, one.host) for one in missing]


def test_a_rank_beyond_the_slices_of_an_attempt_is_refused(job: Job) -> None:
    """RecordCheckpoint may open an attempt with fewer registrations than ranks."""
    ranks = whole(job.model)
    checked = job.services.blobs.check("llm", [upload for blobs in ranks for upload in blobs.uploads()])
    request = job.record_request(1, ranks[:1], recovered=False, complete=False, registration_count=1)
    assert () == job.services.records.record(request, checked).unknown
    [verdict] = send(job, job.entry(1, ranks[1]))
    assert isinstance(verdict, InvalidArgumentError)
    assert ["registration.rank"] == [violation.field for violation in verdict.violations]
