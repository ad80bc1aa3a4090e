"""What an outage costs a save, over real sockets: silence, refusal, errors, and finding out that it is over.

What a save may lose is asserted of its own account, which is exact; of the clock on the wall only that the call ended
far from its deadline of a minute, for a machine may be busy.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest

from shardbook import _saving, errors
from shardbook.breaker import CircuitBreaker, SaveBudget
from shardbook.client import Client
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.client.scripted import ScriptedServer, failing_first, refuse, scripted_server, unavailable
from tests.behaviour.rpc.api import wait_until

OK = pb.RegisterShardsResponse()
REQUEST = pb.RegisterShardsRequest()


#: Far from a call's deadline, and from any share.
SOON_S = 20.0


def register(client: Client, breaker: CircuitBreaker) -> SaveBudget:
    """One save that only registers."""
    save = breaker.start_save()
    started = time.monotonic()
    with suppress(errors.ShardbookError):
        client.guarded(save).register_shards(REQUEST, deadline_s=60)
    assert time.monotonic() - started < SOON_S
    return save


def test_dead_server_costs_the_first_save_more_than_the_later_ones(free_port: int) -> None:
    """Nobody listens: the first save pays the long share, the next ones the short one."""
    breaker = CircuitBreaker(first_s=1.0, later_s=0.2)
    client = Client(f"127.0.0.1:{free_port}")
    saves = [register(client, breaker) for _ in range(3)]
    assert 0.4 < saves[0].spent_s <= 1.0
    assert all(save.spent_s <= 0.2 for save in saves[1:])
    assert [errors.UnavailableError] * 3 == [type(save.outage) for save in saves]


def test_silent_server_costs_the_same() -> None:
    """A server that accepts calls and never answers is an outage like one that is gone."""
    release = threading.Event()

    def hang(*_: Any) -> pb.RegisterShardsResponse:
        release.wait(60)
        return OK

    breaker = CircuitBreaker(first_s=0.8, later_s=0.1)
    with scripted_server(RegisterShards=hang) as server:
        spent_s = [register(Client(server.target), breaker).spent_s for _ in range(3)]
        release.set()
    assert 0.7 < spent_s[0] <= 0.8
    assert all(one_s <= 0.1 for one_s in spent_s[1:])


def test_second_call_of_a_save_is_refused_once_the_budget_is_spent(free_port: int) -> None:
    """A save pays once, however many calls it still wanted to make."""
    save = CircuitBreaker(first_s=0.3, later_s=0.1).start_save()
    client = Client(f"127.0.0.1:{free_port}").guarded(save)
    started = time.monotonic()
    while not save.is_exhausted:
        with pytest.raises((errors.UnavailableError, errors.DeadlineExceededError)):
            client.register_shards(REQUEST)
    with pytest.raises(errors.UnavailableError, match="goes on without it") as caught:
        client.register_shards(REQUEST)
    assert "CIRCUIT_OPEN" == caught.value.reason
    assert save.spent_s <= 0.3
    assert time.monotonic() - started < SOON_S


def test_late_answer_to_a_probe_is_evidence_for_the_next_save() -> None:
    """A server that is slow after an outage is trusted again by the next save, though no save waits for it."""

    def slow(*_: Any) -> pb.RegisterShardsResponse:
        time.sleep(0.4)
        return OK

    breaker = CircuitBreaker(first_s=SOON_S, later_s=0.1)
    breaker.failed("RegisterShards", breaker.start_save())
    with scripted_server(RegisterShards=slow) as server:
        client = Client(server.target)
        probed = register(client, breaker)
        assert probed.outage is not None
        assert probed.spent_s <= 0.1
        wait_until(lambda: not breaker.is_open)
        # 0.4 s is more than the short share: only the long one lets the answer through.
        assert None is register(client, breaker).outage


def test_denied_calls_cost_nothing_and_are_an_outage() -> None:
    """An expired token must not lose the save: no waiting, and the save learns why it is unregistered."""

    def deny(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED", "expired yesterday")

    breaker = CircuitBreaker()
    with scripted_server(RegisterShards=deny) as server:
        save = register(Client(server.target), breaker)
        assert 1 == server.count("RegisterShards")
    assert save.spent_s < breaker.later_s
    assert isinstance(save.outage, errors.UnauthenticatedError)
    assert breaker.is_open


WAITING = pb.PlanSaveResponse(state=pb.PlanSaveResponse.STATE_WAITING)
OPEN = pb.GetCheckpointProgressResponse()


def plan(client: Client, timeout_s: float) -> pb.PlanSaveResponse:
    """Plans and waits for the other ranks."""
    return client.plan_until_decided(pb.PlanSaveRequest(), lambda refs: [], timeout_s=timeout_s)


class Clock:
    """Monotonic seconds, and what was skipped."""

    skipped_s = 0.0

    def __call__(self) -> float:
        """The time."""
        return time.monotonic() + self.skipped_s


def wait_long(server: ScriptedServer, clock: Clock) -> None:
    """Has a call wait for longer than any share, while the server says that it lives."""
    wait_until(lambda: server.count("GetCheckpointProgress") >= 1)
    clock.skipped_s += 3 * SOON_S
    seen = server.count("GetCheckpointProgress")
    # One that began after the clock went on, and another: so the first was answered.
    wait_until(lambda: server.count("GetCheckpointProgress") >= seen + 2)


def test_waiting_server_is_no_outage() -> None:
    """A server that lives may hold a rank for as long as it is asked to, far beyond the budget, in one call."""

    def handle(request: pb.PlanSaveRequest, _: Any) -> pb.PlanSaveResponse:
        time.sleep(request.wait.ToTimedelta().total_seconds())
        return WAITING

    save = CircuitBreaker(first_s=0.3, later_s=0.1).start_save()
    with scripted_server(PlanSave=handle, GetCheckpointProgress=lambda *_: OPEN) as server:
        started = time.monotonic()
        assert WAITING == plan(Client(server.target).guarded(save), 1.2)
        assert time.monotonic() - started > 1
        assert server.count("PlanSave") <= 2
    assert (None, 0.0) == (save.outage, save.spent_s)


def test_refusal_to_say_more_is_a_sign_of_life() -> None:
    """An attempt that is not known yet is an answer like any other."""

    def handle(request: pb.PlanSaveRequest, _: Any) -> pb.PlanSaveResponse:
        time.sleep(request.wait.ToTimedelta().total_seconds())
        return WAITING

    def unknown(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND")

    save = CircuitBreaker(first_s=0.3, later_s=0.1).start_save()
    with scripted_server(PlanSave=handle, GetCheckpointProgress=unknown) as server:
        assert WAITING == plan(Client(server.target).guarded(save), 0.8)
    assert None is save.outage


def test_probe_asks_for_less_than_its_save_may_lose() -> None:
    """While the circuit is open nothing is known of the server: a wait is not to use the share up."""

    def handle(request: pb.PlanSaveRequest, _: Any) -> pb.PlanSaveResponse:
        time.sleep(request.wait.ToTimedelta().total_seconds())
        return WAITING

    breaker = CircuitBreaker(first_s=1.0, later_s=0.5)
    breaker.failed("RegisterShards", breaker.start_save())
    with scripted_server(PlanSave=handle, GetCheckpointProgress=lambda *_: OPEN) as server:
        plan(Client(server.target).guarded(breaker.start_save()), 1.0)
        assert all(seen.wait.ToTimedelta().total_seconds() < 0.5 for seen in server.of("PlanSave"))


def test_server_that_restarts_while_ranks_wait_costs_its_absence_only(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for longer than the share costs nothing of it, so a short restart is got over within the save."""
    monkeypatch.setattr(_saving, "_LOOK_EVERY_S", 0.25)
    decided = pb.PlanSaveResponse(state=pb.PlanSaveResponse.STATE_DECIDED)
    clock = Clock()
    save = CircuitBreaker(first_s=SOON_S, later_s=0.1, clock=clock).start_save()
    answers: list[pb.PlanSaveResponse] = []
    released = threading.Event()

    def hold(*_: Any) -> pb.PlanSaveResponse:
        released.wait(60)
        return WAITING

    with scripted_server(free_port, PlanSave=hold, GetCheckpointProgress=lambda *_: OPEN) as server:
        client = Client(server.target).guarded(save)
        thread = threading.Thread(target=lambda: answers.append(plan(client, 60.0)))
        thread.start()
        wait_long(server, clock)
        server.stop()
    released.set()
    time.sleep(1.0)
    with scripted_server(free_port, PlanSave=lambda *_: decided, GetCheckpointProgress=lambda *_: OPEN):
        thread.join(40)
    assert [decided] == answers
    assert None is save.outage
    # The minute of waiting is no part of what is charged.
    assert 0.5 < save.spent_s < SOON_S


