"""The bridge: bounded threads, one writer, work that outlives its caller."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from shardbook.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from shardbook_server.failpoints import Failpoints
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.call import Call, current_call, set_current_call


@asynccontextmanager
async def _bridge(
    *, threads: int = 4, heavy_threads: int = 2, queue_limit: int = 100, failpoints: str = ""
) -> AsyncIterator[Bridge]:
    bridge = Bridge(
        threads=threads,
        heavy_threads=heavy_threads,
        writers=1,
        queue_limit=queue_limit,
        failpoints=Failpoints.parse(failpoints),
    )
    try:
        yield bridge
    finally:
        await bridge.close()


def test_the_event_loop_runs_on_while_calls_block() -> None:
    """Rule: nothing that a service does stops the event loop."""

    async def main() -> None:
        async with _bridge() as bridge:
            blocked = asyncio.gather(*(bridge.read(time.sleep, 0.2) for _ in range(4)))
            ticks = 0
            while not blocked.done():
                await asyncio.sleep(0.01)
                ticks += 1
            assert ticks >= 5

    asyncio.run(main())


def test_writers_take_turns_and_leave_the_threads_to_readers() -> None:
    """Rule: on SQLite one write runs at a time, and those behind it hold no thread."""

    async def main() -> None:
        running: list[int] = []
        most = 0
        go_on = threading.Event()

        def write() -> None:
            nonlocal most
            running.append(1)
            most = max(most, len(running))
            time.sleep(0.005)
            assert go_on.wait(20)
            running.pop()

        async with _bridge(threads=2) as bridge:
            writes = [asyncio.ensure_future(bridge.write("commit", write)) for _ in range(20)]
            await asyncio.sleep(0.05)
            assert 7 == await bridge.read(lambda: 7)
            assert not any(call.done() for call in writes)
            go_on.set()
            await asyncio.gather(*writes)
        assert 1 == most

    asyncio.run(main())


def test_a_full_queue_is_refused_with_a_delay() -> None:
    """Rule: beyond the limit the answer is RESOURCE_EXHAUSTED with RetryInfo, at once."""

    async def main() -> None:
        async with _bridge(threads=1, queue_limit=3) as bridge:
            held = [asyncio.ensure_future(bridge.read(time.sleep, 0.05)) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(ResourceExhaustedError) as refused:
                await bridge.read(lambda: 1)
            assert "SERVER_BUSY" == refused.value.reason
            assert refused.value.retry_delay_s is not None
            await asyncio.gather(*held)
            assert 0 == bridge.pending_count
            assert 1 == await bridge.read(lambda: 1)

    asyncio.run(main())


def test_a_write_that_began_ends_although_its_caller_was_cancelled() -> None:
    """Rule: a client's deadline in mid-write leaves the whole write, and the writers' turn with it."""

    async def main() -> None:
        began, done = threading.Event(), threading.Event()

        def write() -> None:
            began.set()
            time.sleep(0.1)
            done.set()

        async with _bridge() as bridge:
            call = asyncio.ensure_future(bridge.write("commit", write))
            await asyncio.to_thread(began.wait)
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
            # The next write waits for the one that nobody waits for any more.
            assert await bridge.write("commit", done.is_set)

    asyncio.run(main())


def test_a_write_whose_caller_left_before_its_turn_never_happens() -> None:
    """Rule: what has not begun when its client goes is absent."""

    async def main() -> None:
        happened: list[str] = []
        async with _bridge() as bridge:
            first = asyncio.ensure_future(bridge.write("commit", time.sleep, 0.1))
            second = asyncio.ensure_future(bridge.write("commit", happened.append, "second"))
            await asyncio.sleep(0.02)
            second.cancel()
            await asyncio.gather(first, bridge.write("commit", happened.append, "third"))
        assert ["third"] == happened

    asyncio.run(main())


def test_a_call_past_its_deadline_is_not_begun() -> None:
    """Rule: a queue does not spend the database on answers that nobody waits for."""

    async def main() -> None:
        happened: list[str] = []
        async with _bridge(threads=1) as bridge:
            first = asyncio.ensure_future(bridge.read(time.sleep, 0.1))
            await asyncio.sleep(0.01)
            set_current_call(Call("/x", "id", time.monotonic() + 0.03))
            with pytest.raises(DeadlineExceededError):
                await bridge.read(happened.append, "late")
            await first
        assert [] == happened

    asyncio.run(main())


def test_heavy_calls_with_one_key_share_one_run() -> None:
    """Rule: many who ask for the same assembly cost one, and cancelling one of them cancels nothing."""

    async def main() -> None:
        runs: list[int] = []

        def compute() -> int:
            runs.append(1)
            time.sleep(0.05)
            return len(runs)

        async with _bridge() as bridge:
            calls = [asyncio.ensure_future(bridge.heavy("commit", "key", compute)) for _ in range(10)]
            await asyncio.sleep(0.01)
            calls[0].cancel()
            assert [1] * 9 == await asyncio.gather(*calls[1:])
            assert 2 == await bridge.heavy("commit", "key", compute)

    asyncio.run(main())


def _seven() -> int:
    time.sleep(0.05)
    return 7


def test_a_whole_world_may_join_a_run() -> None:
    """Rule: who joins holds no thread and no place in the queue."""

    async def main() -> None:
        async with _bridge(queue_limit=2) as bridge:
            calls = [bridge.read_shared("key", _seven) for _ in range(1000)]
            assert [7] * 1000 == await asyncio.gather(*calls)
            assert 0 == bridge.pending_count

    asyncio.run(main())


def test_those_who_join_a_run_late_do_not_get_its_failure() -> None:
    """Rule: a commit that began before the last rank registered says nothing to a commit asked for after that."""

    async def main() -> None:
        registered: list[bool] = []
        runs: list[bool] = []

        def commit() -> str:
            there = bool(registered)
            runs.append(there)
            time.sleep(0.05)
            if not there:
                raise KeyError("missing")
            return "committed"

        async with _bridge() as bridge:
            early = asyncio.ensure_future(bridge.heavy("commit", "key", commit))
            await asyncio.sleep(0.02)
            registered.append(True)
            late = [asyncio.ensure_future(bridge.heavy("commit", "key", commit)) for _ in range(5)]
            with pytest.raises(KeyError):
                await early
            assert ["committed"] * 5 == await asyncio.gather(*late)
        assert [False, True] == runs

    asyncio.run(main())


def test_a_failure_that_lasts_reaches_all_at_the_price_of_two_runs() -> None:
    """Rule: asking anew happens once, for all who joined late together."""

    async def main() -> None:
        runs: list[int] = []

        def commit() -> None:
            runs.append(1)
            time.sleep(0.03)
            raise KeyError("missing")

        async with _bridge() as bridge:
            calls = [asyncio.ensure_future(bridge.heavy("commit", "key", commit)) for _ in range(50)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {KeyError} == {type(outcome) for outcome in outcomes}
        assert 2 == len(runs)

    asyncio.run(main())


def test_a_heavy_call_leaves_the_short_ones_their_threads() -> None:
    """Rule: assembly has threads of its own."""

    async def main() -> None:
        async with _bridge(threads=1, heavy_threads=1) as bridge:
            go_on = threading.Event()
            slow = asyncio.ensure_future(bridge.heavy("commit", "a", go_on.wait, 20))
            await asyncio.sleep(0.01)
            await bridge.read(lambda: None)
            await bridge.write("plan", lambda: None)
            assert not slow.done()
            go_on.set()
            assert await slow

    asyncio.run(main())


def test_a_stream_reads_a_step_at_a_time() -> None:
    """Rule: nothing is read ahead of the client, and each step runs in a thread."""

    async def main() -> None:
        produced: list[int] = []
        loop_thread = threading.get_ident()

        def items() -> Iterator[int]:
            for number in range(3):
                assert threading.get_ident() != loop_thread
                produced.append(number)
                yield number

        async with _bridge() as bridge:
            taken = []
            async for item in bridge.stream(items):
                taken.append(item)
                assert taken == produced
        assert [0, 1, 2] == taken

    asyncio.run(main())


def test_errors_of_a_service_reach_the_caller() -> None:
    """Rule: the bridge changes no error, and keeps no thread because of one."""

    async def main() -> None:
        def fail() -> None:
            raise KeyError("x")

        async with _bridge(threads=1) as bridge:
            for call in (bridge.read(fail), bridge.write("commit", fail), bridge.heavy("commit", 1, fail)):
                with pytest.raises(KeyError):
                    await call
            assert 0 == bridge.pending_count

    asyncio.run(main())


def test_threads_know_the_call_that_they_work_for() -> None:
    """Rule: a log line written by a service carries the request id of its call."""

    async def main() -> None:
        set_current_call(Call("/x", "id-7"))
        async with _bridge() as bridge:
            assert "id-7" == (await bridge.read(current_call)).request_id
            assert "id-7" == (await bridge.write("commit", current_call)).request_id

    asyncio.run(main())


def test_failpoints_stand_around_writes() -> None:
    """Rule: `before_db` leaves nothing behind; `after_db` leaves the write, and an error that hides it."""

    async def main() -> None:
        happened: list[str] = []
        async with _bridge(failpoints="commit.before_db=error; plan.after_db=error") as bridge:
            with pytest.raises(UnavailableError):
                await bridge.heavy("commit", 1, happened.append, "commit")
            with pytest.raises(UnavailableError):
                await bridge.write_own("plan", happened.append, "plan")
        assert ["plan"] == happened

    asyncio.run(main())


def test_closing_waits_for_what_runs_and_refuses_what_comes() -> None:
    """Rule: a drained server has finished every write that it began."""

    async def main() -> None:
        happened: list[str] = []

        def write() -> None:
            time.sleep(0.05)
            happened.append("write")

        async with _bridge() as bridge:
            call = asyncio.ensure_future(bridge.write("commit", write))
            await asyncio.sleep(0.01)
            await bridge.close()
            assert ["write"] == happened
            with pytest.raises(UnavailableError):
                await bridge.read(lambda: None)
            await call

    asyncio.run(main())
