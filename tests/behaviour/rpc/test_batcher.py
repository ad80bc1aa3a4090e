"""Group commit: bounded, in order, each entry judged alone, the running batch shielded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    ShardbookError,
    UnavailableError,
)
from shardbook_server.rpc.batcher import LONGEST_PAUSE_S, PATIENCE_S, Batcher, BatchLimits
from shardbook_server.rpc.call import Call, set_current_call

ROOMY = BatchLimits(batch_count=100, batch_bytes=1000, queue_count=1000, queue_bytes=10_000)


class Sink:
    """Stands where the database is: keeps each batch, takes a moment, answers ten times the entry."""

    def __init__(self, delay_s: float = 0.005) -> None:
        self.batches: list[list[int]] = []
        self.delay_s = delay_s
        self.in_flight = 0
        self.most_in_flight = 0

    async def __call__(self, entries: Sequence[int]) -> Sequence[int | ShardbookError]:
        """Writes a batch; negative entries are refused."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.batches.append(list(entries))
        await asyncio.sleep(self.delay_s)
        self.in_flight -= 1
        return [AlreadyExistsError(str(entry)) if entry < 0 else entry * 10 for entry in entries]


async def _outcome(batcher: Batcher[int, int], entry: int, size_bytes: int = 1) -> int | str:
    try:
        return await batcher.submit(entry, size_bytes)
    except ShardbookError as error:
        return error.reason


@given(
    entries=st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 60)), max_size=60),
    count=st.integers(1, 10),
    size_bytes=st.integers(1, 100),
    in_flight=st.integers(1, 3),
)
def test_every_entry_is_written_once_in_order_within_the_limits(
    entries: list[tuple[int, int]], count: int, size_bytes: int, in_flight: int
) -> None:
    """Rule: batches keep the order of arrival and both limits, and every entry gets its own verdict."""

    async def main() -> tuple[Sink, list[int | str]]:
        sink = Sink(0)
        limits = BatchLimits(count, size_bytes, queue_count=1000, queue_bytes=100_000)
        batcher = Batcher("entries", sink, limits, in_flight=in_flight)
        outcomes = await asyncio.gather(*(_outcome(batcher, entry, size) for entry, size in entries))
        await batcher.close()
        return sink, outcomes

    sink, outcomes = asyncio.run(main())
    assert [entry for entry, _ in entries] == [entry for batch in sink.batches for entry in batch]
    assert ["ALREADY_EXISTS" if entry < 0 else entry * 10 for entry, _ in entries] == outcomes
    assert sink.most_in_flight <= in_flight
    queue = iter(entries)
    for batch in sink.batches:
        sizes = [next(queue)[1] for _ in batch]
        assert len(batch) <= count
        assert len(batch) == 1 or sum(sizes) <= size_bytes


def test_a_lone_entry_is_not_held_up_and_a_crowd_shares() -> None:
    """Rule: no timer for one who writes alone; what arrives while a batch is written becomes the next one."""

    async def main() -> None:
        sink = Sink(0)
        batcher = Batcher("entries", sink, ROOMY)
        began = time.monotonic()
        for entry in range(200):
            await batcher.submit(entry, 1)
        assert time.monotonic() - began < 200 * LONGEST_PAUSE_S / 2
        sink.batches.clear()
        sink.delay_s = 0.02
        await asyncio.gather(*(batcher.submit(entry, 1) for entry in range(50)))
        assert len(sink.batches) <= 3
        assert 1 == sink.most_in_flight

    asyncio.run(main())


def test_a_stream_of_entries_shares_transactions() -> None:
    """Rule: under load a batch gathers for as long as the one before took, so transactions take half of the time."""

    async def main() -> None:
        sink = Sink(0.01)
        batcher = Batcher("entries", sink, ROOMY)

        async def rank(number: int) -> None:
            for entry in range(10):
                await batcher.submit(number * 100 + entry, 1)

        began = time.monotonic()
        await asyncio.gather(*(rank(number) for number in range(40)))
        assert 0.01 * len(sink.batches) < 0.8 * (time.monotonic() - began)

    asyncio.run(main())


def test_a_second_batch_begins_only_when_it_is_full_or_has_waited() -> None:
    """Rule: what arrives while a batch is written shares the next one, and that waits, but not for long."""

    async def main() -> None:
        begun: asyncio.Queue[tuple[float, list[int]]] = asyncio.Queue()

        async def run(entries: Sequence[int]) -> Sequence[int | ShardbookError]:
            begun.put_nowait((time.monotonic(), list(entries)))
            await asyncio.Event().wait()
            return list(entries)

        batcher: Batcher[int, int] = Batcher("entries", run, BatchLimits(10, 1000, 1000, 10_000), in_flight=3)

        def submit(*entries: int) -> list[asyncio.Task[int]]:
            return [asyncio.ensure_future(batcher.submit(entry, 1)) for entry in entries]

        async with asyncio.timeout(10):
            calls = submit(0)
            assert [0] == (await begun.get())[1]
            calls += submit(*range(1, 11))
            assert list(range(1, 11)) == (await begun.get())[1]
            submitted_s = time.monotonic()
            calls += submit(11, 12)
            at_s, entries = await begun.get()
        assert [11, 12] == entries
        assert at_s - submitted_s >= 0.8 * PATIENCE_S
        for call in calls:
            call.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("in_flight", [1, 2])
