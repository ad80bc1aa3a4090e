"""A directory is enough: records, manifests, which of several attempts counts, and stores that are not disks."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from shardbook import dcp
from shardbook.core import directory as names
from shardbook.core.fold import fold, unfold
from shardbook.core.manifest import Manifest, RegistrationRecord
from shardbook.core.table import decode_table, encode_table
from shardbook.dcp import SaveState
from shardbook.dcp.directory import await_records, publish, read_attempt, read_records, write_failure, write_record
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import CorruptManifestError, NotFoundError
from tests.torch import jobs
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.harness import RankPool, files_below

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


def _files(path: Path) -> CheckpointFiles:
    return CheckpointFiles.of(FileSystemReader(path))


class TestFiles:
    """Small files, written whole or not at all."""

    def test_a_write_replaces_in_one_step(self, tmp_path: Path) -> None:
        """Nothing temporary is left."""
        files = _files(tmp_path)
        for content in (b"one", b"two"):
            files.write("a/b/c", content)
        assert (b"two", ["a/b/c"]) == (files.read("a/b/c"), files_below(tmp_path))

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        """Reading and listing say so without an error."""
        files = _files(tmp_path)
        assert (None, [], False) == (files.read("x"), files.names("x"), files.exists("x"))
        files.remove(["x"])

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path) -> None:
        """A directory in the file's place: the error passes, the temporary file is gone."""
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "child").touch()
        with pytest.raises(OSError):
            _files(tmp_path).write("taken", b"x")
        assert ["taken/child"] == files_below(tmp_path)


