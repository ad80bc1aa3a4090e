"""``async_save`` by a process of Shardbook's own: the same checkpoints, no process group, nothing left behind."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shardbook import Client, dcp
from shardbook.config import ClientConfig
from shardbook.dcp import SaveState
from shardbook.dcp.runtime import current
from shardbook.dcp.save_process_handle import save_process_of
from shardbook.errors import InvalidArgumentError, UnregisteredError
from tests.torch import jobs, process_jobs
from tests.torch.harness import RankPool
from tests.torch.inside import NOTHING

#: What a process does has nothing to do with the kind of database.
pytestmark = pytest.mark.soak_with("postgres")

_LAYOUTS = ["fsdp", "hsdp", "plain", "sharded_tensor", "uneven", "objects"]


def _facts(result: dcp.SaveResult) -> tuple[Any, ...]:
    stats = result.stats
    return result.state, result.reason, stats.planned_count, stats.written_count, stats.written_bytes


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
@pytest.mark.soak_with("offline")
def test_a_process_saves_what_a_thread_saves(
    pool: RankPool, server: str, run: str, tmp_path: Path, online: bool
) -> None:
    """Bit for bit, whatever the parallelism, of what was there when ``async_save`` returned; nobody says a word."""
    start = {"run": run, "server": server} if online else {"run": run, "mode": "offline"}
    compared = pool.run(process_jobs.save_layouts, _LAYOUTS, str(tmp_path), start, world_size=2)
    expected = SaveState.COMMITTED if online else SaveState.UNREGISTERED
    for one in compared:
        assert {expected} == {result.state for result in one.by_process.values()}
        for layout in _LAYOUTS:
            assert _facts(one.by_thread[layout]) == _facts(one.by_process[layout])
        assert [] == one.noticed
        assert 1 == len(one.pids), "every save had a process of its own"
    for layout in _LAYOUTS:
        refs = [compared[0].by_process[layout].ref, str(tmp_path / f"{layout}-process")]
        environment = {"SHARDBOOK_SERVER": server}
        loaded = pool.run(jobs.load, layout, refs, world_size=2, environment=environment)
        assert [{ref: [] for ref in refs}] * 2 == loaded
        assert [{refs[1]: []}] * 2 == pool.run(jobs.load, layout, refs[1:], True, world_size=2)
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert [NOTHING, NOTHING] == reports


@pytest.mark.soak
def test_saves_in_a_row_with_one_writer_and_planner(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Each saves what the tensors were when it began: the save process has copies of writer and planner."""
    saved = pool.run(process_jobs.save_in_a_row, str(tmp_path), {"run": run, "server": server}, world_size=2)
    assert {SaveState.COMMITTED} == {result.state for one in saved for result in one}
    for step in (1, 2, 3):
        state = {"w": torch.zeros(1000), "own0": torch.zeros(()), "own1": torch.zeros(())}
        dcp.load(state, str(tmp_path / f"step-{step}"))
        assert {float(step)} == {float(value) for tensor in state.values() for value in tensor.flatten()}
    assert 3 == Client(server).get_checkpoint(f"{run}@latest").step


