"""How many calls a save makes: at 16,384 ranks each one more costs seconds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from shardbook.dcp import SaveState
from shardbook_server.rpc.call import Call
from shardbook_server.rpc.watch import Watch
from tests.torch import jobs
from tests.torch.harness import RankPool

WORLD = 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the server has answered so far, by name of the call."""
    found: Counter[str] = Counter()
    original = Watch.answered

    def answered(watch: Watch, call: Call, began_s: float) -> None:
        found[call.method.rpartition("/")[2]] += 1
        original(watch, call, began_s)

    monkeypatch.setattr(Watch, "answered", answered)
    return found


def test_a_steady_save_is_two_calls_a_rank_and_a_commit(
    pool: RankPool, server: str, run: str, tmp_path: Path, calls: Counter[str]
) -> None:
    """Rule: one PlanSave and one RegisterShards of every rank, one CommitCheckpoint; nothing is asked for twice."""
    start = {"run": run, "server": server}
    paths = [str(tmp_path / f"step-{step}") for step in range(4)]
    pool.run(jobs.save_unhurried, "fsdp", paths[:1], start, world_size=WORLD)
    first = Counter(calls)
    calls.clear()
    saved = pool.run(jobs.save_unhurried, "fsdp", paths[1:], start | {"on_live": "takeover"}, world_size=WORLD)
    assert {SaveState.COMMITTED} == {result.state for one in saved for result in one.results}
    per_save = {name: calls[name] / 3 for name in ("PlanSave", "RegisterShards", "CommitCheckpoint")}
    assert {"PlanSave": WORLD, "RegisterShards": WORLD, "CommitCheckpoint": 1} == per_save
    assert 0 == calls["GetCheckpointProgress"]
    assert first["PlanSave"] <= 2 * WORLD
