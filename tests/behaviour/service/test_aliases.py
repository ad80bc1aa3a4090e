"""Aliases: who moves them, when, and what they mean."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook_server.service.aliases import AliasRequest, Direction
from shardbook_server.service.describing import Changes, Description
from shardbook_server.service.services import Services
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import AliasInfo, CheckpointInfo
from shardbook_server.storage import events as event_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.events import EventKind
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model, whole

PART = "projects/llm/runs/8b/parts/default"


def put(services: Services, name: str, checkpoint: str = "", **more: Any) -> AliasInfo:
    """Sets an alias of the part."""
    return services.aliases.set(AliasRequest(f"{PART}/aliases/{name}", checkpoint, **more))


def follow(services: Services, name: str, metric: str, direction: Direction) -> AliasInfo:
    """Makes an alias follow a metric."""
    return put(services, name, metric=metric, direction=direction)


def save(job: Job, step: int, **metrics: float) -> CheckpointInfo:
    """Saves a step with metrics."""
    job.register(step, whole(job.model))
    return job.services.commits.commit(job.key(step), Description(metrics=metrics))


def measure(services: Services, name: str, **metrics: float) -> None:
    """Sets metrics of a checkpoint, and no others."""
    services.descriptions.update(name, Changes({}, metrics, "", ("metrics",)))


def meant(services: Services, ref: str) -> str | None:
    """The ref of what an alias means; None for nothing."""
    try:
        return services.catalog.get_checkpoint(ref).ref
    except NotFoundError:
        return None


def test_an_alias_is_set_moved_and_deleted(job: Job, clock: Clock) -> None:
    """It resolves wherever a checkpoint is named, and says when it was set."""
    for step in (1, 2):
        job.save(step)
    first = put(job.services, "production", "llm/8b@1")
    assert (f"{PART}/checkpoints/1.s1.a1", "", clock.now_us) == (first.checkpoint, first.metric, first.update_time_us)
    assert "llm/8b@1" == meant(job.services, "llm/8b@production")
    assert list(job.services.metadata.get_metadata("llm/8b@production", b""))
    assert ("production",) == job.services.catalog.get_checkpoint("llm/8b@1").aliases
    clock.advance(5)
    assert first == put(job.services, "production", f"{PART}/checkpoints/1")
    moved = put(job.services, "production", "llm/8b@latest")
    assert ("llm/8b@2", clock.now_us) == (meant(job.services, "llm/8b@production"), moved.update_time_us)
    job.services.aliases.delete(f"{PART}/aliases/production")
    with pytest.raises(NotFoundError, match="`shardbook alias llm/8b`"):
        job.services.catalog.get_checkpoint("llm/8b@production")
    with pytest.raises(NotFoundError):
        job.services.aliases.delete(f"{PART}/aliases/production")


def test_a_job_may_resume_from_an_alias(services: Services) -> None:
    """``latest`` moves to what it means."""
    first = Job(services, Model(2))
    first.start()
    for step in (1, 2):
        first.save(step)
    put(services, "good", "llm/8b@1")
    Job(services, Model(2)).start(on_live=OnLive.TAKEOVER, resumed_from="llm/8b@good")
    assert "llm/8b@1" == meant(services, "llm/8b@latest")


@pytest.mark.parametrize(("direction", "best"), [(Direction.MIN, "llm/8b@2"), (Direction.MAX, "llm/8b@3")])
def test_an_alias_follows_its_metric(job: Job, direction: Direction, best: str) -> None:
    """From what there is when it is made, and with every commit and every change of a metric from then on."""
    save(job, 1, loss=2.0)
    follow(job.services, "best", "loss", direction)
    assert "llm/8b@1" == meant(job.services, "llm/8b@best")
    save(job, 2, loss=1.0)
    save(job, 3, loss=3.0)
    save(job, 4, other=9.0)
    assert best == meant(job.services, "llm/8b@best")
    measure(job.services, "llm/8b@4", loss=-5.0 if direction is Direction.MIN else 5.0)
    assert "llm/8b@4" == meant(job.services, "llm/8b@best")
    measure(job.services, "llm/8b@4")
    assert best == meant(job.services, "llm/8b@best")


def test_of_equal_values_the_newest_is_best(job: Job) -> None:
    """In both directions."""
    for step in (1, 2, 3):
        save(job, step, loss=1.0)
    for name, direction in (("low", Direction.MIN), ("high", Direction.MAX)):
        follow(job.services, name, "loss", direction)
        assert "llm/8b@3" == meant(job.services, f"llm/8b@{name}")


def test_a_metric_that_nothing_has_means_nothing_yet(job: Job) -> None:
    """The alias is there, and waits."""
    job.save(1)
    assert "" == follow(job.services, "best", "loss", Direction.MIN).checkpoint
    assert meant(job.services, "llm/8b@best") is None
    save(job, 2, loss=1.0)
    assert "llm/8b@2" == meant(job.services, "llm/8b@best")
    measure(job.services, "llm/8b@2")
    assert meant(job.services, "llm/8b@best") is None


def test_the_best_is_live(services: Services) -> None:
    """What a later session saved anew is not best any more, however good it was."""
    first = Job(services, Model(2))
    first.start()
    save(first, 1, loss=2.0)
    save(first, 2, loss=0.1)
    follow(services, "best", "loss", Direction.MIN)
    second = Job(services, Model(2))
    second.start(on_live=OnLive.TAKEOVER)
    save(second, 2, loss=5.0)
    assert "llm/8b@1" == meant(services, "llm/8b@best")


def test_following_equals_looking_for_the_best_anew(job: Job) -> None:
    """Rule: after any sequence of commits and changes it means what a search through everything would find."""
    chance = random.Random(11)
    follow(job.services, "low", "loss", Direction.MIN)
    follow(job.services, "high", "loss", Direction.MAX)
    held: dict[int, float | None] = {}
    for step in range(25):
        if held and chance.random() < 0.5:
            changed = chance.choice(sorted(held))
            held[changed] = chance.choice([None, float(chance.randrange(5))])
            values = {} if held[changed] is None else {"loss": held[changed]}
            measure(job.services, f"llm/8b@{changed}", **values)  # type: ignore[arg-type]
        else:
            held[step] = chance.choice([None, float(chance.randrange(5))])
            values = {} if held[step] is None else {"loss": held[step]}
            save(job, step, **values)  # type: ignore[arg-type]
        known = [(value, at) for at, value in held.items() if value is not None]
        low = max((at for value, at in known if value == min(known)[0]), default=None)
        high = max(known)[1] if known else None
        expected = [None if one is None else f"llm/8b@{one}" for one in (low, high)]
        assert expected == [meant(job.services, f"llm/8b@{name}") for name in ("low", "high")]


def test_every_move_is_an_event(job: Job, database: Database) -> None:
    """In the transaction that moves it, with its name; none where nothing moved."""
    save(job, 1, loss=2.0)
    follow(job.services, "best", "loss", Direction.MIN)
    save(job, 2, loss=3.0)
    save(job, 3, loss=1.0)
    measure(job.services, "llm/8b@3")
    put(job.services, "pinned", "llm/8b@2")
    put(job.services, "pinned", "llm/8b@2", protected=True)
    job.services.aliases.delete(f"{PART}/aliases/pinned", force=True)
    with database.read() as connection:
        told = [stored.event for stored in event_rows.read_after(connection, 0, 100)]
    kinds = (EventKind.ALIAS_MOVED, EventKind.ALIAS_DELETED)
    assert [
        (EventKind.ALIAS_MOVED, "best", 1),
        (EventKind.ALIAS_MOVED, "best", 3),
        (EventKind.ALIAS_MOVED, "best", 1),
        (EventKind.ALIAS_MOVED, "pinned", 2),
        (EventKind.ALIAS_DELETED, "pinned", 2),
    ] == [(one.kind, one.alias, one.checkpoint_id) for one in told if one.kind in kinds]


def test_a_protected_alias_stays_where_it_is(job: Job) -> None:
    """Neither moved, nor made to follow, nor deleted, nor laid open, without force."""
    for step in (1, 2):
        job.save(step)
    put(job.services, "golden", "llm/8b@1", protected=True)
    put(job.services, "golden", "llm/8b@1", protected=True)
    calls: list[Callable[[], object]] = [
        lambda: put(job.services, "golden", "llm/8b@2", protected=True),
        lambda: put(job.services, "golden", "llm/8b@1"),
        lambda: follow(job.services, "golden", "loss", Direction.MIN),
        lambda: job.services.aliases.delete(f"{PART}/aliases/golden"),
    ]
    for call in calls:
        with pytest.raises(FailedPreconditionError, match="--force") as caught:
            call()
        assert "ALIAS_PROTECTED" == caught.value.reason
    assert "llm/8b@1" == meant(job.services, "llm/8b@golden")
    put(job.services, "golden", "llm/8b@2", protected=True, force=True)
    assert "llm/8b@2" == meant(job.services, "llm/8b@golden")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": f"{PART}/aliases/latest"}, "alias.name"),
        ({"name": f"{PART}/aliases/1500"}, "alias.name"),
        ({"name": f"{PART}/aliases/"}, "alias.name"),
        ({"name": f"{PART}/aliases/a b"}, "alias.name"),
        ({"name": "llm/8b"}, "alias.name"),
        ({"checkpoint": ""}, "alias.checkpoint"),
        ({"metric": "loss", "direction": Direction.MIN}, "alias.checkpoint"),
        ({"direction": Direction.MAX}, "alias.direction"),
        ({"checkpoint": "", "metric": "loss"}, "alias.direction"),
        ({"checkpoint": "", "metric": "a b", "direction": Direction.MIN}, "alias.metric"),
        ({"checkpoint": "", "metric": "m", "direction": Direction.MIN, "protected": True}, "alias.protected"),
    ],
)
def test_aliases_that_are_none(changes: dict[str, Any], field: str) -> None:
    """Never all digits, never `latest`; by hand or by metric, not both."""
    fine = AliasRequest(f"{PART}/aliases/good", "llm/8b@1")
    with pytest.raises(InvalidArgumentError) as caught:
        replace(fine, **changes)
    assert [field] == [violation.field for violation in caught.value.violations]


def test_an_alias_means_a_committed_checkpoint_of_its_part(job: Job) -> None:
    """Not an open one, not another part's, not one that is not there."""
    job.save(1)
    job.register(2, whole(job.model)[:1])
    with pytest.raises(FailedPreconditionError) as caught:
        put(job.services, "good", "llm/8b@2.s1.a1")
    assert "NOT_COMMITTED" == caught.value.reason
    with pytest.raises(InvalidArgumentError) as other:
        put(job.services, "good", "llm/8b:optim@1")
    assert ["alias.checkpoint"] == [violation.field for violation in other.value.violations]
    for checkpoint in ("llm/8b@7", "llm/8b@none"):
        with pytest.raises(NotFoundError):
            put(job.services, "good", checkpoint)
    with pytest.raises(NotFoundError):
        job.services.aliases.set(
            AliasRequest("projects/llm/runs/none/parts/default/aliases/a", metric="m", direction=Direction.MIN)
        )


def test_aliases_are_listed_page_by_page(services: Services) -> None:
    """By part and name, ``latest`` in its place among them."""
    for part in ("optim", "default"):
        job = Job(services, Model(1), part=part)
        job.start()
        job.save(1)
        for name in ("zeta", "alpha"):
            name_of = f"projects/llm/runs/8b/parts/{part}/aliases/{name}"
            services.aliases.set(AliasRequest(name_of, f"projects/llm/runs/8b/parts/{part}/checkpoints/1"))
    found, token = [], ""
    while True:
        page = services.aliases.list("projects/llm/runs/8b/parts/-", page_size=2, page_token=token)
        found.append(["/".join(one.name.split("/")[5::2]) for one in page.items])
        token = page.next_page_token
        if not token:
            break
    assert [
        ["optim/alpha", "optim/latest"],
        ["optim/zeta", "default/alpha"],
        ["default/latest", "default/zeta"],
    ] == found
    assert 3 == len(services.aliases.list(PART).items)
    with pytest.raises(NotFoundError):
        services.aliases.list("projects/llm/runs/8b/parts/none")
    with pytest.raises(InvalidArgumentError):
        services.aliases.list("projects/-/runs/-/parts/-")
