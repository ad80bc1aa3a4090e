"""Where a session's checkpoints come from: told to ``init`` and ``load``, recorded once, whatever happens meanwhile."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

from shardbook import Client, LineageEdge, dcp
from shardbook.dcp import AsyncCheckpointerType, SaveState
from shardbook.dcp.runtime import current
from shardbook.errors import FailedPreconditionError, InvalidArgumentError
from shardbook.sync import sync_directories
from tests.torch import jobs
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.harness import RankPool
from tests.torch.test_load_alone import different

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


def edges(server: str, *refs: str) -> list[tuple[str, str, str]]:
    """What checkpoints themselves come from, as told by jobs."""
    found: list[LineageEdge] = []
    for ref in refs:
        found += Client(server).list_lineage(ref, direction="up")
    assert all(edge.told for edge in found)
    return [(edge.subject.ref, edge.kind, edge.object.ref) for edge in found]


def steps(run: str, *numbers: int) -> list[str]:
    """Refs of a run."""
    return [f"{run}@{number}" for number in numbers]


def test_init_says_where_a_run_comes_from(
    session: dcp.Session, server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By names that mean the same for ever; the first commit records it, the others say nothing."""
    run = session.run
    for step in (1, 2):
        dcp.save(some_state(), checkpoint_id=tmp_path / str(step))
    again = dcp.init(run=run, server=server, resumed_from=f"{run}@1", fine_tuned_from=f"{run}@2")
    part = f"projects/tests/runs/{run.partition('/')[2]}/parts/default/checkpoints"
    assert [f"{part}/1.s1.a1", f"{part}/2.s1.a1"] == [origin.source for origin in again.origins]
    for step in (3, 4):
        assert SaveState.COMMITTED is dcp.save(some_state(), checkpoint_id=tmp_path / str(step)).state
        assert () == current().origins.waiting
    found = [(f"{run}@3", "resumed_from", f"{run}@1"), (f"{run}@3", "fine_tuned_from", f"{run}@2")]
    assert found == edges(server, *steps(run, 1, 2, 3, 4))
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("source", ["org/model", "hub/none@5", "https://hub.example/org/model"])
def test_init_takes_what_the_catalogue_does_not_have(server: str, run: str, tmp_path: Path, source: str) -> None:
    """A name of something else, or of nothing: no reason for a session not to begin."""
    dcp.init(run=run, server=server, fine_tuned_from=source)
    try:
        dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        assert [(f"{run}@1", "fine_tuned_from", source)] == edges(server, f"{run}@1")
    finally:
        dcp.close()
    with pytest.raises(InvalidArgumentError) as caught:
        dcp.init(run=run, server=server, fine_tuned_from="s3://key:secret@bucket/x")
    assert ["fine_tuned_from"] == [one.field for one in caught.value.violations]
    assert "secret" not in str(caught.value)


@pytest.mark.soak_with("AsyncCheckpointerType.PROCESS")
@pytest.mark.parametrize("executor", list(AsyncCheckpointerType))
def test_saves_in_the_background_say_it_once(
    session: dcp.Session, server: str, tmp_path: Path, executor: AsyncCheckpointerType
) -> None:
    """By a thread or a process; two that are under way both say it, and one counts."""
    run = session.run
    dcp.save(some_state(), checkpoint_id=tmp_path / "1")
    assert loads(f"{run}@latest", lineage="resumed_from")
    under_way = [
        dcp.async_save(some_state(), checkpoint_id=tmp_path / str(step), async_checkpointer_type=executor)
        for step in (2, 3)
    ]
    for response in under_way:
        assert SaveState.COMMITTED is response.result(60).state
    assert () == current().origins.waiting
    (found,) = edges(server, *steps(run, 1, 2, 3))
    assert ("resumed_from", f"{run}@1") == found[1:]


def test_load_says_what_was_loaded(session: dcp.Session, server: str, run: str, tmp_path: Path) -> None:
    """By ref, from a directory that a manifest describes, and from one by plain DCP; each with the next commit."""
    dcp.save(some_state(), checkpoint_id=tmp_path / "1")
    torch_dcp.save({key: value for key, value in some_state().items() if key != "lr"}, checkpoint_id=tmp_path / "plain")
    assert loads(tmp_path / "1")
    assert loads(tmp_path / "1", lineage="resumed-from")
    dcp.save(some_state(), checkpoint_id=tmp_path / "2")
    partial = {key: value for key, value in blank_state().items() if key != "lr"}
    dcp.load(partial, tmp_path / "plain", lineage="converted_from")
    # Another part of the run has an origin of its own, if any.
    dcp.save(some_state(), checkpoint_id=tmp_path / "other" / "2", part="optim")
    dcp.save(some_state(), checkpoint_id=tmp_path / "3")
    assert [
        (f"{run}@2", "resumed_from", f"{run}@1"),
        (f"{run}@3", "converted_from", str(tmp_path / "plain")),
    ] == edges(server, *steps(run, 1, 2, 3), f"{run}:optim@2")


