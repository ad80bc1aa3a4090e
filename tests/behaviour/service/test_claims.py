"""Claims: at least once, by one at a time, whoever dies; and events that are dropped by age."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest

from shardbook.errors import (
    AlreadyExistsError,
    ClaimLostError,
    CursorExpiredError,
    EpochChangedError,
    InvalidArgumentError,
    NotFoundError,
)
from shardbook_server.service.claiming import ClaimRequest, ClaimView, FinishRequest, Outcome, SubscriptionView
from shardbook_server.service.services import Services
from shardbook_server.storage import claims as rows
from shardbook_server.storage.backup import mark_restored
from shardbook_server.storage.claims import ClaimState
from shardbook_server.storage.database import Database
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job

NAME = "subscriptions/mmlu"
DAY_US = 86_400_000_000


def request(**changes: object) -> ClaimRequest:
    """A claim of a watcher of everything."""
    one = ClaimRequest(NAME, "projects/-/runs/-/parts/-", "", "start", uuid.uuid4().bytes, "host 1", 60.0, 3)
    return replace(one, **changes)  # type: ignore[arg-type]


def claimed(services: Services, **changes: object) -> tuple[bytes, ClaimView | None]:
    """A new claim: its id, and what was claimed."""
    one = request(**changes)
    return one.claim_id, services.claims.claim(one).claim


def finish(services: Services, claim_id: bytes, view: ClaimView | None, outcome: Outcome, **changes: object) -> object:
    """Ends a claim."""
    name = "" if view is None else view.checkpoint.name
    one = FinishRequest(NAME, claim_id, name, outcome, "exit code 1", 10.0, 3)
    return services.claims.finish(replace(one, **changes))  # type: ignore[arg-type]


def step(view: ClaimView | None) -> int | None:
    """The step that was claimed."""
    return None if view is None else view.checkpoint.step


def test_subscriptions_are_listed_by_name_in_pages(services: Services, job: Job) -> None:
    """As they are by themselves, but for their claims; none twice, none left out."""
    job.save(1)
    names = [f"subscriptions/{name}" for name in ("b", "a", "B", "mmlu-2", "mmlu")]
    for name in names:
        assert claimed(services, subscription=name)[1] is not None
    found: list[SubscriptionView] = []
    token = ""
    while True:
        page = services.claims.list(page_size=2, page_token=token)
        found += page.items
        token = page.next_page_token
        if not token:
            break
    assert sorted(names) == [one.name for one in found]
    assert [replace(services.claims.get(one.name), claims=()) for one in found] == found
    services.claims.delete("subscriptions/b")
    assert 4 == len(services.claims.list().items)
    for bad in ({"page_size": -1}, {"page_token": "x"}):
        with pytest.raises(InvalidArgumentError):
            services.claims.list(**bad)


def test_each_commit_is_claimed_once_in_order(services: Services, job: Job) -> None:
    """Also those that come later; what did not commit is not claimed."""
    job.save(1)
    job.register(7, [])
    job.save(2)
    assert [1, 2, None] == [step(claimed(services)[1]) for _ in range(3)]
    job.save(3)
    assert [3, None] == [step(claimed(services)[1]) for _ in range(2)]


def test_a_claim_whose_answer_was_lost_is_the_same_again(services: Services, job: Job) -> None:
    """Asked again with its id, as the transport does; finishing twice has one effect."""
    job.save(1)
    job.save(2)
    one = request()
    first = services.claims.claim(one).claim
    assert first == services.claims.claim(one).claim
    assert [None, None] == [finish(services, one.claim_id, first, Outcome.DONE) for _ in range(2)]
    assert (1, 2) == (services.claims.get(NAME).done_count, step(claimed(services)[1]))


def test_a_lease_that_ends_frees_the_checkpoint(services: Services, job: Job, clock: Clock) -> None:
    """Not before; renewed it stays; the one who lost it is told so whatever it says."""
    job.save(1)
    claim_id, view = claimed(services)
    clock.advance(50)
    services.claims.renew(NAME, claim_id, 60.0)
    clock.advance(50)
    assert services.claims.claim(request()).again_s == pytest.approx(10)
    assert None is services.claims.claim(request()).claim
    clock.advance(11)
    other_id, other = claimed(services)
    assert (1, 2) == (step(other), other.attempt if other else 0)
    with pytest.raises(ClaimLostError):
        services.claims.renew(NAME, claim_id, 60.0)
    for outcome in (Outcome.DONE, Outcome.FAILED, Outcome.RELEASED):
        with pytest.raises(ClaimLostError):
            finish(services, claim_id, view, outcome)
    assert None is finish(services, other_id, other, Outcome.DONE)


def test_failures_are_tried_again_and_then_skipped(services: Services, job: Job, clock: Clock) -> None:
    """After their delay, so often, and then they stay on record; a release does not count."""
    job.save(1)
    for attempt in (1, 2, 3):
        claim_id, view = claimed(services)
        assert view is not None
        assert attempt == view.attempt
        finish(services, claim_id, view, Outcome.RELEASED)
        claim_id, view = claimed(services)
        state = finish(services, claim_id, view, Outcome.FAILED)
        assert (ClaimState.WAITING if attempt < 3 else ClaimState.FAILED) == state
        assert state == finish(services, claim_id, view, Outcome.FAILED)
        assert None is claimed(services)[1]
        clock.advance(10)
    (failed,) = services.claims.get(NAME).claims
    assert (ClaimState.FAILED, 3, "exit code 1") == (failed.state, failed.attempt, failed.failure)


def test_who_kills_every_watcher_is_skipped(services: Services, job: Job, clock: Clock) -> None:
    """Leases that end count as attempts: a command that takes its machine down does not do so for ever."""
    job.save(1)
    for attempt in (1, 2):
        view = claimed(services, max_attempts=2)[1]
        assert view is not None
        assert attempt == view.attempt
        clock.advance(61)
    assert None is claimed(services, max_attempts=2)[1]
    assert "lost" in services.claims.get(NAME).claims[0].failure


def test_what_is_worked_on_is_held(services: Services, database: Database, job: Job, clock: Clock) -> None:
    """While it runs and while it waits to be tried again soon; not once it is done or its watcher is lost."""
    ids = [job.save(one).checkpoint_id for one in (1, 2)]

    def held() -> set[int]:
        with database.read() as connection:
            return set(rows.find_held(connection, ids, database.now_us(connection)))

    assert set() == held()
    claim_id, view = claimed(services)
    other_id, other = claimed(services)
    assert set(ids) == held()
    finish(services, claim_id, view, Outcome.DONE)
    finish(services, other_id, other, Outcome.FAILED)
    clock.advance(3_000)
    assert {ids[1]} == held()
    clock.advance(3_000)
    assert set() == held()


def test_a_subscription_stays_what_it_is(services: Services, job: Job) -> None:
    """By filter and place; another one of the same name is refused, and a forgotten one begins anew."""
    for one in (1, 2, 3):
        job.save(one)
    about = {"parent": "projects/llm/runs/8b/parts/-", "filter_text": "step >= 2"}
    assert [2, 3, None] == [step(claimed(services, **about)[1]) for _ in range(3)]
    for wrong in ({}, {"parent": about["parent"]}):
        for ask in (services.claims.peek, services.claims.claim):
            with pytest.raises(AlreadyExistsError, match="--delete") as refused:
                ask(request(**wrong))
            assert "SUBSCRIPTION_DIFFERS" == refused.value.reason
    services.claims.delete(NAME)
    with pytest.raises(NotFoundError):
        services.claims.get(NAME)
    assert None is claimed(services, cursor="")[1]
    job.save(4)
    assert 4 == step(claimed(services, cursor="start")[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"subscription": "mmlu"},
        {"subscription": "subscriptions/a b"},
        {"parent": "everything"},
        {"filter_text": "step >"},
        {"claim_id": b"short"},
        {"holder": "a\nb"},
        {"lease_s": 0.5},
        {"lease_s": float("nan")},
        {"lease_s": 1e9},
        {"max_attempts": 0},
        {"max_attempts": 101},
    ],
)
def test_bad_claims_are_refused(wrong: dict[str, object]) -> None:
    """Before anything is asked of the database."""
    with pytest.raises(InvalidArgumentError):
        request(**wrong)


def test_old_events_are_dropped_and_cursors_before_them_say_so(services: Services, job: Job, clock: Clock) -> None:
    """By age and from the oldest on; a subscription that has not come so far says what to do."""
    start = str(services.events.open("start"))
    services.claims.claim(request())
    job.save(1)
    clock.advance(86_400)
    before = str(services.events.open(""))
    job.save(2)
    assert 2 == services.events.drop_old(DAY_US // 2)
    assert 0 == services.events.drop_old(DAY_US // 2)
    assert before == str(services.events.open("start")) == str(services.events.open(before))
    assert 2 == len(services.events.read(services.events.open(before), 10).events)
    with pytest.raises(CursorExpiredError):
        services.events.open(start)
    with pytest.raises(CursorExpiredError):
        services.claims.claim(request())
    assert 2 == services.events.drop_old(-DAY_US)
    # Level with the catalogue, a cursor lacks nothing though no event is left.
    now = services.events.open("")
    assert now == services.events.open(str(now)) == services.events.open("start")


def test_a_restored_database_refuses_the_cursors_of_before(services: Services, database: Database, job: Job) -> None:
    """Also one beyond its last event, which a lost commit had; subscriptions are of its own time, and go on."""
    job.save(1)
    cursor = str(services.events.open(""))
    with pytest.raises(EpochChangedError):
        services.events.open(f"{cursor.partition('-')[0]}-9999")
    place = services.events.open("start")
    mark_restored(database.url)
    with pytest.raises(EpochChangedError):
        services.events.open(cursor)
    with pytest.raises(EpochChangedError):
        services.events.read(place, 10)
    assert 1 == step(claimed(services)[1])
