"""P9, rows 14 and 30: a server that is slow, silent or failing at each step of a save; ranks without a route."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardbook.dcp import SaveState
from shardbook.sync import SyncOutcome
from tests.faults import hurt
from tests.faults.proxy import Fault, TcpProxy
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint, p9_save_outlives_service
from tests.torch import jobs as torch_jobs
from tests.torch.harness import RankPool

#: What an outage may cost, seconds: once, and then a save.
_FIRST_S, _LATER_S = 2.0, 0.5
_PATIENCE = {"SHARDBOOK_OUTAGE_FIRST_S": str(_FIRST_S), "SHARDBOOK_OUTAGE_LATER_S": str(_LATER_S)}
#: What a save costs anyway on a machine that does other things too, seconds.
_SLACK_S = 10.0
#: Tries of a rank's calls while an outage is found out, and in a later save of the same outage.
_FIRST_TRIES, _LATER_TRIES = 60, 20

_OUTAGES = {
    "silence before plan": ("plan", Fault("blackhole")),
    "silence before commit": ("commit", Fault("blackhole")),
    "resets before register": ("register", Fault("reset")),
    "requests cut": ("register", Fault("cut", 300)),
    "replies cut": ("plan", Fault("cut-reply", 20)),
}
_HICCUPS = {
    "a slow server": ("plan", Fault("delay", 0.15)),
    "one request cut": ("register", Fault("cut", 40, once=True)),
    "one reply to commit cut": ("commit", Fault("cut-reply", 0, once=True)),
}


@pytest.fixture
def proxy(shared_server: ServerProcess) -> Iterator[TcpProxy]:
    """A proxy before the server."""
    with TcpProxy(shared_server.address) as running:
        yield running


@pytest.mark.parametrize("case", _OUTAGES)
@pytest.mark.soak_with("silence before commit")
def test_an_outage_costs_a_bounded_time_once(
    pool: RankPool, proxy: TcpProxy, shared_server: ServerProcess, run: str, tmp_path: Path, case: str
) -> None:
    """The save in which it begins pays for finding out, the next one hardly anything; both are on storage."""
    phase, fault = _OUTAGES[case]
    start = {"run": run, "server": proxy.address}
    arguments = (start, str(tmp_path), phase, proxy.control, fault)
    saved = pool.run(hurt.save_through, *arguments, world_size=2, environment=_PATIENCE)
    assert proxy.struck_count > 0
    states = [[one.result.state for one in ranks] for ranks in zip(*saved, strict=True)]
    # The first step only makes the fault strike a session that works; on a busy machine it may itself be too slow.
    assert [[SaveState.UNREGISTERED] * 2] * 2 == states[1:]
    for _, second, third in saved:
        assert second.elapsed_s < _FIRST_S + _SLACK_S
        assert third.elapsed_s < _LATER_S + _SLACK_S
        assert second.try_count < _FIRST_TRIES
        assert third.try_count < _LATER_TRIES
    directories = [tmp_path / "step-2", tmp_path / "step-3"]
    second_step, third_step = p9_save_outlives_service(pool, shared_server.client, run, directories)
    # A request may have arrived whose answer did not.
    assert phase == "commit" or SyncOutcome.RECORDED == second_step.outcome
    assert SyncOutcome.RECORDED == third_step.outcome


@pytest.mark.parametrize("case", _HICCUPS)
def test_a_hiccup_costs_no_save(
    pool: RankPool, proxy: TcpProxy, shared_server: ServerProcess, run: str, tmp_path: Path, case: str
) -> None:
    """What is slow is waited for, what was cut is asked again, and happens once."""
    phase, fault = _HICCUPS[case]
    start = {"run": run, "server": proxy.address}
    saved = pool.run(hurt.save_through, start, str(tmp_path), phase, proxy.control, fault, world_size=2)
    assert proxy.struck_count > 0
    assert {SaveState.COMMITTED} == {one.result.state for ranks in saved for one in ranks}
    attempts = p2_no_torn_checkpoint(shared_server.client, run)
    assert [(3, 1), (2, 1), (1, 1)] == [(one.step, one.attempt) for one in attempts]


@pytest.fixture(scope="module")
def erring_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that every test starts with errors of its own."""
    server = ServerProcess(tmp_path_factory.mktemp("erring"))
    yield server
    server.kill()


@pytest.mark.parametrize("call", ["plan", "register", "commit"])
def test_a_server_that_answers_with_errors(
    pool: RankPool, run: str, tmp_path: Path, call: str, erring_server: ServerProcess
) -> None:
    """Errors that say nothing about the save are an outage like silence."""
    erring_server.restart(f"{call}.before_db=error(1)")
    start = {"run": run, "server": erring_server.address}
    paths = [str(tmp_path / f"step-{step}") for step in (1, 2)]
    saved = pool.run(hurt.save_steps, start, paths, world_size=2, environment=_PATIENCE)
    states = {one.result.state for ranks in saved for one in ranks}
    # Without the election alone, ranks write duplicates, and may have the time to register them.
    assert {SaveState.UNREGISTERED} == states or (call == "plan" and SaveState.COMMITTED in states)
    for first, second in saved:
        assert first.elapsed_s < _FIRST_S + _SLACK_S
        assert second.elapsed_s < _LATER_S + _SLACK_S
        assert first.try_count < _FIRST_TRIES
        assert second.try_count < _LATER_TRIES
    p9_save_outlives_service(pool, erring_server.client, run, [Path(path) for path in paths])


def test_one_rank_without_a_route_does_not_sink_the_save(
    pool: RankPool, proxy: TcpProxy, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Its record is found on storage, and the coordinator registers it."""
    proxy.switch(Fault("blackhole"))
    path = str(tmp_path / "step-1")
    start = {"run": run, "server": shared_server.address}
    saved = pool.run(
        hurt.save_by_another_route,
        start,
        path,
        1,
        proxy.address,
        world_size=3,
        environment={"SHARDBOOK_PLAN_WAIT_S": "1"},
        environments=[{}, _PATIENCE, {}],
    )
    assert proxy.struck_count > 0
    assert [SaveState.COMMITTED, SaveState.UNREGISTERED, SaveState.COMMITTED] == [one.state for one in saved]
    (one,) = p2_no_torn_checkpoint(shared_server.client, run)
    assert {one.name} == {saved[0].name, saved[2].name}
    environment = {"SHARDBOOK_SERVER": shared_server.address}
    loaded = pool.run(torch_jobs.load, "fsdp", [saved[0].ref, path], world_size=2, environment=environment)
    assert [{saved[0].ref: [], path: []}] * 2 == loaded
