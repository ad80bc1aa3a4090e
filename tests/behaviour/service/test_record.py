"""RecordCheckpoint: whole attempts from one process, in time or after the fact."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from shardbook.core.extents import Extents, encode_extents
from shardbook.core.head import MetadataHeader, encode_metadata_header
from shardbook.core.structure import BlobKind
from shardbook.errors import (
    AlreadyExistsError,
    CheckpointClosedError,
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidGeometryError,
    NotFoundError,
    RanksMissingError,
    SessionFencedError,
)
from shardbook_server.service.blobs import CheckedBlobs
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointState, HeaderView
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import RUN, Job, Model, RankBlobs, whole


def uploads(job: Job, ranks: list[RankBlobs]) -> CheckedBlobs:
    """All blobs of ranks, checked."""
    return job.services.blobs.check("llm", [upload for blobs in ranks for upload in blobs.uploads()])


def offline(services: Services, **changes: object) -> Job:
    """A job that never reached the server."""
    return replace(Job(services, Model(2)), **changes)  # type: ignore[arg-type]


def test_an_offline_attempt_is_recorded_as_session_0(services: Services) -> None:
    """With its incarnation in the name; the run is made when it is new."""
    job = offline(services, incarnation=bytes.fromhex("0123456789ab") + b"x" * 10)
    info = job.record(5)
    assert "projects/llm/runs/8b/parts/default/checkpoints/5.s0.a1.0123456789ab" == info.name
    assert (True, CheckpointState.COMMITTED, True, "llm/8b@5") == (info.live, info.state, info.recovered, info.ref)
    find = services.catalog.get_checkpoint
    assert [info] * 3 == [find(info.name), find("llm/8b@5"), find("llm/8b@latest")]


def test_recording_again_returns_the_same_checkpoint(services: Services) -> None:
    """Sync may run twice."""
    job = offline(services)
    assert job.record(5) == job.record(5)


def test_an_attempt_may_come_in_parts(services: Services) -> None:
    """All but the last call leave ``complete`` unset; parts may repeat."""
    job = offline(services)
    ranks = whole(job.model)
    record, checked = services.records.record, uploads(job, ranks)
    first = job.record_request(5, ranks[:1], complete=False)
    assert None is record(first, checked).checkpoint
    assert None is record(first, checked).checkpoint
    answer = record(job.record_request(5, ranks[1:]), checked)
    assert answer.checkpoint is not None
    assert CheckpointState.COMMITTED == answer.checkpoint.state


def test_an_incomplete_recording_is_not_committed(services: Services) -> None:
    """RANKS_MISSING, as for any commit."""
    job = offline(services)
    ranks = whole(job.model)
    with pytest.raises(RanksMissingError):
        services.records.record(job.record_request(5, ranks[:1]), uploads(job, ranks))


def test_unknown_blobs_are_asked_for_and_nothing_is_stored(services: Services) -> None:
    """Not even an open attempt."""
    job = offline(services)
    ranks = whole(job.model)
    answer = services.records.record(job.record_request(5, ranks))
    assert [(BlobKind.STRUCTURE, blobs.structure.digest) for blobs in ranks] == sorted(
        [(ref.kind, ref.digest) for ref in answer.unknown],
        key=lambda pair: [blobs.structure.digest for blobs in ranks].index(pair[1]),
    )
    with pytest.raises(NotFoundError):
        services.catalog.get_checkpoint(str(job.key(5).checkpoint_name))


@pytest.mark.parametrize("change", ["extents", "structure"])
def test_other_content_for_a_recorded_attempt_is_refused(services: Services, change: str) -> None:
    """The same key means the same bytes, for ever."""
    job = offline(services)
    job.record(5)
    ranks = whole(job.model, bytes_length=901) if change == "extents" else whole(replace(job.model, sharded=4))
    with pytest.raises(AlreadyExistsError) as caught:
        services.records.record(job.record_request(5, ranks), uploads(job, ranks))
    assert ["registrations[0]"] == [violation.field for violation in caught.value.violations]


def test_a_fenced_attempt_can_be_recovered_and_does_not_touch_the_session(
    job: Job, other_job: Callable[[], Job]
) -> None:
    """A save outlives the service: sync brings it in, also after a newer session has started."""
    job.save(10)
    newer = other_job()
    newer.start(on_live=OnLive.TAKEOVER)
    newer.save(15)
    info = job.record(20)
    assert (1, True, True) == (info.session, info.live, info.recovered)
    assert 15 == job.services.catalog.get_checkpoint("llm/8b@latest").step
    assert CheckpointState.COMMITTED == newer.save(25).state
    assert 25 == job.services.catalog.get_checkpoint("llm/8b@latest").step


def test_without_recovered_the_fence_holds(job: Job, other_job: Callable[[], Job]) -> None:
    """``recovered`` is the one way past it."""
    other_job().start(on_live=OnLive.TAKEOVER)
    ranks = whole(job.model)
    with pytest.raises(SessionFencedError):
        job.services.records.record(job.record_request(20, ranks, recovered=False), uploads(job, ranks))


def test_a_step_that_a_later_session_holds_is_not_recorded(job: Job, other_job: Callable[[], Job]) -> None:
    """Refused before anything is stored; its files can still be loaded by path."""
    newer = other_job()
    newer.start(on_live=OnLive.TAKEOVER)
    newer.save(20)
    with pytest.raises(FailedPreconditionError) as caught:
        job.record(20)
    assert "STEP_SUPERSEDED" == caught.value.reason
    with pytest.raises(NotFoundError):
        job.services.catalog.get_checkpoint("llm/8b@20.s1")


def test_a_recovered_attempt_of_the_current_session_moves_latest(job: Job) -> None:
    """The service was away for one save; nobody else has started meanwhile."""
    job.save(10)
    job.record(20)
    assert 20 == job.services.catalog.get_checkpoint("llm/8b@latest").step
    job.record(15)
    assert 20 == job.services.catalog.get_checkpoint("llm/8b@latest").step


def test_sessions_that_the_catalogue_has_forgotten_move_latest(services: Services) -> None:
    """It was put back, or is a new one: directories prove what was later, in whatever order they are synced."""
    lost = [Job(services, Model(2), session=session) for session in (1, 2)]
    find = services.catalog.get_checkpoint
    for which, step, latest in ((0, 10, (1, 10)), (1, 8, (2, 8)), (0, 12, (2, 8)), (1, 9, (2, 9)), (1, 7, (2, 9))):
        lost[which].record(step)
        found = find("llm/8b@latest")
        assert latest == (found.session, found.step)
    later = Job(services, Model(2))
    assert 3 == later.start().session
    assert (2, 9) == (find("llm/8b@latest").session, find("llm/8b@latest").step)
    later.save(5)
    lost[1].record(20)
    assert (3, 5) == (find("llm/8b@latest").session, find("llm/8b@latest").step)


def test_records_of_one_step_at_the_same_moment_leave_one_live(database: Database, services: Services) -> None:
    """Of three sessions the last has the step and ``latest``, whichever is recorded first, through two servers."""
    jobs = [Job(services if at else build_services(database, lease_ttl_s=60), Model(2)) for at in range(3)]
    for job in jobs:
        job.start(on_live=OnLive.TAKEOVER)
    for step in range(1, 7):
        with ThreadPoolExecutor(3) as pool:
            for ended in [pool.submit(job.record, step) for job in jobs]:
                error = ended.exception(timeout=60)
                assert error is None or getattr(error, "reason", "") == "STEP_SUPERSEDED", error
        listed = services.catalog.list_checkpoints(f"{RUN}/parts/default", show_all=True).items
        assert [3] == [one.session for one in listed if one.step == step and one.live]
        found = services.catalog.get_checkpoint("llm/8b@latest")
        assert (3, step) == (found.session, found.step)


def test_offline_attempts_move_latest_until_a_session_exists(services: Services, job: Job) -> None:
    """Once a numbered session exists they are history."""
    offline(services).record(50)
    with pytest.raises(NotFoundError):
        services.catalog.get_checkpoint("llm/8b@latest")
    alone = offline(services, run="projects/llm/runs/alone")
    alone.record(50)
    alone.record(40)
    assert 50 == services.catalog.get_checkpoint("llm/alone@latest").step


def test_offline_incarnations_are_ordered_by_time(services: Services) -> None:
    """A restart while offline: what was written later is what the step means, whenever it is synced."""
    old, new = offline(services), offline(services)
    newer = new.record(5, write_time_us=2_000_000)
    older = old.record(5, write_time_us=1_000_000)
    find = services.catalog.get_checkpoint
    assert [newer.name] * 2 == [find("llm/8b@5").name, find("llm/8b@latest").name]
    assert not older.live


@pytest.mark.parametrize("complete", [True, False])
def test_recovery_closes_an_attempt_that_was_left_open(
    job: Job, other_job: Callable[[], Job], *, complete: bool
) -> None:
    """Some ranks registered before the service went away; what they said agrees with what is on storage."""
    ranks = whole(job.model)
    job.register(20, ranks[:1])
    if complete:
        other_job().start(on_live=OnLive.TAKEOVER)
        assert CheckpointState.EXPIRED == job.services.progress.progress(job.key(20)).counts.state
    assert CheckpointState.COMMITTED == job.record(20).state


def test_recovery_refuses_an_open_attempt_with_other_content(job: Job) -> None:
    """Then one of the two is wrong, and nobody can tell which."""
    job.register(20, whole(job.model, bytes_length=901)[:1])
    with pytest.raises(AlreadyExistsError):
        job.record(20)


def test_recovery_refuses_a_failed_attempt(job: Job) -> None:
    """Its own writers gave it up."""
    job.register(20, whole(job.model)[:1])
    job.services.commits.abort(job.key(20), "given up")
    with pytest.raises(CheckpointClosedError):
        job.record(20)


def test_the_coordinator_may_record_for_a_rank_without_the_service(job: Job) -> None:
    """One rank had no route: the coordinator found its record on storage and sends the whole, in the live session."""
    ranks = whole(job.model)
    job.register(20, ranks[:1])
    answer = job.services.records.record(job.record_request(20, ranks, recovered=False), uploads(job, ranks))
    assert answer.checkpoint is not None
    assert (True, False) == (answer.checkpoint.live, answer.checkpoint.recovered)


def test_wrong_geometry_is_refused_as_in_a_save(services: Services) -> None:
    """History has to be whole too."""
    job = offline(services, model=Model(2, hole=1))
    with pytest.raises(InvalidGeometryError):
        job.record(5)
    assert CheckpointState.FAILED == services.progress.progress(job.key(5)).counts.state


def test_a_forgotten_session_number_is_not_handed_out_again(services: Services) -> None:
    """After a restore from an older backup, sync brings attempts of sessions that the database has forgotten."""
    offline(services, session=7).record(5)
    assert 8 == Job(services, Model(2)).start().session


def test_an_import_has_slices_instead_of_ranks(services: Services) -> None:
    """``registration_count`` may differ from ``world_size``, and the metadata's header is kept."""
    job = offline(services)
    ranks = whole(job.model)
    header = encode_metadata_header(MetadataHeader(version="1.0.0"))
    request = job.record_request(5, ranks, metadata_header=header)
    request = replace(request, key=replace(request.key, world_size=16))
    answer = services.records.record(request, uploads(job, ranks))
    assert answer.checkpoint is not None
    assert 16 == answer.checkpoint.world_size
    first = next(services.metadata.get_metadata("llm/8b@5"))
    assert isinstance(first, HeaderView)
    assert header == first.metadata_header