def test_an_entry_that_comes_as_a_batch_ends_is_not_forgotten(in_flight: int) -> None:
    """Rule: however close to the end of the last batch an entry arrives, it gets a batch of its own."""

    async def main() -> None:
        batcher = Batcher("entries", Sink(0), ROOMY, in_flight=in_flight)

        async def one_after_the_other(first: int) -> None:
            for entry in range(first, first + 20):
                assert entry * 10 == await batcher.submit(entry, 1)
                for _ in range(entry % 4):
                    await asyncio.sleep(0)

        async with asyncio.timeout(10):
            await one_after_the_other(1)
            await asyncio.gather(*(one_after_the_other(first) for first in range(5)))

    asyncio.run(main())


@pytest.mark.parametrize("limits", [BatchLimits(1, 1000, 2, 1000), BatchLimits(1, 1000, 100, 20)])
def test_a_full_queue_is_refused_with_a_delay(limits: BatchLimits) -> None:
    """Rule: the queue is bounded in count and in bytes; beyond, RESOURCE_EXHAUSTED with RetryInfo."""

    async def main() -> None:
        sink = Sink(0.02)
        batcher = Batcher("entries", sink, limits)
        calls = [asyncio.ensure_future(_outcome(batcher, entry, 10)) for entry in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError) as refused:
            await batcher.submit(9, 10)
        assert "QUEUE_FULL" == refused.value.reason
        assert refused.value.retry_delay_s is not None
        outcomes = await asyncio.gather(*calls)
        assert outcomes.count("QUEUE_FULL") == 5 - sum(map(len, sink.batches))
        assert 90 == await batcher.submit(9, 10)

    asyncio.run(main())


def test_a_cancelled_caller_leaves_the_queue_but_not_a_running_batch() -> None:
    """Rule: an entry is whole or absent, whenever its client goes, and its neighbours do not notice."""

    async def main() -> None:
        sink = Sink(0.05)
        batcher = Batcher("entries", sink, ROOMY)
        running = [asyncio.ensure_future(batcher.submit(entry, 1)) for entry in (1, 2)]
        await asyncio.sleep(0.01)
        queued = [asyncio.ensure_future(batcher.submit(entry, 1)) for entry in (3, 4)]
        await asyncio.sleep(0.01)
        running[0].cancel()
        queued[0].cancel()
        assert 20 == await running[1]
        assert 40 == await queued[1]
        assert [[1, 2], [4]] == sink.batches

    asyncio.run(main())


def test_an_expired_entry_is_dropped() -> None:
    """Rule: the database is not spent on entries whose deadline passed while they were queued."""

    async def main() -> None:
        sink = Sink(0.06)
        batcher = Batcher("entries", sink, ROOMY)

        async def late() -> None:
            set_current_call(Call("/x", "id", time.monotonic() + 0.02))
            with pytest.raises(DeadlineExceededError):
                await batcher.submit(2, 1)

        first = asyncio.ensure_future(batcher.submit(1, 1))
        await asyncio.sleep(0.01)
        await asyncio.gather(late(), batcher.submit(3, 1))
        assert 10 == await first
        assert [[1], [3]] == sink.batches

    asyncio.run(main())


def test_a_failed_batch_tells_every_entry_and_the_next_one_runs() -> None:
    """Rule: the database's failure reaches all who were in the batch; the batcher lives on."""

    async def main() -> None:
        failures: list[Exception] = [UnavailableError("gone"), RuntimeError("bug")]

        async def run(entries: Sequence[int]) -> Sequence[int | ShardbookError]:
            if failures:
                raise failures.pop(0)
            return list(entries)

        batcher: Batcher[int, int] = Batcher("entries", run, ROOMY)
        for kind in (UnavailableError, RuntimeError):
            outcomes = await asyncio.gather(batcher.submit(1, 1), batcher.submit(2, 1), return_exceptions=True)
            assert [kind, kind] == [type(outcome) for outcome in outcomes]
        assert 3 == await batcher.submit(3, 1)

    asyncio.run(main())


def test_verdicts_that_do_not_match_their_entries_are_a_bug() -> None:
    """Rule: nobody ever gets another entry's verdict."""

    async def main() -> None:
        async def run(entries: Sequence[int]) -> Sequence[int | ShardbookError]:
            return list(entries)[1:]

        batcher: Batcher[int, int] = Batcher("entries", run, ROOMY)
        outcomes = await asyncio.gather(batcher.submit(1, 1), batcher.submit(2, 1), return_exceptions=True)
        assert [InternalError] * 2 == [type(outcome) for outcome in outcomes]

    asyncio.run(main())


def test_closing_writes_what_is_queued() -> None:
    """Rule: a drain flushes the queue, then refuses."""

    async def main() -> None:
        sink = Sink(0.01)
        batcher = Batcher("entries", sink, BatchLimits(1, 10, 100, 100))
        calls = [asyncio.ensure_future(batcher.submit(entry, 1)) for entry in range(5)]
        await asyncio.sleep(0)
        await batcher.close()
        assert [0, 10, 20, 30, 40] == await asyncio.gather(*calls)
        with pytest.raises(UnavailableError):
            await batcher.submit(1, 1)

    asyncio.run(main())
