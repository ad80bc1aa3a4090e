"""Saves that end between two files, two that race, and sets that nobody folded: the next one puts it right."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from shardbook import Client, dcp
from shardbook._trees import in_blocks
from shardbook.core import directory as names
from shardbook.core.exported import Fingerprint
from shardbook.core.manifest import Manifest
from shardbook.dcp.catching_up import CatchingUp, Waiting
from shardbook.dcp.runtime import current, replace_current
from shardbook.dcp.writer import CheckpointFiles
from shardbook.sync import sync_directories
from tests.behaviour.client.directories import CheckpointDirectory, identity
from tests.behaviour.rpc.api import wait_until
from tests.torch import jobs
from tests.torch.alone import blank_state, some_state
from tests.torch.harness import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


class Killed(BaseException):
    """The process ends here, as far as a test of one process can tell."""


def state_of(number: float) -> dict[str, Any]:
    """A state dict that can be told from another."""
    return {**some_state(), "lr": number}


def loaded(path: Path) -> float:
    """Returns which state ``load`` finds."""
    state = blank_state()
    dcp.load(state, path)
    return float(state["lr"])


def plainly_loaded(path: Path) -> float:
    """Returns which state DCP's own load finds, which knows ``.metadata`` alone."""
    state = blank_state()
    torch_load(state, checkpoint_id=path)
    return float(state["lr"])


def is_settled(path: Path) -> bool:
    """Whether the manifest on top and ``.metadata`` are those of one attempt."""
    prefix = Manifest.from_bytes((path / names.MANIFEST).read_bytes()).identity.prefix
    exported = (path / names.DCP_METADATA).read_bytes()
    return (path / names.mark_path(prefix, Fingerprint.of(len(exported), exported).mark)).exists()


#: What a coordinator writes, in order: its record, its manifest, the one on top, the mark of its export, the export.
WRITES = ("record", "own manifest", "top manifest", "mark", ".metadata")


@pytest.mark.parametrize("write", range(1, len(WRITES) + 1), ids=[f"after {one}" for one in WRITES])
@pytest.mark.parametrize("repair", ["load", "sync", "sync without export", "next save"])
def test_a_coordinator_killed_between_two_files(
    server: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int, repair: str
) -> None:
    """Load, sync and the next save find the newest attempt, and leave a directory that plain DCP loads, too."""
    path = tmp_path / "step-1"
    dcp.init(run=run, mode="offline")
    dcp.save(state_of(1.0), checkpoint_id=path)
    original, written = CheckpointFiles.write, list[str]()

    def killing(self: CheckpointFiles, name: str, content: bytes | Iterable[bytes]) -> None:
        whole = b"".join(in_blocks(content))  # the mark is left with the last block, before the file is there
        if len(written) == write:
            raise Killed
        original(self, name, whole)
        written.append(name)

    monkeypatch.setattr(CheckpointFiles, "write", killing)
    try:
        dcp.save(state_of(2.0), checkpoint_id=path)
    except Killed:
        assert write < len(WRITES)
    assert write == len(written)
    monkeypatch.undo()
    dcp.close()

    if repair == "next save":
        dcp.init(run=run, mode="offline")
        dcp.save(state_of(3.0), checkpoint_id=tmp_path / "step-2")
        dcp.close()
    elif repair == "load":
        assert 2.0 == loaded(path)
    else:
        if repair == "sync without export":
            (last,) = [one for one in sync_directories(Client(server), [path], export=None) if one.attempt == 2]
            assert (write < len(WRITES)) == ("run `shardbook sync`" in last.message)
            assert 2.0 == float(_read_without_repair(path))
        found = list(sync_directories(Client(server), [path]))
        assert [""] * 2 == [one.message for one in found]
    assert is_settled(path)
    assert [2.0] * 2 == [loaded(path), plainly_loaded(path)]


def _read_without_repair(path: Path) -> float:
    state = blank_state()
    reader = FileSystemReader(path)
    reader.fs = _ReadOnly()
    dcp.load(state, storage_reader=reader)
    return float(state["lr"])


class _ReadOnly(FileSystem):
    """A mount that takes nothing."""

    def mkdir(self, path: Any) -> None:
        raise PermissionError(13, "Permission denied")