@pytest.mark.parametrize(
    ("changes", "extents", "field"),
    [
        ({"registration_count": 3}, None, "registration_count"),
        ({"metadata_header": b"\0{}"}, None, "metadata_header"),
        ({}, b"nonsense", "registrations[0].extents"),
        ({}, encode_extents(Extents(np.array([1, 2]))), "registrations[0].extents"),
    ],
)
def test_bad_parts_name_their_field(
    services: Services, changes: dict[str, object], extents: bytes | None, field: str
) -> None:
    """INVALID_ARGUMENT with the path in the request."""
    job = offline(services)
    ranks = whole(job.model)
    services.records.record(job.record_request(5, ranks[:1], complete=False), uploads(job, ranks))
    bad = ranks[0] if extents is None else replace(ranks[0], extents=extents)
    with pytest.raises(InvalidArgumentError) as caught:
        services.records.record(job.record_request(5, [bad], complete=False, **changes))
    assert [field] == [violation.field for violation in caught.value.violations]


def test_session_0_is_for_recovered_attempts(services: Services) -> None:
    """A live save has a session."""
    job = offline(services)
    with pytest.raises(InvalidArgumentError) as caught:
        job.record_request(5, whole(job.model), recovered=False)
    assert ["key.session"] == [violation.field for violation in caught.value.violations]
