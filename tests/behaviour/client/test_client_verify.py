"""``shardbook.verify`` of directories, without any service: what is gone, what is cut, and what it says of it."""

from __future__ import annotations

import pickle
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

import shardbook
from shardbook import _trees
from shardbook.config import ClientConfig
from shardbook.core import directory as files
from shardbook.core.limits import MAX_NAMED_FILES
from shardbook.core.manifest import AttemptIdentity
from shardbook.errors import (
    CorruptManifestError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
)
from shardbook.verifying import FaultKind, VerifyReport
from tests.behaviour.client.data_files import FILES, WORLD_SIZE, records, write_checkpoint
from tests.behaviour.client.directories import CheckpointDirectory, identity

WHO = identity(1500)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A whole checkpoint with its data."""
    write_checkpoint(tmp_path / "step-1500", WHO)
    return tmp_path / "step-1500"


def told(report: VerifyReport) -> list[tuple[Any, ...]]:
    """What the faults say, in short."""
    return [
        (
            fault.kind.value,
            fault.rank,
            fault.file.removeprefix(f"{WHO.prefix}/"),
            fault.expected_bytes,
            fault.found_bytes,
        )
        for fault in report.faults
    ]


def test_a_whole_checkpoint_is_all_there(step: Path) -> None:
    """Several files a rank, a rank without any, one with gaps and transforms; nothing is written, no server asked."""
    before = {path: path.stat().st_mtime_ns for path in step.rglob("*")}
    report = shardbook.verify(step, config=ClientConfig(server="127.0.0.1:1"))
    assert (True, (), 0, ()) == (report.is_ok, report.faults, report.lost_bytes, report.faulty_ranks)
    assert ("manifest", WORLD_SIZE, 6, 9) == (
        report.source,
        report.world_size,
        report.file_count,
        report.extent_count,
    )
    assert 34 + 16 + 35 + 16 + 12 + 8 + 9 == report.size_bytes
    assert report.ref is not None
    assert report.ref.startswith("llm/8b@1500.s0.a1.")
    assert before == {path: path.stat().st_mtime_ns for path in step.rglob("*")}


def test_a_longer_file_and_a_strange_one_lose_nothing(step: Path) -> None:
    """Only what the checkpoint names counts."""
    (step / WHO.prefix / "__0_1.distcp").write_bytes(bytes(400))
    (step / WHO.prefix / "__9_0.distcp").write_bytes(b"")
    assert shardbook.verify(step).is_ok


@pytest.mark.parametrize("size", [0, 1, 23, 24, 33])
def test_a_truncated_file_is_named_with_what_it_lost(step: Path, size: int) -> None:
    """Rank, file, bytes expected and found, from which byte, how many bytes of how many extents, of which entries."""
    (step / WHO.prefix / "__0_0.distcp").write_bytes(bytes(size))
    report = shardbook.verify(step)
    assert not report.is_ok
    assert [("truncated", 0, "__0_0.distcp", 34, size)] == told(report)
    (fault,) = report.faults
    hurt = ("model.w", "note.0") if size < 24 else ("note.0",)
    assert (size, len(hurt), 34 - size, hurt) == (fault.offset, fault.extent_count, fault.lost_bytes, fault.fqns)
    assert ({"missing": 0, "truncated": 1, "overlapping": 0, "altered": 0}, (0,), 1, 34 - size) == (
        report.to_json()["fault_counts"],
        report.faulty_ranks,
        report.faulty_rank_count,
        report.lost_bytes,
    )


def test_what_lies_behind_a_gap_is_lost_from_where_it_begins(step: Path) -> None:
    """Bytes that no extent has are no loss: the file of the compressing rank ends within its gap."""
    (step / WHO.prefix / "__3_0.distcp").write_bytes(bytes(20))
    (fault,) = shardbook.verify(step).faults
    assert (32, 20, 24, 1, 8, ("note.3",)) == (
        fault.expected_bytes,
        fault.found_bytes,
        fault.offset,
        fault.extent_count,
        fault.lost_bytes,
        fault.fqns,
    )


def test_a_missing_file_is_lost_whole(step: Path) -> None:
    """A directory or a dangling link under its name is no file."""
    target = step / WHO.prefix / "__1_0.distcp"
    target.unlink()
    missing = [("missing", 1, "__1_0.distcp", 35, None)]
    assert missing == told(shardbook.verify(step))
    target.symlink_to(step / "nothing")
    assert missing == told(shardbook.verify(step))
    target.unlink()
    target.mkdir()
    assert missing == told(shardbook.verify(step))


def test_links_to_files_are_followed(step: Path, tmp_path: Path) -> None:
    """Data may lie elsewhere."""
    target = step / WHO.prefix / "__1_0.distcp"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    assert shardbook.verify(step).is_ok


def test_a_missing_directory_loses_every_file_of_it(step: Path) -> None:
    """By rank, and in full numbers."""
    (step / WHO.prefix).rename(step / "moved")
    report = shardbook.verify(step)
    assert [(0, "__0_0.distcp"), (0, "__0_1.distcp"), (1, "__1_0.distcp")] == [told[1:3] for told in told(report)[:3]]
    assert (6, (0, 1, 3), report.size_bytes) == (report.fault_count, report.faulty_ranks, report.lost_bytes)


def test_ranks_can_be_chosen(step: Path) -> None:
    """Only their files are looked at; one that wrote nothing has nothing to lose; one that is none is an error."""
    (step / WHO.prefix / "__1_0.distcp").unlink()
    assert not shardbook.verify(step, ranks=[1]).is_ok
    report = shardbook.verify(step, ranks=[3, 0, 3])
    assert (True, 4, (0, 3)) == (report.is_ok, report.file_count, report.ranks)
    nothing = shardbook.verify(step, ranks=[2])
    assert (True, 0, 0) == (nothing.is_ok, nothing.file_count, nothing.size_bytes)
    with pytest.raises(InvalidArgumentError) as caught:
        shardbook.verify(step, ranks=[0, 4])
    assert ("RANK_OUT_OF_RANGE", "ranks") == (caught.value.reason, caught.value.violations[0].field)


def test_faults_are_counted_in_full_and_named_within_a_limit(tmp_path: Path) -> None:
    """Many ranks lose their file: the first 50 are named, by rank."""
    who = identity(7, world_size=120)
    CheckpointDirectory(tmp_path).add_manifest(who)
    report = shardbook.verify(tmp_path)
    assert list(range(MAX_NAMED_FILES)) == [fault.rank for fault in report.faults]
    assert (120, 120, 120 * 24, 50) == (
        report.fault_counts[FaultKind.MISSING],
        report.faulty_rank_count,
        report.lost_bytes,
        len(report.faulty_ranks),
    )


def test_records_that_nobody_folded_count_too(tmp_path: Path) -> None:
    """What a load would find is what is looked for; the newest attempt counts."""
    older, newer = identity(7, session=1), identity(7, session=2, incarnation=b"n" * 16)
    directory = CheckpointDirectory(tmp_path).add_manifest(older).add_records(newer)
    report = shardbook.verify(tmp_path)
    assert ("llm/8b@7.s2.a1", newer.prefix) == (report.ref, report.faults[0].file.partition("/")[0])
    directory.add_records(identity(7, session=3, incarnation=b"x" * 16), without=(1,))
    assert "llm/8b@7.s2.a1" == shardbook.verify(tmp_path).ref


def test_extents_that_claim_the_same_bytes_are_a_fault(tmp_path: Path) -> None:
    """However the files are: a manifest that says so cannot be right."""
    content = _overlapping(WHO)
    path = tmp_path / files.manifest_path(WHO.prefix)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (tmp_path / WHO.prefix).mkdir()
    for name, size in FILES.items():
        (tmp_path / WHO.prefix / name).write_bytes(bytes(size))
    (fault,) = shardbook.verify(tmp_path).faults
    assert ("overlapping", 3, 8, 1, 0, ("model.w", "note.3")) == (
        fault.kind,
        fault.rank,
        fault.offset,
        fault.extent_count,
        fault.lost_bytes,
        fault.fqns,
    )


def _overlapping(who: AttemptIdentity) -> bytes:
    """A manifest in which the last rank's note begins within its matrix."""
    from dataclasses import replace

    import numpy as np

    from shardbook.core.extents import Extents, encode_extents
    from shardbook.core.fold import fold

    ranks = records(replace(who, world_size=WORLD_SIZE))
    extents = Extents(lengths=np.array([12, 8, 9]), starts=np.array([5, 8, 0]))
    ranks[3] = replace(ranks[3], extents=encode_extents(extents))
    return fold(ranks).manifest.to_bytes()