class TestRecords:
    """From records to a manifest."""

    @pytest.fixture
    def records(self, pool: RankPool, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A checkpoint directory of three ranks whose coordinator left the records as they were."""
        path = tmp_path / "step-1"
        pool.run(jobs.save_unfolded, "uneven", str(path), {"run": run, "mode": "offline"}, world_size=3)
        return path

    def test_load_folds_them(self, pool: RankPool, records: Path) -> None:
        """Nobody needs to have written a manifest; the load leaves it and ``.metadata`` for whoever comes next."""
        before = files_below(records)
        for plain_dcp in (False, True):
            loaded = pool.run(jobs.load, "uneven", [str(records)], plain_dcp, world_size=2)
            assert [{str(records): []}] * 2 == loaded
        assert set(before) < set(files_below(records))

    def test_load_from_a_directory_that_cannot_be_written(self, pool: RankPool, records: Path) -> None:
        """Loading needs no more than is there."""
        before = files_below(records)
        assert [{str(records): []}] == pool.run(jobs.load_read_only, "uneven", str(records), world_size=1)
        assert before == files_below(records)

    def test_one_is_missing(self, records: Path) -> None:
        """An attempt without all ranks is no checkpoint; the message says how far it came."""
        next(records.glob(".shardbook/*/rank-1.record")).unlink()
        with pytest.raises(NotFoundError, match="2 ranks"):
            dcp.load({}, records)

    def test_one_is_damaged(self, records: Path) -> None:
        """Said, not skipped."""
        record = next(records.glob(".shardbook/*/rank-1.record"))
        record.write_bytes(record.read_bytes()[:-10])
        with pytest.raises(CorruptManifestError):
            dcp.load({}, records)

    def test_one_belongs_to_another_attempt(self, records: Path) -> None:
        """Records do not mix."""
        path = next(records.glob(".shardbook/*/rank-1.record"))
        record = RegistrationRecord.from_bytes(path.read_bytes())
        other = dataclasses.replace(record, identity=dataclasses.replace(record.identity, step=99))
        path.write_bytes(other.to_bytes())
        with pytest.raises(CorruptManifestError, match="another attempt"):
            dcp.load({}, records)

    def test_a_blob_that_is_not_what_its_address_says(self, records: Path) -> None:
        """Digests are computed anew."""
        for path in records.glob(".shardbook/*/*.record"):
            record = RegistrationRecord.from_bytes(path.read_bytes())
            table, *rest = record.blobs
            decoded, _ = decode_table(table.payload)
            renamed = dataclasses.replace(decoded, fqns=tuple(f"x{fqn}" for fqn in decoded.fqns), key_paths=None)
            swapped = dataclasses.replace(table, payload=encode_table(renamed).payload)
            path.write_bytes(dataclasses.replace(record, blobs=(swapped, *rest)).to_bytes())
        with pytest.raises(CorruptManifestError, match="address"):
            dcp.load({}, records)

    def test_a_manifest_says_the_same(self, records: Path) -> None:
        """Folding, storing and reading again changes nothing."""
        files = _files(records)
        folded = read_attempt(files)
        assert folded is not None
        again = unfold(Manifest.from_bytes(folded.manifest.to_bytes()))
        assert folded.structure.fqns == again.structure.fqns
        assert folded.located.start.tolist() == again.located.start.tolist()
        assert folded.manifest == again.manifest

    def test_waiting_for_records(self, records: Path) -> None:
        """All there; one missing; one that left word why."""
        files = _files(records)
        prefix = next(name for name in files.names(names.ROOT) if names.is_prefix(name))
        assert await_records(files, prefix, 3, 5.0).is_empty
        began_s = time.monotonic()
        assert (3,) == await_records(files, prefix, 4, 0.3).missing
        write_failure(files, prefix, 3, "disk \ud800 full")
        absence = await_records(files, prefix, 4, 30.0)
        assert time.monotonic() - began_s < 5
        assert "rank 3 failed: disk" in str(absence)

    def test_an_older_attempt_does_not_replace_a_newer_one(self, records: Path) -> None:
        """A straggler's coordinator gets a manifest of its own, no more."""
        files = _files(records)
        prefix = next(name for name in files.names(names.ROOT) if names.is_prefix(name))
        mine = read_records(files, prefix, 3)
        older = [
            dataclasses.replace(
                record,
                identity=dataclasses.replace(
                    record.identity, incarnation=b"\7" * 16, prefix="070707070707-a1", write_time_s=1.0
                ),
            )
            for record in mine
        ]
        for record in older:
            write_record(files, record)
        newest = read_attempt(files)
        assert newest is not None
        assert prefix == newest.manifest.identity.prefix
        assert () == publish(files, newest, None)
        problems = publish(files, fold(older), None)
        assert "newer attempt" in problems[0]
        again = read_attempt(files)
        assert again is not None
        assert prefix == again.manifest.identity.prefix
        assert files.exists(names.manifest_path("070707070707-a1"))


class TestKilledCoordinator:
    """What is left where a coordinator was killed between two files."""

    def test_a_manifest_that_never_became_the_directorys(self, offline: dcp.Session, tmp_path: Path) -> None:
        """The newest attempt counts, whatever the directory's own manifest says."""
        path = tmp_path / "step-1"
        dcp.save(spoiled(), checkpoint_id=path)
        older = (path / names.MANIFEST).read_bytes()
        dcp.save(some_state(), checkpoint_id=path)
        assert loads(path)
        (path / names.MANIFEST).write_bytes(older)
        assert loads(path)

    def test_an_attempt_that_is_damaged_stands_in_nobodys_way(
        self, offline: dcp.Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A record or a manifest of another attempt, cut off: passed over, and said."""
        path = tmp_path / "step-1"
        dcp.save(some_state(), checkpoint_id=path)
        for prefix, name in (("0123456789ab-a1", "rank-0.record"), ("0123456789ab-a2", "manifest")):
            folder = path / names.attempt_path(prefix)
            folder.mkdir()
            (folder / name).write_bytes((path / names.MANIFEST).read_bytes()[:40])
        assert loads(path)
        assert 2 == len({one.getMessage() for one in caplog.records if "is damaged" in one.getMessage()})


def spoiled() -> dict[str, Any]:
    """Other values under the same keys."""
    return {key: value + 1 for key, value in some_state().items()}


class TestFsspec:
    """Stores that fsspec reaches."""

    def test_a_single_put(self, run: str) -> None:
        """An object store: no renames, no listings to trust; load finds it by URL."""
        dcp.init(run=run, mode="offline")
        url = f"memory://{run}/step-1"
        result = dcp.save(some_state(), storage_writer=FsspecWriter(url))
        dcp.close()
        assert (SaveState.UNREGISTERED, url) == (result.state, result.ref)
        assert loads(url)
        plain = blank_state()
        torch_load(plain, storage_reader=FsspecReader(url))
        assert torch.equal(some_state()["w"], plain["w"])

    def test_by_ref(self, server: str, run: str) -> None:
        """The catalogue records the URL."""
        dcp.init(run=run, server=server)
        result = dcp.save(some_state(), checkpoint_id=f"memory://{run}/step-1")
        assert SaveState.COMMITTED == result.state
        assert loads(result.ref)
        dcp.close()

    def test_a_local_directory(self, run: str, tmp_path: Path) -> None:
        """fsspec's own local files are renamed into place."""
        dcp.init(run=run, mode="offline")
        dcp.save(some_state(), storage_writer=FsspecWriter(str(tmp_path / "1")))
        dcp.save(some_state(), storage_writer=FsspecWriter(str(tmp_path / "1")))
        dcp.close()
        assert not [name for name in files_below(tmp_path) if name.endswith(".tmp")]
        assert loads(tmp_path / "1")


class TestWholeStateDict:
    """Planners of DCP's own."""

    def test_an_empty_state_dict_is_filled(self, offline: dcp.Session, tmp_path: Path) -> None:
        """As ``dcp_to_torch_save`` does it."""
        dcp.save({"m": some_state()}, checkpoint_id=tmp_path / "1")
        state: dict[str, Any] = {}
        dcp.load(state, tmp_path / "1", planner=_EmptyStateDictLoadPlanner())
        assert torch.equal(some_state()["w"], state["m"]["w"])

    def test_a_reader_of_the_callers(self, offline: dcp.Session, tmp_path: Path) -> None:
        """It is asked, where it points."""
        dcp.save(some_state(), storage_writer=FileSystemWriter(tmp_path / "1"))
        state = blank_state()
        dcp.load(state, storage_reader=FileSystemReader(tmp_path / "1"))
        assert torch.equal(some_state()["w"], state["w"])
