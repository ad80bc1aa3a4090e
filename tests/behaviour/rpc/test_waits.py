"""Waiting: one poller for all, woken at once by local changes, limited apart, ended by a drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import pytest

from shardbook.errors import ResourceExhaustedError, UnavailableError
from shardbook_server.rpc.attempts import is_closed, is_planned, is_registered
from shardbook_server.rpc.waits import Waits
from shardbook_server.service.views import AttemptCounts, CheckpointState


def _counts(registered: int = 0, state: CheckpointState = CheckpointState.OPEN, planned: int = 0) -> AttemptCounts:
    return AttemptCounts(
        state=state, planned_count=planned, registered_count=registered, world_size=4, registration_count=4
    )


class Numbers:
    """Stands where the database is: answers what the test set, and counts the queries."""

    def __init__(self) -> None:
        self.counts: dict[int, AttemptCounts] = {}
        self.asked: list[list[int]] = []
        self.error: Exception | None = None

    async def look(self, attempts: Sequence[int]) -> Mapping[int, AttemptCounts]:
        """Answers for the attempts that it knows."""
        self.asked.append(sorted(attempts))
        if self.error is not None:
            raise self.error
        return {attempt: self.counts[attempt] for attempt in attempts if attempt in self.counts}


def test_thousands_wait_at_the_price_of_one() -> None:
    """Rule: one grouped query an interval, whatever the number of waiters."""

    async def main() -> None:
        numbers = Numbers()
        numbers.counts = {7: _counts(1), 8: _counts(2)}
        waits = Waits(numbers.look, limit=10_000, interval_s=0.05)
        calls = [asyncio.ensure_future(waits.until(7 + at % 2, is_registered, 5)) for at in range(4_000)]
        await asyncio.sleep(0)
        assert 4_000 == waits.waiting_count
        began = time.monotonic()
        await asyncio.sleep(0.3)
        assert 1 <= len(numbers.asked) <= (time.monotonic() - began) / 0.05 + 2
        assert all([7, 8] == asked for asked in numbers.asked)
        numbers.counts = {7: _counts(4), 8: _counts(4)}
        assert {_counts(4)} == set(await asyncio.gather(*calls))
        assert 0 == waits.waiting_count
        await waits.close()

    asyncio.run(main())


def test_a_local_change_wakes_at_once() -> None:
    """Rule: who waits here for what is committed here does not wait for the poller's turn."""

    async def main() -> None:
        numbers = Numbers()
        numbers.counts[7] = _counts(3)
        waits = Waits(numbers.look, limit=10, interval_s=30)
        call = asyncio.ensure_future(waits.until(7, is_registered, 20))
        await asyncio.sleep(0.02)
        began = time.monotonic()
        numbers.counts[7] = _counts(4)
        waits.changed([7, 99])
        assert _counts(4) == await call
        assert time.monotonic() - began < 10
        assert [[7]] == numbers.asked
        await waits.close()

    asyncio.run(main())


def test_a_wait_that_is_over_answers_what_was_last_seen() -> None:
    """Rule: a wait that ends without its event is an answer, not an error."""

    async def main() -> None:
        numbers = Numbers()
        numbers.counts[7] = _counts(2)
        waits = Waits(numbers.look, limit=10, interval_s=0.01)
        assert _counts(2) == await waits.until(7, is_registered, 0.1)
        assert await waits.until(8, is_registered, 0.05) is None
        assert await waits.until(7, is_registered, 0) is None
        assert 0 == waits.waiting_count
        await waits.close()

    asyncio.run(main())


def test_a_database_that_is_away_does_not_end_waits() -> None:
    """Rule: the poller goes on looking; waiting calls end by their own time."""

    async def main() -> None:
        numbers = Numbers()
        numbers.error = UnavailableError("away")
        waits = Waits(numbers.look, limit=10, interval_s=0.01)
        call = asyncio.ensure_future(waits.until(7, is_registered, 5))
        await asyncio.sleep(0.05)
        numbers.error, numbers.counts = None, {7: _counts(4)}
        assert _counts(4) == await call
        await waits.close()

    asyncio.run(main())


def test_waiters_have_a_limit_of_their_own() -> None:
    """Rule: one waiter too many is RESOURCE_EXHAUSTED with RetryInfo; a cancelled one makes room."""

    async def main() -> None:
        waits = Waits(Numbers().look, limit=2, interval_s=0.01)
        held = [asyncio.ensure_future(waits.until(7, is_registered, 5)), asyncio.ensure_future(waits.pause(5))]
        await asyncio.sleep(0.01)
        for call in (waits.until(7, is_registered, 5), waits.pause(5)):
            with pytest.raises(ResourceExhaustedError) as refused:
                await call
            assert "WAITERS_FULL" == refused.value.reason
            assert refused.value.retry_delay_s is not None
        held[0].cancel()
        await asyncio.sleep(0)
        await waits.pause(0.01)
        held[1].cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await waits.close()

    asyncio.run(main())


def test_a_drain_ends_every_wait_with_unavailable() -> None:
    """Rule: nobody is kept by a server that is going, and the answer says to ask again."""

    async def main() -> None:
        waits = Waits(Numbers().look, limit=10, interval_s=30)
        calls = [asyncio.ensure_future(waits.until(7, is_registered, 20)), asyncio.ensure_future(waits.pause(20))]
        await asyncio.sleep(0.01)
        waits.drain()
        for call in (*calls, waits.until(7, is_registered, 20), waits.pause(20)):
            with pytest.raises(UnavailableError) as ended:
                await call
            assert "DRAINING" == ended.value.reason
        await waits.close()

    asyncio.run(main())


@pytest.mark.parametrize("state", list(CheckpointState)[1:])
def test_a_closed_attempt_ends_every_kind_of_wait(state: CheckpointState) -> None:
    """Rule: nobody waits for ranks of an attempt that is over, whatever its numbers."""
    assert is_closed(_counts(0, state))
    assert is_registered(_counts(0, state))
    assert is_planned(_counts(0, state))


def test_an_open_attempt_is_waited_for_until_its_numbers_are_full() -> None:
    """Rule: planned counts against the world, registered against what makes the attempt whole."""
    assert not is_closed(_counts(4, planned=4))
    assert not is_registered(_counts(3, planned=4))
    assert is_registered(_counts(4))
    assert not is_planned(_counts(4, planned=3))
    assert is_planned(_counts(planned=4))