def test_an_older_save_in_the_background_ends_last(
    offline: dcp.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped just before it replaced the manifest on top; the newer save is what the directory means."""
    path = tmp_path / "step-1"
    original, started, go = CheckpointFiles.write, threading.Event(), threading.Event()

    def stopping(self: CheckpointFiles, name: str, content: bytes) -> None:
        if name == names.MANIFEST and not started.is_set():
            started.set()
            assert go.wait(30)
        original(self, name, content)

    monkeypatch.setattr(CheckpointFiles, "write", stopping)
    older = dcp.async_save(state_of(1.0), checkpoint_id=path, step=1)
    assert started.wait(30)
    newer = dcp.async_save(state_of(2.0), checkpoint_id=path, step=2)
    wait_until(lambda: len(list(path.glob(".shardbook/*/manifest"))) == 2)
    with suppress(TimeoutError):  # it waits for the older one, or publishes before it
        newer.result(0.5)
    go.set()
    assert [1, 2] == [older.result(30).attempt, newer.result(30).attempt]
    assert is_settled(path)
    assert [2.0] * 2 == [loaded(path), plainly_loaded(path)]


class TestEarlierSets:
    """Complete sets of records whose coordinator is gone."""

    def test_the_next_save_of_the_run_folds_them(self, pool: RankPool, run: str, tmp_path: Path) -> None:
        """In the directory of an earlier step; another run's are not touched."""
        earlier, strange = tmp_path / "step-1", tmp_path / "step-3"
        pool.run(jobs.save_unfolded, "uneven", str(earlier), {"run": run, "mode": "offline"}, world_size=3)
        pool.run(jobs.save_unfolded, "uneven", str(strange), {"run": f"{run}x", "mode": "offline"}, world_size=3)
        dcp.init(run=run, mode="offline")
        dcp.save(some_state(), checkpoint_id=tmp_path / "step-2")
        dcp.close()
        assert is_settled(earlier)
        assert not (strange / names.MANIFEST).exists()
        assert [{str(earlier): []}] * 2 == pool.run(jobs.load, "uneven", [str(earlier)], True, world_size=2)

    def test_one_that_becomes_whole_later(self, pool: RankPool, run: str, tmp_path: Path) -> None:
        """It is looked at again with later saves."""
        earlier = tmp_path / "step-1"
        pool.run(jobs.save_unfolded, "uneven", str(earlier), {"run": run, "mode": "offline"}, world_size=3)
        late = next(earlier.glob(".shardbook/*/rank-1.record"))
        late.rename(tmp_path / "late")
        dcp.init(run=run, mode="offline")
        dcp.save(some_state(), checkpoint_id=tmp_path / "step-2")
        assert not (earlier / names.MANIFEST).exists()
        (tmp_path / "late").rename(late)
        dcp.save(some_state(), checkpoint_id=tmp_path / "step-3")
        dcp.close()
        assert is_settled(earlier)

    def test_one_of_this_process_whose_ranks_were_late(self, run: str, tmp_path: Path) -> None:
        """Its coordinator went on without them; the next save finds their records."""
        first = tmp_path / "step-1"
        session = dcp.init(run=run, mode="offline")
        dcp.close()
        dcp.init(session=session, rank=0, world_size=2)
        result = dcp.save({"a": torch.ones(2)}, checkpoint_id=first, timeout_s=0.3)
        assert "1 ranks left no record" in result.reason
        runtime = current()
        dcp.init(session=session, rank=1, world_size=2)
        dcp.save({"b": torch.ones(2)}, checkpoint_id=first)
        replace_current(runtime)
        assert not (first / names.MANIFEST).exists()
        dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "step-2", timeout_s=0.3)
        dcp.close()
        assert is_settled(first)

    def test_an_earlier_attempt_in_the_same_directory(self, pool: RankPool, run: str, tmp_path: Path) -> None:
        """It gets its manifest, and the newer one stays what the directory means."""
        path = tmp_path / "step-1"
        pool.run(jobs.save_unfolded, "uneven", str(path), {"run": run, "mode": "offline"}, world_size=3)
        (earlier,) = [one.parent.name for one in path.glob(".shardbook/*/rank-0.record")]
        dcp.init(run=run, mode="offline")
        result = dcp.save(state_of(2.0), checkpoint_id=path)
        dcp.close()
        assert {earlier, result.prefix} == {one.parent.name for one in path.glob(".shardbook/*/manifest")}
        assert is_settled(path)
        assert 2.0 == loaded(path)

    def test_what_cannot_be_looked_at_fails_no_save(self, offline: dcp.Session, tmp_path: Path) -> None:
        """Junk in the place of checkpoints."""
        (tmp_path / "step-1").write_bytes(b"junk")
        (tmp_path / "step-2" / names.ROOT / "0123456789ab-a1").mkdir(parents=True)
        (tmp_path / "step-2" / names.ROOT / "0123456789ab-a1" / "rank-0.record").write_bytes(b"junk")
        (tmp_path / "step-4" / names.ROOT).mkdir(parents=True)
        (tmp_path / "step-4" / names.MANIFEST).mkdir()
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "step-3")
        assert "mode offline" == result.reason