def test_load_refuses_what_it_could_not_record(
    session: dcp.Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong argument, or no session, before anything is read; a name that cannot be kept is a warning, afterwards."""
    dcp.save(some_state(), checkpoint_id=tmp_path / "1")
    for kind in ("evaluated_by", "made_of"):
        with pytest.raises(InvalidArgumentError) as caught:
            dcp.load(blank_state(), tmp_path / "none", lineage=kind)
        assert ["lineage"] == [one.field for one in caught.value.violations]
    long = tmp_path.joinpath(*["x" * 200] * 6)
    torch_dcp.save({"w": some_state()["w"]}, checkpoint_id=long)
    state = {"w": blank_state()["w"]}
    with caplog.at_level(logging.WARNING, "shardbook"):
        dcp.load(state, long, lineage="fine_tuned_from")
    assert state["w"].sum() > 0
    assert "is not recorded as fine tuned from" in caplog.text
    dcp.close()
    with pytest.raises(FailedPreconditionError) as refused:
        dcp.load(blank_state(), tmp_path / "1", lineage="resumed_from")
    assert "NO_SESSION" == refused.value.reason


def test_a_directory_keeps_it_until_sync(
    server: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server every save says it; recorded in whatever order, it counts once, linked to what came later."""
    dcp.init(run=run, mode="offline")
    dcp.save(some_state(), checkpoint_id=tmp_path / "1")
    dcp.init(run=run, mode="offline", resumed_from=f"{run}@1", fine_tuned_from="org/model")
    for step in (2, 3):
        assert SaveState.UNREGISTERED is dcp.save(some_state(), checkpoint_id=tmp_path / str(step)).state
    dcp.close()
    for step in (3, 1, 2):
        list(sync_directories(Client(server), [tmp_path / str(step)]))
    assert [(f"{run}@3", "fine_tuned_from", "org/model"), (f"{run}@3", "resumed_from", f"{run}@1")] == sorted(
        edges(server, *steps(run, 1, 2, 3))
    )
    info = Client(server).get_lineage(f"{run}@3", direction="up")
    assert {"COMMITTED", ""} == {edge.object.state for edge in info.ancestors}


def test_an_outage_at_the_start_loses_nothing(
    session: dcp.Session, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session that starts late learns what an alias meant; a save while the service is away says it, too."""
    run = session.run
    for step in (1, 2):
        dcp.save(some_state(), checkpoint_id=tmp_path / str(step))
    dcp.close()
    with monkeypatch.context() as patch:
        patch.setenv("SHARDBOOK_OUTAGE_FIRST_S", "0.3")
        begun = dcp.init(run=run, server="127.0.0.1:9", resumed_from=f"{run}@1.s1")
        assert SaveState.UNREGISTERED is dcp.save(some_state(), checkpoint_id=tmp_path / "3").state
        assert 1 == len(current().origins.waiting)
    # What a server that is back would find: the same incarnation, asked for by its next save.
    late = dcp.init(session=type(begun)(**{**vars(begun), "server": server}))
    assert late.incarnation == begun.incarnation
    assert SaveState.COMMITTED is dcp.save(some_state(), checkpoint_id=tmp_path / "4").state
    assert [f"{run}@1"] == [edge[2] for edge in edges(server, f"{run}@4")]
    list(sync_directories(Client(server), [tmp_path / "3"]))
    assert 1 == len(edges(server, *steps(run, 3, 4)))


def test_torchs_own_save_says_it_too(session: dcp.Session, server: str, run: str, tmp_path: Path) -> None:
    """With ``ShardbookWriter``: the coordinator's record of the whole."""
    dcp.save(some_state(), checkpoint_id=tmp_path / "1")
    dcp.init(run=run, server=server, resumed_from=f"{run}@latest")
    for step in (2, 3):
        torch_dcp.save(some_state(), storage_writer=dcp.ShardbookWriter(tmp_path / str(step)))
    assert [(f"{run}@2", "resumed_from", f"{run}@1")] == edges(server, *steps(run, 2, 3))


def test_torchs_own_load_says_it_too(session: dcp.Session, server: str, run: str, tmp_path: Path) -> None:
    """With ``ShardbookReader``, of a ref and of a directory; without a session it refuses before anything is read."""
    dcp.save(some_state(), checkpoint_id=tmp_path / "1")
    torch_dcp.save({"w": some_state()["w"]}, checkpoint_id=tmp_path / "plain")
    state = blank_state()
    reader = dcp.ShardbookReader(f"{run}@latest", lineage="resumed_from")
    torch_dcp.load(state, storage_reader=reader)
    assert [] == different(some_state(), state)
    dcp.save(some_state(), checkpoint_id=tmp_path / "2")
    converted = dcp.ShardbookReader(lineage="converted-from")
    torch_dcp.load({"w": blank_state()["w"]}, checkpoint_id=tmp_path / "plain", storage_reader=converted)
    dcp.save(some_state(), checkpoint_id=tmp_path / "3")
    assert [
        (f"{run}@2", "resumed_from", f"{run}@1"),
        (f"{run}@3", "converted_from", str(tmp_path / "plain")),
    ] == edges(server, *steps(run, 1, 2, 3))
    with pytest.raises(InvalidArgumentError) as caught:
        dcp.ShardbookReader(f"{run}@latest", lineage="evaluated_by")
    assert ["lineage"] == [one.field for one in caught.value.violations]
    dcp.close()
    state = blank_state()
    with pytest.raises(CheckpointException, match=r"init\(") as refused:
        torch_dcp.load(state, checkpoint_id=tmp_path / "1", storage_reader=reader)
    assert "NO_SESSION" == getattr(refused.value.failures[0][0], "reason", None)
    assert [] == different(blank_state(), state)


def test_of_several_ranks_the_coordinator_says_it(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Rank 0 asks what it is and tells it; a job that is started again says it again, of its own first commit."""
    start = {"run": run, "server": server, "job_id": "slurm-7", "fine_tuned_from": "hub/model"}
    for first in (1, 3):
        paths = [str(tmp_path / str(step)) for step in (first, first + 1)]
        pool.run(jobs.save, "fsdp", paths, start, {}, world_size=2)
        start["resumed_from"] = f"{run}@latest"
    assert [
        (f"{run}@1", "fine_tuned_from", "hub/model"),
        (f"{run}@3", "resumed_from", f"{run}@2"),
        (f"{run}@3", "fine_tuned_from", "hub/model"),
    ] == edges(server, *steps(run, 1, 2, 3, 4))
