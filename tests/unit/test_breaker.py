"""The circuit breaker by its clock: 10 s once, then 1 s per save, and back."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook import errors
from shardbook.breaker import FIRST_S, LATER_S, CircuitBreaker, SaveBudget, is_outage


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        """Returns the time."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


def call(save: SaveBudget, clock: Clock, takes_s: float, error: errors.ShardbookError | None, name: str = "R") -> float:
    """Makes one call that takes as long as it may and then ends; returns the seconds that the save waited."""
    started_s = clock.now_s
    try:
        with save.call(name) as guarded:
            clock.now_s += min(takes_s, guarded.silence_s)
            if error is not None:
                raise error
    except errors.ShardbookError:
        pass
    return clock.now_s - started_s


def lost(breaker: CircuitBreaker, clock: Clock, calls: int = 3, takes_s: float = 1e9) -> float:
    """One save whose calls all meet silence; returns the seconds it lost."""
    save = breaker.start_save()
    return sum(call(save, clock, takes_s, errors.DeadlineExceededError("silence")) for _ in range(calls))


def test_outage_costs_ten_seconds_once_then_one_per_save(clock: Clock) -> None:
    """The promise, by the defaults, whatever the number of calls in a save."""
    breaker = CircuitBreaker(clock=clock)
    assert [10.0, 1.0, 1.0, 1.0] == [lost(breaker, clock) for _ in range(4)]
    assert (10.0, 1.0) == (FIRST_S, LATER_S)


@given(st.lists(st.lists(st.floats(0, 100), max_size=6), max_size=6))
def test_no_mix_of_failing_calls_costs_more(saves: list[list[float]]) -> None:
    """Refused at once, timing out, or anything between: the first save pays at most 10 s, every other at most 1 s."""
    clock = Clock()
    breaker = CircuitBreaker(clock=clock)
    met = False
    for takes in saves:
        save = breaker.start_save()
        cost_s = sum(call(save, clock, seconds, errors.UnavailableError("down")) for seconds in takes)
        assert cost_s <= (1.0 if met else 10.0) + 1e-6
        met = met or bool(takes)


def test_calls_after_the_budget_is_spent_are_not_made(clock: Clock) -> None:
    """They are refused at once, with a reason that says why the save goes on alone."""
    breaker = CircuitBreaker(clock=clock)
    save = breaker.start_save()
    call(save, clock, 99, errors.UnavailableError("connection refused"))
    with pytest.raises(errors.UnavailableError, match=r"10\.0 s .* connection refused") as caught, save.call("Commit"):
        raise AssertionError("the call was made")
    assert "CIRCUIT_OPEN" == caught.value.reason
    assert save.is_exhausted


def test_silence_ends_with_what_is_left_of_the_budget(clock: Clock) -> None:
    """A second call of the paying save gets the rest, not another ten seconds."""
    breaker = CircuitBreaker(clock=clock)
    save = breaker.start_save()
    call(save, clock, 4, errors.UnavailableError("down"))
    with save.call("Commit") as guarded:
        assert 6.0 == guarded.silence_s


def test_answered_probe_closes_the_circuit_within_the_save(clock: Clock) -> None:
    """Once the call that met the outage is answered, the rest of the save has the long share again."""
    breaker = CircuitBreaker(clock=clock)
    lost(breaker, clock)
    save = breaker.start_save()
    assert 1.0 == save.remaining_s
    call(save, clock, 0.5, None)
    assert not breaker.is_open
    assert 10.0 == save.remaining_s


def test_call_that_still_fails_keeps_the_circuit_open(clock: Clock) -> None:
    """A service whose plans work and whose registrations hang costs 1 s per save, not 10."""
    breaker = CircuitBreaker(clock=clock)

    def save_once() -> float:
        save = breaker.start_save()
        call(save, clock, 0.1, None, "PlanSave")
        return call(save, clock, 99, errors.DeadlineExceededError("silence"), "RegisterShards")

    assert [10.0, 1.0, 1.0] == [save_once() for _ in range(3)]


def test_healthy_save_closes_the_circuit_whatever_opened_it(clock: Clock) -> None:
    """A call that no save makes again, such as StartSession, does not keep later saves short for ever."""
    breaker = CircuitBreaker(clock=clock)
    call(breaker.start_save(), clock, 99, errors.UnavailableError("down"), "StartSession")
    call(breaker.start_save(), clock, 0.5, None, "RegisterShards")
    assert 10.0 == breaker.start_save().remaining_s


