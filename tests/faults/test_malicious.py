"""P8, row 28: whoever can write a checkpoint directory can not run a program in those who load or sync it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardbook import dcp
from shardbook.core import directory as names
from shardbook.errors import CorruptManifestError, FailedPreconditionError
from shardbook.sync import SyncOutcome, sync_directories
from tests.faults.server import ServerProcess

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


class _Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[_Canary]:
    """A canary, which must never have run."""
    one = _Canary(tmp_path / "ran")
    yield one
    assert not one.path.exists()
    pickle.loads(pickle.dumps(one))
    assert one.path.exists(), "a canary that cannot run proves nothing"


@pytest.fixture
def directory(run: str, tmp_path: Path) -> Path:
    """A checkpoint that was saved without a service."""
    dcp.init(run=run, mode="offline")
    dcp.save({"w": torch.arange(6.0)}, checkpoint_id=tmp_path / "step-1")
    dcp.close()
    return tmp_path / "step-1"


def _loads(directory: Path) -> bool:
    state = {"w": torch.zeros(6)}
    dcp.load(state, directory)
    return torch.equal(torch.arange(6.0), state["w"])


def _sync(server: ServerProcess, directory: Path) -> list[SyncOutcome]:
    return [one.outcome for one in sync_directories(server.client, [directory])]


def test_a_metadata_file_beside_a_manifest_is_not_run(
    shared_server: ServerProcess, directory: Path, canary: _Canary
) -> None:
    """One that came later claims to be a newer save of plain DCP's: refused, and not passed over in silence.

    Whoever loads must not get older data for what was saved last. Sync never opens it, and an older one is not read.
    """
    path = directory / names.DCP_METADATA
    path.write_bytes(pickle.dumps(canary))
    with pytest.raises(FailedPreconditionError, match="Shardbook's own save") as caught:
        _loads(directory)
    assert "UNSAFE_METADATA" == caught.value.reason
    assert [SyncOutcome.RECORDED] == _sync(shared_server, directory)
    os.utime(path, (1.0, 1.0))
    assert _loads(directory)


def test_a_metadata_file_alone_is_refused(shared_server: ServerProcess, tmp_path: Path, canary: _Canary) -> None:
    """A directory that claims to be plain DCP's: refused by name, and no checkpoint for sync."""
    directory = tmp_path / "plain"
    directory.mkdir()
    (directory / names.DCP_METADATA).write_bytes(pickle.dumps(canary))
    with pytest.raises(FailedPreconditionError) as caught:
        _loads(directory)
    assert "UNSAFE_METADATA" == caught.value.reason
    assert [] == _sync(shared_server, directory)


@pytest.mark.parametrize("kind", ["manifest", "record"])
def test_our_own_files_are_no_pickles(
    shared_server: ServerProcess, directory: Path, canary: _Canary, kind: str
) -> None:
    """A pickle in the place of a manifest or record is damage, nothing else."""
    prefix = next(one.name for one in directory.iterdir() if names.is_prefix(one.name))
    attempt = directory / names.attempt_path(prefix)
    for path in (directory / names.MANIFEST, attempt / "manifest"):
        path.unlink()
    target = attempt / ("manifest" if kind == "manifest" else "rank-0.record")
    target.write_bytes(pickle.dumps(canary))
    with pytest.raises(CorruptManifestError):
        _loads(directory)
    assert [SyncOutcome.REFUSED] == _sync(shared_server, directory)


def test_an_entry_that_would_run_a_program_is_refused(
    shared_server: ServerProcess, run: str, tmp_path: Path, canary: _Canary
) -> None:
    """The bytes of an entry, by path and by ref: a typed error names it; what is beside it still loads."""
    directory = tmp_path / "step-1"
    dcp.init(run=run, server=shared_server.address)
    with pytest.warns(dcp.UnsafeEntryWarning, match="note"):
        result = dcp.save({"w": torch.arange(6.0), "note": canary}, checkpoint_id=directory)
    assert dcp.SaveState.COMMITTED == result.state
    for target in (directory, result.ref):
        with pytest.raises(FailedPreconditionError) as caught:
            dcp.load({"w": torch.zeros(6), "note": None}, target)
        assert ("UNSAFE_ENTRY", "note") == (caught.value.reason, caught.value.metadata["fqn"])
    assert _loads(directory)
    dcp.close()
    assert [SyncOutcome.PRESENT] == _sync(shared_server, directory)