class TestMissed:
    """What the service missed is recorded by later saves, and what never can be is not looked at for ever."""

    def test_beside_somebody_elses_incomplete_attempt(self, session: dcp.Session, tmp_path: Path) -> None:
        """The place is settled when its own save is; the other one is nobody's here to wait for."""
        path = tmp_path / "step-1"
        own = identity(1, run=session.run, session=0, incarnation=b"o" * 16)
        CheckpointDirectory(path).add_records(own).add_records(identity(1, run="some/body"), without=(2,))
        left = current().catching_up
        left.unregistered["default", 1] = Waiting(str(path), own.prefix)
        dcp.save(some_state(), checkpoint_id=tmp_path / "step-2")
        assert {} == left.unregistered
        assert {1, 2} == {one.step for one in Client(session.server).list_checkpoints(session.run)}

    def test_a_set_that_stays_incomplete(self, session: dcp.Session, tmp_path: Path) -> None:
        """It is looked at ever less often, and given up; ``sync`` still records it once it is whole."""
        path = tmp_path / "step-1"
        own = identity(1, run=session.run, session=0, incarnation=b"o" * 16)
        CheckpointDirectory(path).add_records(own, without=(2,))
        left = current().catching_up
        left.unregistered["default", 1] = Waiting(str(path), own.prefix)
        looks = 0
        for _ in range(200):
            waiting = left.unregistered.get(("default", 1))
            looks += waiting is not None and waiting.is_due()
            if waiting is not None and waiting.is_given_up:
                break
        assert 8 == looks
        left.unregistered["default", 1]._saves = 10**6
        dcp.save(some_state(), checkpoint_id=tmp_path / "step-2")
        assert {} == left.unregistered
        CheckpointDirectory(path).add_records(own)
        assert ["recorded"] == [one.outcome for one in sync_directories(Client(session.server), [path])]

    def test_a_fresh_session_has_nothing_to_do(self) -> None:
        """Nothing is looked for where nothing was missed."""
        assert (CatchingUp().unregistered, CatchingUp().running) == ({}, set())


class TestRemoving:
    """Records of thousands of ranks."""

    def test_many_at_a_time(self, tmp_path: Path) -> None:
        """One after the other the calls would wait for ever for the others."""
        for rank in range(32):
            (tmp_path / f"{rank}").touch()
        together = threading.Barrier(8)

        class Slow(FileSystem):
            def rm_file(self, path: Any) -> None:
                together.wait(30)
                super().rm_file(path)

        CheckpointFiles(Slow(), tmp_path).remove(map(str, range(32)))
        assert [] == list(tmp_path.iterdir())

    def test_one_that_cannot_be_removed_holds_up_nobody(self, tmp_path: Path) -> None:
        """Whatever the filesystem raises."""
        for name in ("a", "b"):
            (tmp_path / name).touch()

        class Odd(FileSystem):
            def rm_file(self, path: Any) -> None:
                if str(path).endswith("a"):
                    raise LookupError("503")
                super().rm_file(path)

        CheckpointFiles(Odd(), tmp_path).remove(["a", "b", "never there"])
        assert ["a"] == [one.name for one in tmp_path.iterdir()]
