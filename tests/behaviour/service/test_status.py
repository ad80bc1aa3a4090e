"""Where the saves of a run stand: who is missing, since when, and what was committed last."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook_server.service.describing import Changes
from shardbook_server.service.registration import RegistrationEntry
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.status import bounds_of, ranks_by_host
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointInfo
from shardbook_server.storage.database import Database
from tests.behaviour.service.conftest import LEASE_TTL_S, Clock
from tests.behaviour.service.saves import RUN, Job, Model, fine, whole


def test_an_open_attempt_names_who_is_there_and_who_is_missing(services: Services, clock: Clock) -> None:
    """Ranks that have not planned, then ranks that have not registered, with the hosts that plans told."""
    job = Job(services, Model(3))
    job.start(job_id="slurm-1")
    ranks = whole(job.model)
    job.plan(10, ranks[:2])
    [part] = services.status.run_status(RUN).parts
    [attempt] = part.open
    assert ((2, 0, 3), (2,), None) == (
        (attempt.counts.planned_count, attempt.counts.registered_count, attempt.counts.world_size),
        attempt.unplanned,
        attempt.plan_time_us,
    )
    assert [(0, "node0"), (1, "node1"), (2, "")] == [(one.rank, one.host) for one in attempt.missing]
    clock.advance(5)
    job.decide(10)
    planned_us = clock.now_us
    clock.advance(30)
    job.register(10, ranks[:1])
    status = services.status.run_status(RUN)
    [attempt] = status.parts[0].open
    assert (clock.now_us, planned_us, ()) == (status.read_time_us, attempt.plan_time_us, attempt.unplanned)
    assert [(0, "node0")] == [(one.rank, one.host) for one in attempt.registered]
    assert [(1, "node1"), (2, "node2")] == [(one.rank, one.host) for one in attempt.missing]


def test_ranks_are_named_up_to_a_limit_and_counted_in_full(services: Services) -> None:
    """A world of thousands is no answer of thousands."""
    job = Job(services, Model(120, sharded=1))
    job.start()
    job.register(10, whole(job.model)[:60])
    [attempt] = services.status.run_status(RUN).parts[0].open
    assert (list(range(50)), list(range(60, 110))) == (
        [one.rank for one in attempt.registered],
        [one.rank for one in attempt.missing],
    )
    assert (60, 0, 50) == (attempt.counts.registered_count, attempt.counts.planned_count, len(attempt.unplanned))


def test_missing_ranks_are_told_in_ranges_by_host(services: Services) -> None:
    """A stuck save of 16,384 ranks is a few lines: at most 50 hosts, at most 20 ranges each, and how many there are."""
    hosts = {rank: f"node{rank // 8}" for rank in range(16_384)}
    some = ranks_by_host(np.array([0, 1, 2, 7, 8, 12, 16_383]), hosts)
    assert [("node0", 4, (0, 2, 7, 7)), ("node1", 2, (8, 8, 12, 12)), ("node2047", 1, (16_383, 16_383))] == [
        (one.host, one.rank_count, one.bounds) for one in some
    ]
    [unknown] = ranks_by_host(np.arange(0, 16_384, 2), {})
    assert ("", 8192, 40) == (unknown.host, unknown.rank_count, len(unknown.bounds))
    assert () == bounds_of(np.array([], np.int64))
    job = Job(services, Model(120, sharded=1))
    job.start()
    job.plan(10, whole(job.model)[:100])
    job.register(10, whole(job.model)[:1])
    [attempt] = services.status.run_status(RUN).parts[0].open
    assert (100, 50) == (attempt.missing_host_count, len(attempt.missing_hosts))
    assert (100, 119) == attempt.unplanned_bounds


def test_the_time_of_planning_survives_a_restart(services: Services, database: Database, clock: Clock) -> None:
    """Rule: once a rank is registered, every replica tells the same times of phases, from what ranks said."""
    job = Job(services, Model(3))
    job.start()
    ranks = whole(job.model)
    job.plan(10, ranks)
    began_us = clock.now_us
    job.decide(10)
    clock.advance(60)
    for rank, phase_ms in ((0, (4000, 9000, 5)), (2, (5000, 7000, 6))):
        entry = job.entry(10, ranks[rank], job.check(ranks[rank]))
        registration = replace(entry.registration.registration, phase_ms=phase_ms)
        told_of = RegistrationEntry(replace(entry.registration, registration=registration), entry.blobs)
        fine(services.registrations.register_batch([told_of]))
    told = services.status.run_status(RUN).parts[0].open[0]
    restarted = build_services(database, lease_ttl_s=LEASE_TTL_S)
    [attempt] = restarted.status.run_status(RUN).parts[0].open
    assert told == attempt
    assert began_us + 5_000_000 == attempt.plan_time_us
    assert attempt.timing is not None
    assert [("plan", 5000, 2, "node2"), ("write", 9000, 0, "node0"), ("register", 6, 2, "node2")] == [
        (one.phase, one.slowest_ms, one.slowest_rank, one.slowest_host) for one in attempt.timing.phases
    ]


def listed(services: Services, saved: CheckpointInfo) -> CheckpointInfo:
    """A checkpoint as listings have it, with what is said of it."""
    every = services.catalog.list_checkpoints("projects/llm/runs/8b/parts/-").items
    return next(one for one in every if one.checkpoint_id == saved.checkpoint_id)


def test_the_last_commit_is_the_newest_whatever_is_open(services: Services, clock: Clock) -> None:
    """By (session, step): an abandoned branch with higher steps is not what was saved last."""
    first = Job(services, Model(2))
    first.start()
    first.save(30)
    clock.advance(10)
    second = Job(services, Model(2))
    second.start(on_live=OnLive.TAKEOVER)
    saved = second.save(20)
    services.descriptions.update("llm/8b@20", Changes({"stage": "eval"}, {"loss": 1.0}, "", ("labels", "metrics")))
    clock.advance(10)
    second.register(25, whole(second.model)[:1])
    [part] = services.status.run_status(RUN).parts
    assert part.last_commit == listed(services, saved)
    assert ["llm/8b@25.s2.a1"] == [attempt.checkpoint.ref for attempt in part.open]
    assert (1, None) == (part.open_count, part.last_failure)


def test_what_was_saved_offline_counts_by_when_it_was_written(services: Services, clock: Clock) -> None:
    """A save that sync records years later does not make a stuck run look alive; a fresh one does."""
    job = Job(services, Model(2))
    job.start()
    saved = job.save(10)
    offline = Job(services, Model(2))
    old_us = clock.now_us - 1_000_000_000
    offline.record(5, write_time_us=old_us)
    assert listed(services, saved) == services.status.run_status(RUN).parts[0].last_commit
    clock.advance(100)
    fresh = Job(services, Model(2)).record(15, write_time_us=clock.now_us)
    assert listed(services, fresh) == services.status.run_status(RUN).parts[0].last_commit


def test_an_attempt_that_failed_last_is_told(services: Services, clock: Clock) -> None:
    """Failed or expired, until something newer is saved."""
    job = Job(services, Model(2))
    job.start()
    job.save(10)
    job.register(20, whole(job.model)[:1])
    clock.advance(LEASE_TTL_S + 1)
    services.sessions.expire_leases()
    [part] = services.status.run_status(RUN).parts
    assert part.last_failure is not None
    assert ("llm/8b@20.s1.a1", "EXPIRED", 0) == (
        part.last_failure.ref,
        part.last_failure.state.name,
        part.open_count,
    )
    job.save(30)
    assert None is services.status.run_status(RUN).parts[0].last_failure


def test_parts_stand_apart(services: Services) -> None:
    """All of them, or the one that is asked for; what is not there is not found."""
    for part in ("optim", "weights"):
        job = Job(services, Model(1), part=part)
        job.start()
        job.save(10)
    assert ["optim", "weights"] == [one.part.part for one in services.status.run_status(RUN).parts]
    [one] = services.status.run_status(RUN, "weights").parts
    assert "weights" == one.part.part
    with pytest.raises(NotFoundError, match="llm/8b:rest"):
        services.status.run_status(RUN, "rest")
    with pytest.raises(NotFoundError):
        services.status.run_status("projects/llm/runs/other")
    for run, part in (("llm", ""), (RUN, "a/b")):
        with pytest.raises(InvalidArgumentError):
            services.status.run_status(run, part)