def test_server_that_falls_silent_while_ranks_wait_costs_no_more_than_the_share() -> None:
    """It answers nothing any more: the next look notices."""
    release, silent = threading.Event(), threading.Event()

    def hold(*_: Any) -> pb.PlanSaveResponse:
        release.wait(60)
        return WAITING

    def progress(*_: Any) -> pb.GetCheckpointProgressResponse:
        if silent.is_set():
            release.wait(60)
        return OPEN

    clock = Clock()
    save = CircuitBreaker(first_s=2.0, later_s=0.1, clock=clock).start_save()
    with scripted_server(PlanSave=hold, GetCheckpointProgress=progress) as server, ThreadPoolExecutor(1) as pool:
        planned = pool.submit(plan, Client(server.target).guarded(save), 60.0)
        wait_long(server, clock)
        assert not planned.done()
        silent.set()
        with pytest.raises(errors.DeadlineExceededError):
            planned.result(SOON_S)
        release.set()
    assert save.is_exhausted
    assert save.spent_s <= 2.0


def test_every_message_of_a_save_is_counted() -> None:
    """Those that were sent again too, and nothing else."""
    request = pb.RegisterShardsRequest(host="node-0")
    save, other = (CircuitBreaker().start_save() for _ in range(2))
    with scripted_server(RegisterShards=failing_first(2, unavailable, OK)) as server:
        Client(server.target).guarded(save).register_shards(request)
        Client(server.target).register_shards(request)
    # gRPC's own quick retries hide behind one message of ours.
    assert save.sent_bytes in [count * request.ByteSize() for count in (1, 2, 3)]
    assert 0 == other.sent_bytes


@pytest.mark.parametrize("reason", ["SESSION_FENCED", "RANK_FAILED", "RANKS_MISSING", "CHECKPOINT_CLOSED"])
def test_answers_are_no_outage(reason: str) -> None:
    """An error about the save is an answer of a healthy server."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, grpc.StatusCode.FAILED_PRECONDITION, reason)

    breaker = CircuitBreaker()
    with scripted_server(RegisterShards=handle) as server:
        assert None is register(Client(server.target), breaker).outage
    assert not breaker.is_open
