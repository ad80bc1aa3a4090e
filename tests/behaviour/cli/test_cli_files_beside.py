"""Data files that a save beside them may have, or come to need, are not deleted."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from shardbook._attempts import TreeFiles
from shardbook._publishing import export_dcp_metadata, settle
from shardbook._trees import open_tree
from shardbook.catalog import CheckpointState
from shardbook.client import Client
from shardbook.core.names import CheckpointName, RunName
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptKey, AttemptLocation
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.cli.test_cli_retention import recorded
from tests.behaviour.client.data_files import write_checkpoint
from tests.behaviour.client.directories import identity

_numbers = itertools.count(1)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"beside/run-{next(_numbers)}"


class Opened:
    """A job that opens attempts at a place of its choice."""

    def __init__(self, client: Client, run: str, location: str) -> None:
        self._client, self._run, self._location = client, str(RunName.parse(run)), location
        request = pb.StartSessionRequest(run=self._run, incarnation=b"w" * 16)
        self._session = client.start_session(request).session

    def open(self, step: int, prefix: str) -> str:
        """Opens an attempt, which one of its two ranks plans; returns its name."""
        place = AttemptLocation(location=self._location, prefix=prefix)
        request = pb.PlanSaveRequest(key=self._key(step), location=place, rank=0, plan_digest=b"d" * 32)
        self._client.plan_save(request)
        return f"{self._run}/parts/default/checkpoints/{step}.s{self._session}.a1"

    def abort(self, step: int) -> None:
        """Gives an attempt up."""
        self._client.abort(pb.AbortCheckpointRequest(key=self._key(step)))

    def _key(self, step: int) -> AttemptKey:
        return AttemptKey(
            run=self._run, step=step, session=self._session, incarnation=b"w" * 16, attempt=1, world_size=2
        )


@pytest.mark.parametrize("is_plain", [False, True])
def test_files_stay_while_a_save_may_have_them(
    client: Client, shardbook: Shardbook, tmp_path: Path, run: str, *, is_plain: bool
) -> None:
    """One that is not over, anywhere in the directory or in that of an attempt; the same command goes on after."""
    who = identity(1, run=run)
    if is_plain:  # all that says which attempt wrote the files is gone, so plain DCP's `.metadata` counts
        write_checkpoint(tmp_path / "step-1", who)
        files = TreeFiles(open_tree(tmp_path), str(tmp_path / "step-1"))
        assert () == settle(files, lambda one: export_dcp_metadata(files.directory, one))
        shutil.rmtree(tmp_path / "step-1" / ".shardbook")
        assert 0 == shardbook("import", str(tmp_path / "step-1"), "--run", run).code
        recorded(shardbook, tmp_path, run, 2)
    else:
        recorded(shardbook, tmp_path, run, 1, 2)
    data = tmp_path / "step-1" / who.prefix / "__0_0.distcp"
    writer = Opened(client, f"{run}-beside", str(tmp_path / "step-1"))
    beside = writer.open(1, "0123456789ab-a1")
    waited = writer.open(2, who.prefix if is_plain else "")
    ran = shardbook("rm", f"{run}@1", "--force", "--delete-files")
    told = f"{CheckpointName.parse(waited).ref} is not over and may have it, too; `shardbook rm {run}@1."
    assert (0, True) == (ran.code, told in ran.out), ran.out
    assert data.exists()
    dry = shardbook("prune", run, "--keep-last", "1", "--delete-files", "--dry-run", "--json")
    assert 1 == len(dry.json["unfinished"])
    writer.abort(2)
    assert CheckpointState.OPEN is client.get_checkpoint(beside).state
    ran = shardbook("rm", f"{run}@1", "--force", "--delete-files", "--json")
    assert ([], [], "done") == (
        ran.json["files"]["waits_for"],
        ran.json["files"]["shared_with"],
        ran.json["checkpoint"]["file_deletion"],
    )
    assert not data.exists()
