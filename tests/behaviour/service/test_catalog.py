"""Runs and checkpoints, a page at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointState
from shardbook_server.storage.database import Database
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model, whole


def test_a_run_says_where_its_parts_stand(services: Services, clock: Clock) -> None:
    """Who writes it, since when it is silent, and what ``latest`` means."""
    Job(services, Model(2), part="weights").start(job_id="slurm-1")
    job = Job(services, Model(2), part="optim")
    job.start(job_id="slurm-1")
    saved = job.save(10)
    job.save(5)
    clock.advance(61)
    run = services.catalog.get_run("projects/llm/runs/8b")
    assert ["optim", "weights"] == [part.part for part in run.parts]
    optim, weights = run.parts
    assert (1, "node0", "ada", "slurm-1", False) == (
        optim.session,
        optim.host,
        optim.user,
        optim.job_id,
        optim.writing,
    )
    assert (saved.name, 10, 2) == (optim.latest, optim.latest_step, optim.checkpoint_count)
    assert ("", 0, 0) == (weights.latest, weights.latest_step, weights.checkpoint_count)
    assert clock.now_us - 61_000_000 == weights.last_seen_time_us


def test_a_run_of_offline_saves_has_no_session(services: Services) -> None:
    """It is there all the same."""
    Job(services, Model(2)).record(5)
    [part] = services.catalog.get_run("projects/llm/runs/8b").parts
    assert (0, None, False, 5) == (part.session, part.last_seen_time_us, part.writing, part.latest_step)


def test_a_run_may_have_more_parts_than_are_walked_one_by_one(services: Services) -> None:
    """Pages are in one order however many there are."""
    for number in range(20):
        job = Job(services, Model(1), part=f"p{number}")
        job.start()
        job.save(number * 7 % 20)
    parent = "projects/llm/runs/8b/parts/-"
    first = services.catalog.list_checkpoints(parent, page_size=12)
    rest = services.catalog.list_checkpoints(parent, page_token=first.next_page_token)
    assert list(range(19, -1, -1)) == [one.step for page in (first, rest) for one in page.items]


def test_runs_are_listed_by_name_page_by_page(services: Services) -> None:
    """Of one project, or of all."""
    for name in ("b/runs/2", "a/runs/x", "b/runs/10", "a/runs/y", "c/runs/z"):
        Job(services, Model(1), run=f"projects/{name}").start()

    def pages(parent: str) -> list[list[str]]:
        found, token = [], ""
        while True:
            page = services.catalog.list_runs(parent, page_size=2, page_token=token)
            found.append([run.name.removeprefix("projects/") for run in page.items])
            token = page.next_page_token
            if not token:
                return found

    assert [["a/runs/x", "a/runs/y"], ["b/runs/10", "b/runs/2"], ["c/runs/z"]] == pages("projects/-")
    assert [["b/runs/10", "b/runs/2"]] == pages("projects/b")
    assert [[]] == pages("projects/none")


def test_checkpoints_are_listed_newest_session_and_step_first(services: Services) -> None:
    """By (session, step), so that an abandoned branch does not hide the live one."""
    first = Job(services, Model(2))
    first.start()
    for step in (10, 20, 30):
        first.save(step)
    second = Job(services, Model(2))
    second.start(on_live=OnLive.TAKEOVER)
    for step in (20, 25):
        second.save(step)
    second.register(40, whole(second.model)[:1])
    listed = services.catalog.list_checkpoints("projects/llm/runs/8b/parts/default")
    assert ["llm/8b@25", "llm/8b@20", "llm/8b@30", "llm/8b@10"] == [one.ref for one in listed.items]
    everything = services.catalog.list_checkpoints("projects/llm/runs/8b/parts/default", show_all=True)
    assert [
        ("llm/8b@40.s2.a1", CheckpointState.OPEN),
        ("llm/8b@25", CheckpointState.COMMITTED),
        ("llm/8b@20", CheckpointState.COMMITTED),
        ("llm/8b@30", CheckpointState.COMMITTED),
        ("llm/8b@20.s1.a1", CheckpointState.COMMITTED),
        ("llm/8b@10", CheckpointState.COMMITTED),
    ] == [(one.ref, one.state) for one in everything.items]


def test_pages_join_to_the_whole_listing(services: Services) -> None:
    """Over several parts, in one order, nothing twice and nothing left out; saves in between do not disturb."""
    jobs = [Job(services, Model(1), part=part) for part in ("a", "b")]
    for job in jobs:
        job.start()
        for step in range(7):
            job.save(step)
    parent = "projects/llm/runs/8b/parts/-"
    everything = [one.name for one in services.catalog.list_checkpoints(parent).items]
    paged, token = [], ""
    while True:
        page = services.catalog.list_checkpoints(parent, page_size=4, page_token=token)
        paged += [one.name for one in page.items]
        jobs[0].save(100 + len(paged))
        token = page.next_page_token
        if not token:
            break
    assert everything == paged
    assert 14 == len(everything)


@pytest.mark.parametrize(
    ("ref", "advice"),
    [
        ("llm/8b@1", "was never committed, there are only attempts: `shardbook ls llm/8b --all`"),
        ("llm/8b@1.s1", "was never committed, there are only attempts: `shardbook ls llm/8b --all`"),
        ("llm/8b@1.s2", "does not exist; `shardbook ls llm/8b` lists"),
        ("llm/8b@2", "does not exist; `shardbook ls llm/8b` lists"),
        ("llm/8b@latest", "nothing of it is committed; `shardbook ls llm/8b --all`"),
    ],
)
def test_a_step_without_a_commit_is_told_from_one_that_is_not_there(job: Job, ref: str, advice: str) -> None:
    """Failed and open attempts are not shown by their step: the message says where they are."""
    job.register(1, whole(job.model)[:1])
    with pytest.raises(NotFoundError) as caught:
        job.services.catalog.get_checkpoint(ref)
    assert caught.value.message.startswith(ref)
    assert advice in caught.value.message


def test_a_token_is_read_by_every_replica(job: Job, database: Database) -> None:
    """Its key is in the database."""
    for step in range(3):
        job.save(step)
    parent = "projects/llm/runs/8b/parts/default"
    first = job.services.catalog.list_checkpoints(parent, page_size=2)
    second = build_services(database).catalog.list_checkpoints(parent, page_token=first.next_page_token)
    assert ["llm/8b@0"] == [one.ref for one in second.items]


def test_forged_and_foreign_tokens_are_refused(job: Job) -> None:
    """A token is good for the listing it came from."""
    for step in range(3):
        job.save(step)
    catalog = job.services.catalog
    parent = "projects/llm/runs/8b/parts/default"
    token = catalog.list_checkpoints(parent, page_size=1).next_page_token
    flipped = ("A" if token[0] != "A" else "B") + token[1:]
    forged = [flipped, token[:-4], token + "AAAA", "x", "\u00e9", "!" * 10, "A" * 5000]
    calls: list[Callable[[], object]] = [
        *(partial(catalog.list_checkpoints, parent, page_token=bad) for bad in forged),
        lambda: catalog.list_checkpoints(parent, page_token=token, show_all=True),
        lambda: catalog.list_checkpoints("projects/llm/runs/8b/parts/-", page_token=token),
        lambda: catalog.list_runs("projects/llm", page_token=token),
        lambda: job.services.metadata.list_tensors("llm/8b@1", page_token=token),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        assert "INVALID_PAGE_TOKEN" == caught.value.reason
        assert ["page_token"] == [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("parent", "error"),
    [
        ("projects/llm/runs/none/parts/-", NotFoundError),
        ("projects/llm/runs/8b/parts/none", NotFoundError),
        ("projects/llm/runs/8b", InvalidArgumentError),
        ("projects/../runs/8b/parts/-", InvalidArgumentError),
        ("projects/llm/runs/8b/parts/%2f", InvalidArgumentError),
    ],
)
def test_parents_that_are_none(job: Job, parent: str, error: type[Exception]) -> None:
    """NOT_FOUND for what does not exist, INVALID_ARGUMENT for what cannot."""
    job.save(1)
    with pytest.raises(error):
        job.services.catalog.list_checkpoints(parent)


def test_sizes_of_pages_are_bounded(job: Job) -> None:
    """A negative one is refused, a large one is cut to the limit."""
    with pytest.raises(InvalidArgumentError) as caught:
        job.services.catalog.list_runs("projects/-", page_size=-1)
    assert ["page_size"] == [violation.field for violation in caught.value.violations]
    assert 1 == len(job.services.catalog.list_runs("projects/-", page_size=2**31 - 1).items)


@pytest.mark.parametrize("parent", ["", "llm", "projects/", "projects/a/b", "projects/\u202e"])
def test_parents_of_runs_that_are_none(services: Services, parent: str) -> None:
    """Names are checked before they are looked up."""
    with pytest.raises(InvalidArgumentError):
        services.catalog.list_runs(parent)
