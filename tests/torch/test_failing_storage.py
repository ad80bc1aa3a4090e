"""Storage that fails now and then, in words of its own, or cannot be named: what need not be written sinks no save."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter

from shardbook import Client, dcp
from shardbook.core import directory as names
from shardbook.core.fold import fold
from shardbook.dcp import SaveState
from shardbook.dcp.directory import await_records, publish, read_attempt, read_records
from shardbook.dcp.runtime import current
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import RankFailedError, StorageError, UnregisteredError
from shardbook.sync import SyncOutcome, sync_directories
from tests.behaviour.client.directories import CheckpointDirectory, identity
from tests.torch import jobs
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.harness import RankPool, files_below

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


class HttpError(Exception):
    """What libraries of object stores raise: no OSError."""


class Flaky(FileSystem):
    """A disk that fails for some paths as often as it is told to.

    Args:
        error: What it raises.
        is_hit: Says of a path and a mode (``ls`` for listing) whether it fails.
        times: How often.
    """

    def __init__(self, error: Exception, is_hit: Callable[[str, str], bool], times: int = 10**9) -> None:
        self.error = error
        self.is_hit = is_hit
        self.times = times

    def _strike(self, path: Any, mode: str) -> None:
        if self.times > 0 and self.is_hit(os.fspath(path), mode):
            self.times -= 1
            raise self.error

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Opens, or fails."""
        self._strike(path, mode)
        with super().create_stream(path, mode) as stream:
            yield stream

    def ls(self, path: Any) -> list[str]:
        """Lists, or fails."""
        self._strike(path, "ls")
        return super().ls(path)


class Watched(FileSystem):
    """Lets something happen just before one of the looks at it.

    Args:
        do: What happens.
        after: Looks before it does.
    """

    def __init__(self, do: Callable[[], object], after: int) -> None:
        self._do = do
        self._after = after
        self._lock = threading.Lock()
        self.count = 0

    def _look(self) -> None:
        with self._lock:  # records are read side by side
            if self.count == self._after:
                self._do()
            self.count += 1

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Opens."""
        self._look()
        with super().create_stream(path, mode) as stream:
            yield stream

    def ls(self, path: Any) -> list[str]:
        """Lists."""
        self._look()
        return super().ls(path)


def saved(path: Path, fs: FileSystem) -> dcp.SaveResult:
    """Saves through a filesystem."""
    writer = FileSystemWriter(path)
    writer.fs = fs
    return dcp.save(some_state(), storage_writer=writer)


class TestWordsOfItsOwn:
    """Filesystems behind fsspec raise anything."""

    @pytest.mark.parametrize("what", ["manifest", ".metadata", "exported-"])
    def test_a_committed_save_stays_committed(self, session: dcp.Session, tmp_path: Path, what: str) -> None:
        """Its directory is not described; the result says so, and a later load does it."""
        path = tmp_path / "step-1"
        result = saved(path, Flaky(HttpError("503"), lambda name, mode: "w" in mode and f"/{what}" in name))
        assert (SaveState.COMMITTED, True) == (result.state, "HttpError: 503" in result.reason)
        assert loads(result.ref)
        assert loads(path)
        assert (path / names.DCP_METADATA).exists()

    def test_without_the_service_the_records_are_enough(self, offline: dcp.Session, tmp_path: Path) -> None:
        """The save is as safe as ever."""
        path = tmp_path / "step-1"
        result = saved(path, Flaky(HttpError("503"), lambda name, mode: "w" in mode and "manifest" in name))
        assert (SaveState.UNREGISTERED, True) == (result.state, "HttpError: 503" in result.reason)
        assert loads(path)

    def test_a_record_that_cannot_be_written_is_a_failed_save(
        self, pool: RankPool, server: str, run: str, tmp_path: Path
    ) -> None:
        """Typed on the rank that has the storage, and told to the others at once."""
        start = {"run": run, "server": server}
        running = pool.start(jobs.save_without_record, start, str(tmp_path / "step-1"), 1, world_size=2)
        errors = [one.error for one in running.outcomes()]
        assert [RankFailedError, StorageError] == [type(one) for one in errors]
        assert "rank 1" in str(errors[0])
        assert "LookupError: 503" in str(errors[0])

    def test_sync_goes_on_after_a_directory_that_cannot_be_read(
        self, server: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is told for that directory."""
        for step in (1, 2):
            CheckpointDirectory(tmp_path / f"step-{step}").add_manifest(identity(step, run=run))
        original = os.scandir

        def failing(path: Any) -> Any:
            if f"{path}".endswith(f"step-1/{names.ROOT}"):
                raise HttpError("503")
            return original(path)

        monkeypatch.setattr("shardbook._trees.os.scandir", failing)
        found = list(sync_directories(Client(server), [tmp_path]))
        assert [SyncOutcome.REFUSED, SyncOutcome.RECORDED] == [one.outcome for one in found]
        assert (str(tmp_path / "step-1"), "503") == (found[0].directory, found[0].message)


