"""Row 29 with real saves: whatever the layout of the files, what is missing, cut or altered is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from shardbook import Client, dcp, verify
from shardbook.dcp import SaveState
from shardbook.verifying import FaultKind
from tests.torch.harness import RankPool
from tests.torch.test_checksums import WRITERS, larger_state

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


@pytest.mark.parametrize("writer", WRITERS)
def test_what_dcps_writers_wrote_is_all_there(session: dcp.Session, server: str, tmp_path: Path, writer: str) -> None:
    """Threads, a file an item, transforms, fsspec: no file is too short for its extents, and none overlap."""
    path = str(tmp_path / "step-1")
    result = dcp.save(larger_state(), storage_writer=WRITERS[writer](path), checksum="crc32c")
    assert SaveState.COMMITTED == result.state
    by_ref, by_path = verify(result.ref, checksums=True, client=Client(server)), verify(path, checksums=True)
    assert (True, True, 8, 8) == (by_ref.is_ok, by_path.is_ok, by_ref.checked_count, by_path.checked_count)
    # Nothing but what the metadata names lies there, and it ends where the last extent does.
    files = {file.relative_to(path).as_posix(): file.stat().st_size for file in Path(path).rglob("*.distcp")}
    assert (len(files), sum(files.values())) == (by_ref.file_count, by_ref.size_bytes)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("hurt", "kind", "is_refused"),
    [(Path.unlink, FaultKind.MISSING, True), (_cut, FaultKind.TRUNCATED, True), (_alter, FaultKind.ALTERED, False)],
    ids=["missing", "truncated", "altered"],
)
def test_damage_is_named(
    session: dcp.Session, server: str, tmp_path: Path, hurt: Callable[[Path], None], kind: FaultKind, is_refused: bool
) -> None:
    """By its name and by its place; a load of what is not there raises, and never fills in something else."""
    path = tmp_path / "step-1"
    result = dcp.save({"w": torch.rand(4096)}, storage_writer=FileSystemWriter(path), checksum="crc32c")
    (data,) = path.rglob("*.distcp")
    hurt(data)
    for target in (result.ref, path):
        (fault,) = verify(target, checksums=True, client=Client(server)).faults
        assert (kind, 0, data.relative_to(path).as_posix(), ("w",)) == (fault.kind, fault.rank, fault.file, fault.fqns)
    if is_refused:
        with pytest.raises(Exception, match=r".+"):  # torch's reader says it in words of its own
            dcp.load({"w": torch.zeros(4096)}, result.ref)


def test_losses_are_told_by_rank(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Of four real ranks, two lose their files."""
    from tests.torch import jobs

    path = tmp_path / "step-1"
    saved = pool.run(jobs.save, "fsdp", [str(path)], {"run": run, "server": server}, {}, world_size=4)
    assert "COMMITTED" == saved[0].results[0].state
    assert verify(path).is_ok
    for file in [*path.rglob("__1_*.distcp"), *path.rglob("__3_*.distcp")]:
        file.unlink()
    report = verify(path)
    assert ((1, 3), {1, 3}) == (report.faulty_ranks, {fault.rank for fault in report.faults})
    assert verify(path, ranks=[0, 2]).is_ok