@pytest.mark.soak
def test_ranks_save_parts_in_different_orders(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Saves run side by side in a save process, so none waits for one that another rank makes later."""
    start = {"run": run, "server": server}
    first, second = pool.run(process_jobs.save_in_any_order, str(tmp_path), start, world_size=2)
    assert ["COMMITTED", "COMMITTED", "default", "optim", "weights"] == first
    assert ["COMMITTED", "COMMITTED"] == second


@pytest.mark.soak
def test_a_submesh_saves_alone(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """The place among the ranks is the trainer's in its group, not what the environment says."""
    path, start = str(tmp_path / "step-1"), {"run": run, "server": server}
    saved = pool.run(process_jobs.save_as_submesh, [1], path, start, world_size=2, environment={"WORLD_SIZE": "2"})
    assert [None, SaveState.COMMITTED] == [one and one.state for one in saved]
    assert [{path: []}] == pool.run(jobs.load, "objects", [path], world_size=1)


@pytest.mark.soak
def test_what_cannot_travel_fails_on_all_ranks_at_once(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Typed and named where it is, ``RANK_FAILED`` on the others; nothing was written, and the next save is fine."""
    start = {"run": run, "server": server}
    one, other = pool.run(process_jobs.save_what_cannot_travel, str(tmp_path), start, world_size=2)
    assert [
        ("InvalidArgumentError", "UNPICKLABLE", {"fqn": "extra.odd.0"}),
        ("InvalidArgumentError", "UNPICKLABLE", {}),
        "COMMITTED",
    ] == other.ends
    assert [("RankFailedError", "RANK_FAILED")] * 2 == [end[:2] for end in one.ends[:2]]
    assert "COMMITTED" == one.ends[2]
    assert max(one.elapsed_s) < 60, "it waited for a rank that had failed"
    assert [] == list(tmp_path.glob("step-1/*/*.distcp"))


@pytest.mark.soak
def test_options_say_how_a_save_is_to_end(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """``wait``, ``export_metadata`` and ``timeout_s`` are those of ``save``."""
    start = {"run": run, "server": server}
    one, other = pool.run(process_jobs.save_with_options, str(tmp_path), start, world_size=2)
    assert ["COMMITTED", "COMMITTED"] == one[:2]
    assert ("RanksMissingError", "RANKS_MISSING") == one[2][:2]
    assert ["REGISTERED", "COMMITTED"] == other
    assert (tmp_path / "step-1" / ".metadata").exists()
    assert not (tmp_path / "step-2" / ".metadata").exists()


@pytest.mark.soak
def test_a_forked_child_is_refused(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """It would answer for its parent; and what it does on its way out harms no save of the parent's."""
    told = pool.run(process_jobs.save_in_fork, {"run": run, "server": server}, str(tmp_path), world_size=1)
    assert [("FORKED_CLIENT", "COMMITTED")] == told


def test_one_process_alone(
    session: dcp.Session, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One save process serves the session: it knows the server, speaks in our log, and goes with the session."""
    state = {"w": torch.arange(1000.0), "place": Path("/x")}
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        first = process_jobs.by_process(state, checkpoint_id="step-1").result()
    assert ["'place' needs"] == [
        record.getMessage()[at : at + 13]
        for record in caplog.records
        if (at := record.getMessage().find("'place' needs")) >= 0 and "save process of rank 0" in record.getMessage()
    ]
    pid = save_process_of(current()).pid
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    second = process_jobs.by_process(state, checkpoint_id="step-2").result()
    assert (SaveState.COMMITTED, SaveState.COMMITTED) == (first.state, second.state)
    assert second.stats.sent_bytes < first.stats.sent_bytes, "the structure was sent again"
    assert (tmp_path / "other" / "step-2" / ".metadata").exists()

    stager = process_jobs.LaterStager()
    response = process_jobs.by_process(state, checkpoint_id=tmp_path / "step-3", async_stager=stager)
    assert (False, False) == (response.staging_completion.done(), response.done())
    stager.future.set_result({"w": torch.ones(1000)})
    assert SaveState.COMMITTED is response.result().state
    loaded = {"w": torch.zeros(1000)}
    dcp.load(loaded, f"{session.run}@3")
    assert 1000 == loaded["w"].sum()

    assert pid == save_process_of(current()).pid
    dcp.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.soak
def test_a_session_that_begins_in_the_save_process(server: str, run: str, tmp_path: Path) -> None:
    """``init`` met an outage: the first save asks for the number, and the trainer keeps the lease."""
    config = ClientConfig(server=server)
    dcp.init(session=dcp.new_session(run, config))
    try:
        assert {} == current().sessions
        result = process_jobs.by_process({"w": torch.ones(1)}, checkpoint_id=tmp_path / "step-1").result()
        assert SaveState.COMMITTED is result.state
        assert {"default": 1} == current().sessions
        assert current().lease_ttl_s > 0
    finally:
        dcp.close()


def test_without_a_server(offline: dcp.Session, tmp_path: Path) -> None:
    """``strict`` raises what it would have raised, with the save process's traceback; memory cannot be shared."""
    state = {"w": torch.ones(1)}
    with pytest.raises(UnregisteredError) as caught:
        process_jobs.by_process(state, checkpoint_id=tmp_path / "step-1", strict=True).result()
    assert any("In the save process" in note for note in caught.value.__notes__)
    with pytest.raises(InvalidArgumentError) as refused:
        process_jobs.by_process(state, checkpoint_id="memory://step-2")
    assert "UNSUPPORTED_EXECUTOR" == refused.value.reason


_SCRIPT = """
import sys
import torch
from shardbook import dcp
from shardbook.dcp.save_process_handle import save_process_of
from shardbook.dcp.runtime import current

print("the script runs", flush=True)
dcp.init(run="tests/script", mode="offline")

class Settings:
    pass

process = dcp.AsyncCheckpointerType.PROCESS
try:
    dcp.async_save({"settings": Settings()}, checkpoint_id=sys.argv[1], step=1, async_checkpointer_type=process)
except Exception as error:
    print(error.reason, error.metadata["fqn"], flush=True)
dcp.async_save({"w": torch.ones(3)}, checkpoint_id=sys.argv[1], step=1, async_checkpointer_type=process)
print(save_process_of(current()).pid, flush=True)
"""


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """It runs once; its exit waits for the save; no process is left."""
    script, path = tmp_path / "train.py", tmp_path / "checkpoint"
    script.write_text(_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert 0 == done.returncode, done.stderr
    runs, refused, pid = done.stdout.splitlines()
    assert ("the script runs", "UNPICKLABLE settings") == (runs, refused)
    assert not Path(f"/proc/{pid}").exists()
    assert "Error" not in done.stderr
    dcp.load(state := {"w": torch.zeros(3)}, str(path))
    assert 3 == state["w"].sum()
