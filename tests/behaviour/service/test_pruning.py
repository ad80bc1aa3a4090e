"""Pruning: stored policies, previews, and what is judged again at the deletion."""

from __future__ import annotations

import threading

import pytest

from shardbook.core.retention import KeepBest, RetentionPolicy
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook_server.service.aliases import AliasRequest
from shardbook_server.service.describing import Description
from shardbook_server.service.services import Services
from shardbook_server.service.views import CheckpointState, PruneView
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model, whole

RUN = "projects/llm/runs/8b/parts/-"
PART = "projects/llm/runs/8b/parts/default"
LAST = RetentionPolicy(keep_last=2)


def steps(services: Services) -> list[int]:
    """Steps that are there."""
    return [one.step for one in services.catalog.list_checkpoints(PART).items]


def unwanted(services: Services, policy: RetentionPolicy | None, parent: str = RUN) -> list[str]:
    """Names that would be deleted."""
    return [one.name for one in services.retention.preview(parent, policy, page_size=1000).items if not one.keep]


def prune(services: Services, policy: RetentionPolicy | None, names: list[str] | None = None) -> list[PruneView]:
    """Deletes what would be deleted."""
    wanted = unwanted(services, policy) if names is None else names
    return services.retention.prune(RUN, policy, wanted) if wanted else []


def test_a_preview_deletes_nothing_and_a_prune_what_it_said(job: Job) -> None:
    """With reasons, newest first; the same again answers the same."""
    services = job.services
    for step in range(1, 6):
        job.save(step)
    services.aliases.set(AliasRequest(f"{PART}/aliases/good", "llm/8b@2"))
    services.holds.hold("llm/8b@1", "eval", 60_000_000)
    seen = services.retention.preview(RUN, LAST).items
    assert [
        ("llm/8b@5", True, ("@latest", "one of the last 2")),
        ("llm/8b@4", True, ("one of the last 2",)),
        ("llm/8b@3", False, ("no rule keeps it",)),
        ("llm/8b@2", True, ("@good",)),
        ("llm/8b@1", True, ("held by eval",)),
    ] == [(one.ref, one.keep, one.reasons) for one in seen]
    assert [5, 4, 3, 2, 1] == steps(services)
    (done,) = prune(services, LAST)
    assert (False, ("no rule keeps it",)) == (done.keep, done.reasons)
    assert [5, 4, 2, 1] == steps(services)
    (again,) = prune(services, LAST, [done.name])
    assert (False, ("it was deleted before",)) == (again.keep, again.reasons)
    assert CheckpointState.DELETED is services.catalog.get_checkpoint(done.name).state


def test_what_something_keeps_by_now_stays(job: Job) -> None:
    """Judged again under the lock: an alias, a hold, lost data of a newer one, a commit since the preview."""
    services = job.services
    for step in range(1, 7):
        job.save(step)
    names = unwanted(services, LAST)
    assert 4 == len(names)
    services.aliases.set(AliasRequest(f"{PART}/aliases/good", "llm/8b@1"))
    services.holds.hold("llm/8b@2", "eval", 60_000_000)
    services.deletions.report_missing("llm/8b@5", missing=True)
    done = prune(services, LAST, names)
    assert [True, False, True, True] == [one.keep for one in done]
    assert [6, 5, 4, 2, 1] == steps(services)
    job.save(7)
    job.save(8)
    assert ["llm/8b@6.s1.a1", "llm/8b@5.s1.a1", "llm/8b@4.s1.a1"] == [
        f"llm/8b@{name.rpartition('/')[2]}" for name in unwanted(services, LAST)
    ]


def test_open_and_only_ones_stay(job: Job) -> None:
    """Whatever the policy is."""
    services = job.services
    never = RetentionPolicy(keep_every=1_000_000)
    job.save(1)
    job.register(2, whole(job.model)[:1])
    assert [] == unwanted(services, never)
    kept = {one.ref: one.reasons for one in services.retention.preview(RUN, never).items}
    assert {"llm/8b@2.s1.a1": ("it is not committed",), "llm/8b@1": ("@latest",)} == kept


def test_age_is_by_the_clock_of_the_database_where_that_saw_the_save(job: Job, clock: Clock) -> None:
    """A writer's clock may be an hour behind; of what was recorded after the fact nobody knows another."""
    behind_us = clock.now_us - 3_600_000_000
    job.record(1, recovered=False, write_time_us=behind_us)
    job.record(2, recovered=True, write_time_us=behind_us)
    job.record(3, recovered=True, write_time_us=clock.now_us)
    job.save(4)
    newer = RetentionPolicy(newer_than_s=60)
    assert [f"{PART}/checkpoints/2.s1.a1"] == unwanted(job.services, newer)
    clock.advance(61)
    assert [f"{PART}/checkpoints/{step}.s1.a1" for step in (3, 2, 1)] == unwanted(job.services, newer)