class TestChecksums:
    """Bytes are compared where somebody kept a checksum of them, and only when asked."""

    @pytest.fixture
    def summed(self, tmp_path: Path) -> Path:
        """A whole checkpoint of whose nine items six have a checksum."""
        write_checkpoint(tmp_path / "summed", WHO, has_sums=True)
        return tmp_path / "summed"

    def test_a_sound_checkpoint(self, summed: Path, step: Path) -> None:
        """How many were compared is told; nothing is compared of what nobody summed."""
        report = shardbook.verify(summed, checksums=True)
        assert (True, 6, 0) == (report.is_ok, report.checked_count, report.lost_bytes)
        assert 2 == shardbook.verify(summed, checksums=True, ranks=[2, 3]).checked_count
        assert (None, 0) == (
            shardbook.verify(summed).checked_count,
            shardbook.verify(step, checksums=True).checked_count,
        )

    @pytest.mark.parametrize("slice_bytes", [1, 7, 1 << 20])
    def test_altered_bytes_are_named(self, summed: Path, slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One bit of one item: rank, file, where the item begins, how many bytes it has, whose they are."""
        monkeypatch.setattr("shardbook.verifying.sums._SLICE_BYTES", slice_bytes)
        path = summed / WHO.prefix / "__3_0.distcp"
        content = bytearray(path.read_bytes())
        content[31] ^= 1
        path.write_bytes(content)
        assert shardbook.verify(summed).is_ok
        report = shardbook.verify(summed, checksums=True)
        (fault,) = report.faults
        assert (("altered", 3, 32, 32), (24, 1, 8, ("note.3",)), 8) == (
            (fault.kind, fault.rank, fault.expected_bytes, fault.found_bytes),
            (fault.offset, fault.extent_count, fault.lost_bytes, fault.fqns),
            report.lost_bytes,
        )
        content[5] ^= 1  # and the item before it, in another place of the file
        path.write_bytes(content)
        (fault,) = shardbook.verify(summed, checksums=True).faults
        assert (5, 2, 20) == (fault.offset, fault.extent_count, fault.lost_bytes)

    def test_what_belongs_to_no_item_may_change(self, summed: Path) -> None:
        """Gaps, and items that nobody summed."""
        for name, at in (("__3_0.distcp", 0), ("__3_0.distcp", 20), ("__3_1.distcp", 0)):
            path = summed / WHO.prefix / name
            content = bytearray(path.read_bytes())
            content[at] ^= 255
            path.write_bytes(content)
        assert shardbook.verify(summed, checksums=True).is_ok

    def test_what_is_not_there_is_lost_once(self, summed: Path) -> None:
        """Of a file that is cut, what is whole is compared, and the rest is no alteration."""
        (summed / WHO.prefix / "__1_0.distcp").unlink()
        path = summed / WHO.prefix / "__0_0.distcp"
        path.write_bytes(b"x" + path.read_bytes()[1:30])
        report = shardbook.verify(summed, checksums=True)
        assert [("truncated", 0), ("altered", 0), ("missing", 1)] == [
            (fault.kind.value, fault.rank) for fault in report.faults
        ]
        assert (3, 4 + 24 + 35) == (report.checked_count, report.lost_bytes)

    def test_other_filesystems_are_read_too(self, summed: Path) -> None:
        """Through fsspec."""
        url, filesystem = f"memory://{uuid.uuid4().hex}/summed", fsspec.filesystem("memory")
        for path in filter(Path.is_file, summed.rglob("*")):
            filesystem.pipe_file(f"{url}/{path.relative_to(summed)}", path.read_bytes())
        assert (True, 6) == (
            shardbook.verify(url, checksums=True).is_ok,
            shardbook.verify(url, checksums=True).checked_count,
        )
        filesystem.pipe_file(f"{url}/{WHO.prefix}/__1_0.distcp", bytes(35))
        assert [("altered", 1, "__1_0.distcp", 35, 35)] == told(shardbook.verify(url, checksums=True))

    def test_the_package_that_sums_is_named(self, summed: Path, step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only where there is something to sum."""
        monkeypatch.setitem(sys.modules, "google_crc32c", None)
        with pytest.raises(InvalidArgumentError, match=r"shardbook\[checksum\]") as caught:
            shardbook.verify(summed, checksums=True)
        assert "MISSING_PACKAGE" == caught.value.reason
        assert shardbook.verify(step, checksums=True).is_ok

    def test_progress_is_told_in_bytes(self, summed: Path) -> None:
        """After the files."""
        told: list[tuple[int, int, str]] = []
        shardbook.verify(summed, checksums=True, progress=lambda *heard: told.append(heard))
        assert ["files"] * 6 != [what for _, _, what in told]
        assert (1, 1, "MiB") == told[-1]


class TestRefusals:
    """What is no verdict on the data."""

    def test_there_is_no_such_directory(self, tmp_path: Path) -> None:
        """A path that is not there, or is a file, or holds nothing."""
        (tmp_path / "file").touch()
        for path, reason in (("absent", "NO_DIRECTORY"), ("file", "NO_DIRECTORY"), ("", "NO_CHECKPOINT")):
            with pytest.raises(NotFoundError) as caught:
                shardbook.verify(tmp_path / path)
            assert reason == caught.value.reason

    def test_an_attempt_without_all_ranks_is_no_checkpoint(self, tmp_path: Path) -> None:
        """The save did not finish; who is there is told."""
        CheckpointDirectory(tmp_path).add_records(WHO, without=(2,))
        with pytest.raises(NotFoundError, match=r"\(3 ranks\)") as caught:
            shardbook.verify(tmp_path)
        assert "INCOMPLETE" == caught.value.reason

    def test_a_damaged_manifest_is_an_error(self, step: Path) -> None:
        """Without it nobody knows what there should be."""
        for path in step.rglob("manifest"):
            path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(CorruptManifestError):
            shardbook.verify(step)

    def test_storage_that_refuses_is_told_apart(self, step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not being allowed to look is no loss, and neither is a disk that fails."""

        def names(self: Any, path: str) -> list[str]:
            if path.endswith(WHO.prefix) and ".shardbook" not in path:
                raise PermissionError(13, "Permission denied", path)
            return original(self, path)

        original = _trees._LocalTree.names
        monkeypatch.setattr(_trees._LocalTree, "names", names)
        with pytest.raises(PermissionDeniedError) as caught:
            shardbook.verify(step)
        assert "STORAGE_DENIED" == caught.value.reason

    def test_a_failing_disk_is_a_storage_error(self, step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And no loss either."""

        def fail(path: str) -> int:
            raise OSError(5, "Input/output error", path)

        monkeypatch.setattr(_trees, "_file_size", fail)
        with pytest.raises(StorageError, match="Input/output"):
            shardbook.verify(step)


def test_progress_is_told_up_to_the_end(step: Path) -> None:
    """In files; it never goes back."""
    told: list[tuple[int, int, str]] = []
    (step / WHO.prefix / "__1_0.distcp").unlink()
    shardbook.verify(step, progress=lambda *heard: told.append(heard))
    assert (6, 6, "files") == told[-1]
    assert sorted(told) == told


def test_reports_are_plain_values(step: Path) -> None:
    """They travel between processes."""
    report = shardbook.verify(step)
    assert report == pickle.loads(pickle.dumps(report))
