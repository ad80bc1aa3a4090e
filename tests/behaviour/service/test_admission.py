"""Large computations: bounded by memory, made once for the same content, and refusals remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from shardbook.core.assembly import Assembly
from shardbook.core.columns import Int64Array
from shardbook.core.structure import RankStructure
from shardbook.errors import InvalidGeometryError
from shardbook_server.service import folding
from shardbook_server.service.admission import MemoryBudget, SingleFlight
from shardbook_server.service.views import CheckpointState
from tests.behaviour.rpc.api import wait_until
from tests.behaviour.service.saves import Job, Model, whole

MIB = 1 << 20
Hold = Callable[[], AbstractContextManager[None]]


class _Guests:
    """Threads that hold something until they are told to leave."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.inside: list[str] = []

    def enter(
        self, name: str, hold: Callable[[], AbstractContextManager[None]]
    ) -> tuple[threading.Event, Future[None]]:
        """Starts one that enters when it may."""
        leave = threading.Event()

        def stay() -> None:
            with hold():
                self.inside.append(name)
                leave.wait(20)
                self.inside.remove(name)

        return leave, self._pool.submit(stay)


@pytest.fixture
def guests() -> _Guests:
    """Up to eight."""
    return _Guests(ThreadPoolExecutor(8))


def test_what_fits_goes_on_together_and_what_does_not_waits(guests: _Guests) -> None:
    """Rule: a small job is not held up by a large one; two large ones go one after the other."""
    budget = MemoryBudget(100 * MIB)
    large, _ = guests.enter("large", lambda: budget.hold(90 * MIB))
    wait_until(lambda: guests.inside == ["large"])
    small, done = guests.enter("small", lambda: budget.hold(5 * MIB))
    wait_until(lambda: guests.inside == ["large", "small"])
    second, last = guests.enter("second", lambda: budget.hold(90 * MIB))
    small.set()
    done.result(10)
    assert ["large"] == guests.inside
    large.set()
    wait_until(lambda: guests.inside == ["second"])
    second.set()
    last.result(10)


def test_what_is_larger_than_the_whole_goes_alone(guests: _Guests) -> None:
    """Rule: no world is too large to be saved, but nothing else is computed meanwhile."""
    budget = MemoryBudget(10 * MIB)
    huge, done = guests.enter("huge", lambda: budget.hold(500 * MIB))
    wait_until(lambda: guests.inside == ["huge"])
    small, last = guests.enter("small", lambda: budget.hold(1))
    huge.set()
    done.result(10)
    wait_until(lambda: guests.inside == ["small"])
    small.set()
    last.result(10)


def test_the_large_are_not_passed_by_for_ever(guests: _Guests) -> None:
    """Rule: who came first is let in first, so a stream of small ones cannot starve a large one."""
    budget = MemoryBudget(10 * MIB)
    first, _ = guests.enter("first", lambda: budget.hold(6 * MIB))
    wait_until(lambda: guests.inside == ["first"])
    large, _ = guests.enter("large", lambda: budget.hold(9 * MIB))
    wait_until(lambda: len(budget._waiting) == 1)
    small, last = guests.enter("small", lambda: budget.hold(1 * MIB))
    wait_until(lambda: len(budget._waiting) == 2)
    first.set()
    wait_until(lambda: "large" in guests.inside)
    large.set()
    small.set()
    last.result(10)


def test_the_same_work_is_done_by_one_at_a_time(guests: _Guests) -> None:
    """Rule: other work goes on beside it; nothing is kept of what has ended."""
    flight = SingleFlight()
    one, _ = guests.enter("one", lambda: flight.alone("a"))
    wait_until(lambda: guests.inside == ["one"])
    two, last = guests.enter("two", lambda: flight.alone("a"))
    other, done = guests.enter("other", lambda: flight.alone("b"))
    wait_until(lambda: guests.inside == ["one", "other"])
    one.set()
    wait_until(lambda: "two" in guests.inside)
    two.set()
    other.set()
    last.result(10)
    done.result(10)
    assert not flight._locks


def test_a_refusal_is_remembered(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: a layout that does not fit together is judged once, however often it is saved; each save is FAILED."""
    assembled = []

    def counted(structures: Sequence[RankStructure], rank_index: Int64Array) -> Assembly:
        assembled.append(1)
        return Assembly(structures, rank_index)

    monkeypatch.setattr(folding, "Assembly", counted)
    torn = Job(job.services, Model(2, hole=1), run="projects/llm/runs/torn")
    torn.start()
    refusals = []
    for step in (1, 2, 3):
        torn.register(step, whole(torn.model))
        with pytest.raises(InvalidGeometryError) as caught:
            torn.commit(step)
        refusals.append((str(caught.value), dict(caught.value.metadata)))
    assert 1 == len(assembled)
    assert 1 == len({str(refusal) for refusal in refusals})
    assert [CheckpointState.FAILED] * 3 == [
        torn.services.progress.progress(torn.key(step)).counts.state for step in (1, 2, 3)
    ]
