"""Checksums of items: those of the bytes on storage, whoever wrote them however, kept wherever extents are."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardbook import Client, dcp
from shardbook.core import limits
from shardbook.core.extents import NO_CHECKSUM, Extents, decode_extents
from shardbook.core.names import CheckpointName
from shardbook.dcp import SaveState
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.directory import read_attempt
from shardbook.dcp.loading import columns_of
from shardbook.dcp.metadata import CheckpointColumns
from shardbook.dcp.runtime import Member
from shardbook.dcp.submission import EncodedPlan, make_record
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import InvalidArgumentError
from shardbook.sync import SyncOutcome, sync_directory
from tests.torch import jobs
from tests.torch.alone import loads, some_state
from tests.torch.harness import RankPool
from tests.unit.test_structure_codec import fsdp_rank

#: What a rank sums and compares has nothing to do with the kind of database.
pytestmark = [
    pytest.mark.soak_with("postgres"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning"),
]

WRITERS: dict[str, Callable[[str], FileSystemWriter]] = {
    "a file": FileSystemWriter,
    "a file an item": lambda path: FileSystemWriter(path, single_file_per_rank=False),
    "threads": lambda path: FileSystemWriter(path, thread_count=3),
    "threads, a file an item": lambda path: FileSystemWriter(path, thread_count=3, single_file_per_rank=False),
    "zstd": lambda path: FileSystemWriter(path, _extensions=[ZStandard()]),
    "fsspec": FsspecWriter,
    "fsspec, threads, zstd": lambda path: FsspecWriter(path, thread_count=2, _extensions=[ZStandard()]),
}


def larger_state() -> dict[str, Any]:
    """Tensors, one of them of several slices of what is summed at a time, empty ones, and objects."""
    generator = torch.Generator().manual_seed(7)
    return {
        "large": torch.rand(3_000_000, generator=generator),
        "half": torch.rand(7, 5, generator=generator).to(torch.bfloat16),
        "transposed": torch.rand(6, 4, generator=generator).t(),
        "empty": torch.zeros(0, 3),
        "lr": 0.5,
        "names": ["a", "b" * 1000],
        **some_state(),
    }


def wrong_sums(columns: CheckpointColumns, root: str) -> list[int]:
    """Chunks whose checksum is not that of their bytes in the files below ``root``."""
    structure, located = columns.structure, columns.located
    wrong = []
    for chunk in range(len(located.checksum)):
        name = structure.rank_files.path(int(structure.owner[chunk]), int(structure.file[chunk]))
        with Path(root, columns.prefix, name).open("rb") as file:
            file.seek(int(located.start[chunk]))
            content = file.read(int(located.length[chunk]))
        if google_crc32c.value(content) != located.checksum[chunk]:
            wrong.append(chunk)
    return wrong


def by_path(path: str | Path) -> CheckpointColumns:
    """What the directory says."""
    folded = read_attempt(CheckpointFiles.of(FileSystemWriter(path)))
    assert folded is not None
    prefix = folded.manifest.identity.prefix
    return CheckpointColumns(folded.structure, folded.located, prefix, str(path), folded.header(str(path)))


def by_ref(ref: str) -> CheckpointColumns:
    """What the catalogue says."""
    return columns_of(CheckpointName.parse(ref))


def test_the_algorithm_is_crc32c() -> None:
    """Check value of the catalogue of CRC algorithms: others can verify what is kept."""
    assert 0xE3069283 == google_crc32c.value(b"123456789")


class TestWhatIsKept:
    """Which items have a checksum, and that it is true."""

    @pytest.mark.parametrize("writer", WRITERS)
    def test_checksums_are_of_the_bytes_on_storage(self, session: dcp.Session, tmp_path: Path, writer: str) -> None:
        """Rule: whatever the layout of the files, every item has one; from the catalogue and from the directory."""
        path = str(tmp_path / "step-1")
        result = dcp.save(larger_state(), storage_writer=WRITERS[writer](path), checksum="crc32c")
        assert (SaveState.COMMITTED, "") == (result.state, result.reason)
        for columns in (by_ref(result.ref), by_path(path)):
            assert 8 == len(columns.located.checksum)
            assert [] == wrong_sums(columns, path)

    @pytest.mark.soak_with("AsyncCheckpointerType.PROCESS")
    @pytest.mark.parametrize("executor", AsyncCheckpointerType)
    def test_saves_in_the_background_keep_them_too(
        self, session: dcp.Session, tmp_path: Path, executor: AsyncCheckpointerType
    ) -> None:
        """Rule: ``async_save`` takes the same argument, and a save process computes them where it writes."""
        path = str(tmp_path / "step-1")
        response = dcp.async_save(
            larger_state(), checkpoint_id=path, async_checkpointer_type=executor, checksum="crc32c"
        )
        assert SaveState.COMMITTED == response.result(60).state
        assert [] == wrong_sums(by_ref(response.result().ref), path)

    def test_every_rank_keeps_its_own(self, pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
        """Rule: replicated, sharded, and from several ranks: each chunk has that of the copy that was kept."""
        paths = [str(tmp_path / "step-1"), str(tmp_path / "step-2")]
        start, options = {"run": run, "server": server}, {"checksum": "crc32c"}
        saved = pool.run(jobs.save, "hsdp", paths, start, options, world_size=4)
        for path, result in zip(paths, saved[0].results, strict=True):
            dcp.init(run=f"{run}-reader", server=server)
            assert [] == wrong_sums(by_ref(result.ref), path)
            dcp.close()
            assert [] == wrong_sums(by_path(path), path)

    def test_a_sync_after_an_outage_records_them(self, server: str, run: str, tmp_path: Path) -> None:
        """Rule: RecordCheckpoint takes what the records hold."""
        path = tmp_path / "step-1"
        dcp.init(run=run, mode="offline")
        dcp.save(larger_state(), checkpoint_id=path, checksum="crc32c")
        dcp.close()
        assert [SyncOutcome.RECORDED] == [one.outcome for one in sync_directory(Client(server), path)]
        dcp.init(run=f"{run}-reader", server=server)
        columns = by_ref(f"{run}@1")
        dcp.close()
        assert [] == wrong_sums(columns, str(path))


class TestSettings:
    """Who says whether they are kept."""

    def test_none_are_kept_unless_asked_for(self, session: dcp.Session, tmp_path: Path) -> None:
        """Rule: the default costs nothing."""
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1")
        assert {NO_CHECKSUM} == set(by_ref(result.ref).located.checksum.tolist())

    def test_the_environment_asks_for_all_saves_and_a_save_may_differ(
        self, server: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rule: ``SHARDBOOK_CHECKSUM`` is the default of ``checksum``."""
        monkeypatch.setenv("SHARDBOOK_CHECKSUM", "crc32c")
        dcp.init(run=run, server=server)
        kept = []
        for step, checksum in enumerate([None, "none", "crc32c"], 1):
            result = dcp.save(some_state(), checkpoint_id=tmp_path / f"{step}", checksum=checksum)
            kept.append((by_ref(result.ref).located.checksum != NO_CHECKSUM).all())
        dcp.close()
        assert [True, False, True] == kept

    def test_what_there_is_no_checksum_of_that_name(self, session: dcp.Session, tmp_path: Path) -> None:
        """Rule: bad input names the field, and nothing is written."""
        with pytest.raises(InvalidArgumentError) as caught:
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", checksum="md5")
        assert ["checksum"] == [one.field for one in caught.value.violations]
        assert not (tmp_path / "1").exists()

    def test_a_machine_without_the_package_is_told_at_once(
        self, server: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rule: where saves are asked for that cannot be made, ``init`` says so, or the save before it writes."""
        monkeypatch.setitem(sys.modules, "google_crc32c", None)
        dcp.init(run=run, server=server)
        with pytest.raises(InvalidArgumentError, match="shardbook\\[checksum\\]") as caught:
            dcp.save(some_state(), checkpoint_id=tmp_path / "1", checksum="crc32c")
        assert "MISSING_PACKAGE" == caught.value.reason
        assert not list(tmp_path.rglob("*.distcp"))
        monkeypatch.setenv("SHARDBOOK_CHECKSUM", "crc32c")
        with pytest.raises(InvalidArgumentError, match="shardbook\\[checksum\\]"):
            dcp.init(run=run, server=server)


class TestWhatIsLeftAlone:
    """Everything else is as without them."""

    def test_dcps_own_metadata_is_the_same(self, session: dcp.Session, tmp_path: Path) -> None:
        """Rule: ``.metadata`` knows no checksums."""
        told = []
        for step, checksum in enumerate(("none", "crc32c"), 1):
            path = tmp_path / f"step-{step}"
            dcp.save(larger_state(), checkpoint_id=path, checksum=checksum)
            metadata = pickle.loads((path / ".metadata").read_bytes())
            metadata.storage_meta = None
            told.append(metadata)
        assert told[0] == told[1]

    def test_the_writer_is_left_as_it_was(self, session: dcp.Session, tmp_path: Path) -> None:
        """Rule: its filesystem is its own again, also when the save fails; other users of it never noticed."""
        shared = _Noting()
        writer = FileSystemWriter(tmp_path / "step-1")
        writer.fs = shared
        dcp.save(some_state(), storage_writer=writer, checksum="crc32c")
        assert shared is writer.fs
        assert "create_stream" not in vars(shared)
        shared.full = True
        with pytest.raises(OSError, match="No space"):
            dcp.save(some_state(), storage_writer=writer, checkpoint_id=tmp_path / "step-2", checksum="crc32c")
        assert shared is writer.fs

    @pytest.mark.parametrize("habit", ["own streams", "seeks", "looks often"])
    def test_a_writer_with_ways_of_its_own_saves_without(
        self, session: dcp.Session, tmp_path: Path, caplog: pytest.LogCaptureFixture, habit: str
    ) -> None:
        """Rule: an item that cannot be told apart has no checksum, never a wrong one; one warning; nothing is lost."""
        writer = _OwnWays(habit, tmp_path / "unused")
        caplog.set_level(logging.WARNING)
        for step in (1, 2):
            result = dcp.save(
                larger_state(), storage_writer=writer, checkpoint_id=tmp_path / f"{step}", checksum="crc32c"
            )
            assert SaveState.COMMITTED == result.state
            assert loads(result.ref)
            columns = by_ref(result.ref)
            kept = set(np.flatnonzero(columns.located.checksum != NO_CHECKSUM).tolist())
            # Objects are written in one go, so looks in between tell nothing new.
            assert (2 if habit == "looks often" else 0) == len(kept)
            assert not kept & set(wrong_sums(columns, result.path))
        assert 1 == sum("have no checksum" in record.getMessage() for record in caplog.records)

    def test_a_rank_of_very_many_items_is_recorded_without(self, caplog: pytest.LogCaptureFixture) -> None:
        """Rule: checksums are never the reason for which the catalogue, or a manifest, cannot hold a save."""
        structure = fsdp_rank(0, 4, 10)
        attempt = Attempt("p/r", "default", 1, b"i" * 16, 1, Member(0, 4), "/ckpt/1", "/ckpt/1")
        none = np.zeros(10, dtype=np.bool_)
        random = np.random.default_rng(0)
        kept = []
        for count in (100_000, 200_000):
            extents = Extents(checksums=random.integers(0, 1 << 32, count))
            record = make_record(attempt, 1, EncodedPlan.of(structure.plan), structure, extents, (none, none))
            kept.append(decode_extents(record.extents).checksums is not None)
            assert limits.SEGMENT_RANKS * len(record.extents) < limits.MAX_INFLATED_BYTES
        assert [True, False] == kept
        assert "checksums of 200000 items" in caplog.text


class _Noting(FileSystem):
    """A disk that may be full."""

    def __init__(self) -> None:
        self.full = False

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if self.full and mode == "wb" and str(path).endswith(".distcp"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield stream


class _OwnWays(FileSystemWriter):
    """A writer that uses the streams of its filesystem as DCP's do not."""

    def __init__(self, habit: str, path: Path) -> None:
        super().__init__(path)
        self._habit = habit

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes by way of another filesystem."""
        given = self.fs
        self.fs = FileSystem() if self._habit == "own streams" else _Between(given, self._habit)
        try:
            return super().write_data(plan, planner)
        finally:
            self.fs = given


class _Between(FileSystem):
    """Stands between a writer and its filesystem."""

    def __init__(self, below: Any, habit: str) -> None:
        self._below = below
        self._habit = habit

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with self._below.create_stream(path, mode) as stream:
            if self._habit == "seeks":
                stream.seek(0)
                yield stream
            else:
                yield _Looking(stream)


class _Looking:
    """A stream that asks where it is before every write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, content: Any) -> Any:
        """Looks, then writes."""
        self._stream.tell()
        return self._stream.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