def test_policies_are_stored_by_part_and_run(job: Job, services: Services, clock: Clock) -> None:
    """A part's own counts before the run's; without any there is nothing to prune by."""
    job.save(1)
    other = Job(services, Model(2), part="optim")
    other.start()
    for step in (1, 2, 3):
        other.save(step)
    retention = services.retention
    with pytest.raises(FailedPreconditionError, match="`shardbook policy llm/8b --keep-last 5`") as refused:
        retention.preview(RUN, None)
    assert "NO_POLICY" == refused.value.reason
    assert None is retention.get_policy(RUN).policy
    best = RetentionPolicy(keep_best=(KeepBest("loss", 2, largest=True),), newer_than_s=60)
    assert best == retention.set_policy(RUN, best).policy
    optim = "projects/llm/runs/8b/parts/optim"
    assert (best, True) == (retention.get_policy(optim).policy, retention.get_policy(optim).is_inherited)
    retention.set_policy(optim, LAST)
    assert (LAST, False) == (retention.get_policy(optim).policy, retention.get_policy(optim).is_inherited)
    assert clock.now_us == retention.get_policy(RUN).update_time_us
    assert ["llm/8b:optim@1"] == [one.ref for one in retention.preview(RUN, None).items if not one.keep]
    retention.set_policy(RUN, RetentionPolicy())
    assert ["llm/8b:optim@1"] == [one.ref for one in retention.preview(RUN, None).items if not one.keep]
    with pytest.raises(FailedPreconditionError):
        retention.preview(PART, None)
    with pytest.raises(NotFoundError):
        retention.set_policy("projects/llm/runs/8b/parts/none", LAST)


def test_previews_come_in_pages(job: Job) -> None:
    """Of one moment's checkpoints: what is committed between two pages shifts nothing."""
    for step in range(1, 8):
        job.save(step)
    retention = job.services.retention
    first = retention.preview(RUN, LAST, page_size=3)
    job.save(8)
    second = retention.preview(RUN, LAST, page_size=3, page_token=first.next_page_token)
    third = retention.preview(RUN, LAST, page_size=3, page_token=second.next_page_token)
    refs = [one.ref for page in (first, second, third) for one in page.items]
    assert ([f"llm/8b@{step}" for step in range(7, 0, -1)], "") == (refs, third.next_page_token)
    with pytest.raises(InvalidArgumentError):
        retention.preview(RUN, RetentionPolicy(keep_last=3), page_size=3, page_token=first.next_page_token)


def test_requests_that_make_no_sense_name_the_field(job: Job) -> None:
    """No rule, no names, names of other parts, several runs."""
    job.save(1)
    retention = job.services.retention
    name = f"{PART}/checkpoints/1.s1.a1"
    for field, parent, policy, names in (
        ("policy", RUN, RetentionPolicy(), [name]),
        ("names", RUN, LAST, []),
        ("names[1]", RUN, LAST, [name, "llm/other@1"]),
        ("names[0]", "projects/llm/runs/8b/parts/optim", LAST, [name]),
        ("name", "projects/llm/runs/-/parts/-", LAST, [name]),
    ):
        with pytest.raises(InvalidArgumentError) as refused:
            retention.prune(parent, policy, names)
        assert field == refused.value.violations[0].field


def test_metrics_and_steps_decide(job: Job) -> None:
    """As the judge has it, with metrics as they are now."""
    services = job.services
    for step in range(1, 7):
        job.register(step, whole(job.model))
        services.commits.commit(job.key(step), Description(metrics={"loss": abs(step - 2.5)}))
    policy = RetentionPolicy(keep_every=5, keep_best=(KeepBest("loss", 2),))
    prune(services, policy)
    assert [6, 5, 3, 2] == steps(services)


def test_saves_go_on_beside_prunes(job: Job) -> None:
    """Every commit is answered, what is pruned was not wanted, and latest is what was saved last."""
    services, done = job.services, threading.Event()
    failures: list[BaseException] = []
    job.save(1)

    def keep_pruning() -> None:
        try:
            while not done.is_set():
                names = unwanted(services, LAST)
                if names:
                    prune(services, LAST, names)
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    pruner = threading.Thread(target=keep_pruning)
    pruner.start()
    try:
        for step in range(2, 16):
            assert CheckpointState.COMMITTED is job.save(step).state
    finally:
        done.set()
        pruner.join()
    assert [] == failures
    assert 15 == services.catalog.get_checkpoint("llm/8b@latest").step
    prune(services, LAST)
    assert [15, 14] == steps(services)
    every = services.catalog.list_checkpoints(PART, show_all=True).items
    assert dict.fromkeys(range(1, 14), CheckpointState.DELETED) == {one.step: one.state for one in every[2:]}