class TestLooking:
    """ESTALE and EIO, which network filesystems say when another host replaces a file."""

    @pytest.fixture
    def records(self, pool: RankPool, run: str, tmp_path: Path) -> Path:
        """A checkpoint directory of three ranks whose coordinator left the records as they were."""
        path = tmp_path / "step-1"
        pool.run(jobs.save_unfolded, "uneven", str(path), {"run": run, "mode": "offline"}, world_size=3)
        return path

    @pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
    def test_a_coordinator_looks_again(self, records: Path, number: int) -> None:
        """For records, and for as long as it may wait; then they are missing, which is no failure."""
        prefix = next(records.glob(".shardbook/*/")).name
        error = OSError(number, os.strerror(number))
        some = CheckpointFiles(Flaky(error, lambda _, mode: mode == "ls", times=2), records)
        assert await_records(some, prefix, 3, 30.0).is_empty
        always = CheckpointFiles(Flaky(error, lambda _, mode: mode == "ls"), records)
        assert (0, 1, 2) == await_records(always, prefix, 3, 0.2).missing

    @pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
    @pytest.mark.parametrize("what", ["rank-1.record", "ls"])
    def test_a_load_looks_again(self, records: Path, number: int, what: str) -> None:
        """A storage that goes on failing is an error, not an empty directory."""
        error = OSError(number, os.strerror(number))

        def is_hit(path: str, mode: str) -> bool:
            return what in (mode, path.rpartition("/")[2])

        found = read_attempt(CheckpointFiles(Flaky(error, is_hit, times=1), records))
        assert found is not None
        with pytest.raises(OSError, match=os.strerror(number)):
            read_attempt(CheckpointFiles(Flaky(error, is_hit), records))

    def test_a_save_folds_in_spite_of_it(self, offline: dcp.Session, tmp_path: Path) -> None:
        """What is replaced under a publisher's eyes is looked at again."""
        path = tmp_path / "step-1"
        assert loads(saved(path, FileSystem()).path)
        error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        result = saved(path, Flaky(error, lambda name, mode: mode == "rb" and name.endswith("manifest"), times=3))
        assert "mode offline" == result.reason
        top = read_attempt(CheckpointFiles.of(FileSystemReader(path)))
        assert top is not None
        assert result.prefix == top.manifest.identity.prefix

    @pytest.mark.parametrize("what", [".record", "manifest"])
    def test_a_save_that_cannot_fold_is_not_lost(self, pool: RankPool, run: str, tmp_path: Path, what: str) -> None:
        """EIO for good: the reason says so, and whoever comes next folds."""
        path = tmp_path / "step-1"
        saved = pool.run(jobs.save_unreadable, {"run": run, "mode": "offline"}, str(path), what, world_size=2)
        assert [SaveState.UNREGISTERED] * 2 == [one.state for one in saved]
        assert os.strerror(errno.EIO) in saved[0].reason
        assert [{str(path): []}] * 2 == pool.run(jobs.load, "uneven", [str(path)], world_size=2)

    def test_a_load_while_another_process_folds(self, records: Path) -> None:
        """Records become a manifest at any moment of a look, beside junk and an older attempt: the newest is found."""
        files = CheckpointFiles.of(FileSystemReader(records))
        prefix = next(name for name in files.names(names.ROOT) if names.is_prefix(name))
        mine = read_records(files, prefix, 3)
        folded = fold(mine)
        older = identity(1, incarnation=b"o" * 16, write_time_s=1.0)
        CheckpointDirectory(records).add_manifest(older)
        top = (records / names.MANIFEST).read_bytes()
        for name in ("0123456789ab-a1/rank-0.record", "0123456789ab-a2/manifest", "0123456789ab-a3/junk", "junk"):
            junk = records / names.ROOT / name
            junk.parent.mkdir(exist_ok=True)
            junk.write_bytes(b"junk")
        steps, count = 0, 1
        while steps < count:
            for record in mine:
                files.write(names.record_path(prefix, record.rank), record.to_bytes())
            (records / names.manifest_path(prefix)).unlink(missing_ok=True)
            (records / names.DCP_METADATA).unlink(missing_ok=True)
            (records / names.MANIFEST).write_bytes(top)
            watched = Watched(lambda: publish(files, folded, None), steps)
            found = read_attempt(CheckpointFiles(watched, records))
            assert found is not None
            assert prefix == found.manifest.identity.prefix, steps
            steps, count = steps + 1, watched.count
        assert steps > 10