def test_save_without_calls_says_nothing(clock: Clock) -> None:
    """Only answers are evidence: an offline save leaves the circuit as it was."""
    breaker = CircuitBreaker(clock=clock)
    lost(breaker, clock)
    breaker.start_save()
    assert 1.0 == breaker.start_save().remaining_s


def test_late_answer_closes_the_circuit(clock: Clock) -> None:
    """The answer to a probe counts when it comes, though its save has gone on."""
    breaker = CircuitBreaker(clock=clock)
    lost(breaker, clock)
    save = breaker.start_save()
    with suppress(errors.DeadlineExceededError), save.call("R") as guarded:
        clock.now_s += guarded.silence_s
        assert (1.0, 10.0) == (guarded.silence_s, guarded.linger_s)
        raise errors.DeadlineExceededError("not yet")
    guarded.answered()
    assert not breaker.is_open


def test_outage_that_ends_within_a_call_costs_what_it_lasted(clock: Clock) -> None:
    """From the failure to the next sign of life; the save goes on with what is left of its share."""
    save = CircuitBreaker(clock=clock).start_save()
    with save.call("PlanSave") as guarded:
        clock.now_s += 60
        guarded.alive()
        clock.now_s += 30
        guarded.failed(errors.UnavailableError("cut"))
        clock.now_s += 3
        guarded.alive()
        clock.now_s += 50
    assert (5.0, 5.0) == (save.spent_s, save.remaining_s)  # two of them gRPC may have hidden
    assert None is save.outage


def test_silence_of_a_call_counts_from_its_beginning_until_the_server_was_heard(clock: Clock) -> None:
    """A server that was never there is no connection that broke."""
    save = CircuitBreaker(clock=clock).start_save()
    with suppress(errors.UnavailableError), save.call("PlanSave") as guarded:
        clock.now_s += 4
        guarded.failed(errors.UnavailableError("refused"))
        clock.now_s += 1
        raise errors.UnavailableError("refused")
    assert 5.0 == save.spent_s


def test_signs_of_life_are_not_charged(clock: Clock) -> None:
    """A commit that works for a minute and then meets an outage costs the silence only."""
    save = CircuitBreaker(clock=clock).start_save()
    with suppress(errors.UnavailableError), save.call("CommitCheckpoint") as guarded:
        clock.now_s += 60
        guarded.alive()
        clock.now_s += 3
        raise errors.UnavailableError("gone")
    assert 3.0 == save.spent_s


def test_two_saves_at_once_do_not_both_pay_in_full(clock: Clock) -> None:
    """A save that began before another met the outage has the short share from then on."""
    breaker = CircuitBreaker(clock=clock)
    first, second = breaker.start_save(), breaker.start_save()
    call(first, clock, 2, errors.UnavailableError("down"))
    assert (8.0, 1.0) == (first.remaining_s, second.remaining_s)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.UnavailableError("x"), True),
        (errors.DeadlineExceededError("x"), True),
        (errors.UnauthenticatedError("x"), True),
        (errors.PermissionDeniedError("x"), True),
        (errors.ResourceExhaustedError("x"), True),
        (errors.InternalError("x"), True),
        (errors.ShardbookError("x", reason="UNIMPLEMENTED"), True),
        (errors.RankFailedError("x"), False),
        (errors.RanksMissingError("x"), False),
        (errors.SessionFencedError("x"), False),
        (errors.CheckpointClosedError("x"), False),
        (errors.InvalidArgumentError("x"), False),
        (errors.NotFoundError("x"), False),
        (errors.AlreadyExistsError("x"), False),
        (errors.ForkedClientError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_what_is_an_outage(error: Exception, expected: bool) -> None:
    """Silence and errors that say nothing about the save; never an answer about it."""
    assert expected is is_outage(error)


def test_client_side_errors_are_neither_outage_nor_answer(clock: Clock) -> None:
    """A forked child's error says nothing about the server."""
    breaker = CircuitBreaker(clock=clock)
    lost(breaker, clock)
    save = breaker.start_save()
    call(save, clock, 0, errors.ForkedClientError("forked"))
    assert breaker.is_open
    assert None is save.outage


def test_breaker_is_shared_by_threads() -> None:
    """Concurrent saves neither lose a failure nor leave the circuit open after answers."""
    breaker = CircuitBreaker()

    def work(number: int) -> None:
        for index in range(200):
            save = breaker.start_save()
            try:
                with save.call(f"call-{number}"):
                    if index % 2 == 0:
                        raise errors.UnauthenticatedError("denied")
            except errors.UnauthenticatedError:
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Every thread's last call was answered.
    assert not breaker.is_open