class TestNames:
    """Directories whose names are no UTF-8."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """Such a directory."""
        return Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff-step-1"))

    def test_online_the_save_stays_on_storage(self, session: dcp.Session, path: Path, tmp_path: Path) -> None:
        """The catalogue cannot name it: UNREGISTERED with a reason that can be printed, and later saves go on."""
        result = dcp.save(some_state(), checkpoint_id=path)
        assert SaveState.UNREGISTERED is result.state
        assert result.reason.startswith("INVALID_LOCATION: ")
        assert rb"\udcff-step-1" in result.reason.encode()
        assert loads(path)
        later = dcp.save(some_state(), checkpoint_id=tmp_path / "step-2")
        assert (SaveState.COMMITTED, "") == (later.state, later.reason)
        assert {} == current().catching_up.unregistered

    def test_every_rank_says_so(self, pool: RankPool, server: str, run: str, path: Path) -> None:
        """None waits for a commit."""
        start = {"run": run, "server": server}
        saved = pool.run(jobs.save, "uneven", [str(path)], start, {}, world_size=2)
        assert [SaveState.UNREGISTERED] * 2 == [one.results[0].state for one in saved]
        assert [{str(path): []}] * 2 == pool.run(jobs.load, "uneven", [str(path)], world_size=2)

    def test_strict(self, session: dcp.Session, path: Path) -> None:
        """The error can be printed, too."""
        with pytest.raises(UnregisteredError) as caught:
            dcp.save(some_state(), checkpoint_id=path, strict=True)
        assert str(caught.value).encode()

    def test_offline(self, offline: dcp.Session, path: Path) -> None:
        """As any other directory."""
        dcp.save(some_state(), checkpoint_id=path)
        state = blank_state()
        dcp.load(state, path)
        assert some_state()["lr"] == state["lr"]

    def test_sync_refuses_it_and_goes_on(self, server: str, run: str, path: Path, tmp_path: Path) -> None:
        """With advice."""
        CheckpointDirectory(path).add_manifest(identity(1, run=run))
        CheckpointDirectory(tmp_path / "step-2").add_manifest(identity(2, run=run))
        found = {one.step: one for one in sync_directories(Client(server), [tmp_path])}
        assert (SyncOutcome.REFUSED, "INVALID_LOCATION") == (found[1].outcome, found[1].reason)
        assert found[1].message.encode()
        assert SyncOutcome.RECORDED is found[2].outcome
        assert files_below(tmp_path)
