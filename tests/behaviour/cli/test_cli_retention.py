"""`shardbook prune`, `policy`, `rm`, `undelete`, `hold`, `release`; and lost data, flagged by who misses it."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
import typer
from torch.distributed.checkpoint.api import CheckpointException

import shardbook
from shardbook import dcp
from shardbook._transport import Transport
from shardbook.catalog import FileDeletion
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.retention import RetentionPolicy
from shardbook.deleting import delete_files
from shardbook.errors import FailedPreconditionError, NotFoundError
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.cli.test_cli_verify import save_plainly
from tests.behaviour.client.data_files import FILES, write_checkpoint
from tests.behaviour.client.directories import identity

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")
_numbers = itertools.count(1)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"keep/run-{next(_numbers)}"


def recorded(shardbook: Shardbook, folder: Path, run: str, *steps: int) -> list[Path]:
    """Checkpoints with their data in a folder, and in the catalogue; returns where they are."""
    for step in steps:
        write_checkpoint(folder / f"step-{step}", identity(step, run=run))
    assert 0 == shardbook("sync", str(folder)).code
    return [folder / f"step-{step}" for step in steps]


def steps(shardbook: Shardbook, run: str) -> list[int]:
    """Steps that are listed."""
    return [one["step"] for one in shardbook("ls", run, "--json").json["checkpoints"]]


class TestRm:
    """One checkpoint."""

    def test_says_what_it_left_and_the_way_back(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Data stays; undelete brings it back."""
        first, _ = recorded(shardbook, tmp_path, run, 1, 2)
        ran = shardbook("rm", f"{run}@1")
        assert 0 == ran.code
        assert f"deleted {run}@1.s0.a1" in ran.out
        assert f"130 B of data left in {first}: `shardbook rm {run}@1.s0.a1" in ran.out
        assert "`shardbook undelete" in ran.out
        assert [2] == steps(shardbook, run)
        shown = shardbook("show", f"{run}@1")
        assert (3, True) == (shown.code, "`shardbook undelete" in shown.err)
        assert (0, True) == (shardbook("undelete", f"{run}@1").code, first.exists())
        assert [2, 1] == steps(shardbook, run)

    def test_deletes_files_when_told_and_lists_them_before(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Only then; there is no way back."""
        first, second = recorded(shardbook, tmp_path, run, 1, 2)
        dry = shardbook("rm", f"{run}@1", "--delete-files", "--dry-run")
        assert {f"{identity().prefix}/{name}" for name in FILES} <= set(dry.out.split())
        assert first.exists()
        ran = shardbook("rm", f"{run}@1", "--delete-files", "--json")
        assert (6, 6, [], "done") == (
            ran.json["files"]["file_count"],
            ran.json["files"]["found_count"],
            ran.json["files"]["shared_with"],
            ran.json["checkpoint"]["file_deletion"],
        )
        assert (False, True) == (first.exists(), second.exists())
        back = shardbook("undelete", f"{run}@1")
        assert (1, True) == (back.code, "data files" in back.err)
        assert 0 == shardbook("rm", f"{run}@1", "--delete-files").code
        assert 0 == shardbook("verify", f"{run}@2").code

    def test_files_are_not_deleted_by_an_alias(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """The same command ends a deletion that was interrupted; by an alias it would begin another one."""
        first, second = recorded(shardbook, tmp_path, run, 1, 2)
        ran = shardbook("rm", f"{run}@latest", "--force", "--delete-files")
        assert (2, True) == (ran.code, f"`shardbook show {run}@latest`" in ran.err)
        assert [2, 1] == steps(shardbook, run)
        assert first.exists()
        assert second.exists()

    def test_latest_and_protected_ones_need_force_and_held_ones_refuse(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Each names what to do."""
        recorded(shardbook, tmp_path, run, 1, 2)
        ran = shardbook("rm", f"{run}@latest")
        assert (1, True) == (ran.code, "--force" in ran.err)
        held = shardbook("hold", f"{run}@1", "--ttl", "2h", "--name", "eval")
        assert (0, True) == (held.code, f"`shardbook release {run}@1 --name eval`" in held.out)
        assert "eval until" in shardbook("show", f"{run}@1").out
        ran = shardbook("rm", f"{run}@1", "--force")
        assert (1, True) == (ran.code, "held by eval" in ran.err)
        assert 0 == shardbook("release", f"{run}@1", "--name", "eval").code
        assert 0 == shardbook("rm", f"{run}@1").code
        assert 2 == shardbook("hold", f"{run}@2", "--ttl", "soon").code
        assert 0 == shardbook("hold", f"{run}@2", "--ttl", "90s").code
        assert 0 == shardbook("release", f"{run}@2").code
        assert 0 == shardbook("rm", f"{run}@latest", "--force").code

    def test_a_call_that_is_made_again_deletes_no_other(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its answer was lost: `latest` means another one by then."""
        recorded(shardbook, tmp_path, run, 1, 2, 3)
        call = Transport.call

        def twice(transport: Transport, rpc: Any, request: Any, **more: Any) -> Any:
            call(transport, rpc, request, **more)
            return call(transport, rpc, request, **more)

        monkeypatch.setattr(Transport, "call", twice)
        assert 3 == client.delete_checkpoint(f"{run}@latest", force=True)[0].step
        assert 3 == client.delete_checkpoint(f"{run}@3", force=True)[0].step
        assert [2, 1] == steps(shardbook, run)

    def test_shared_files_stay_until_the_last_one_goes(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """An import into another run has the same files."""
        first, _ = recorded(shardbook, tmp_path, run, 1, 2)
        assert 0 == shardbook("import", str(first), "--run", f"{run}-copy").code
        ran = shardbook("rm", f"{run}@1", "--delete-files")
        assert f"data left in {first}: {run}-copy@1.s0.a1" in ran.out
        assert 0 == shardbook("verify", f"{run}-copy@1").code
        assert 0 == shardbook("rm", f"{run}-copy@1", "--force", "--delete-files").code
        assert not first.exists()

    def test_what_plain_dcp_saved_over_it_since_is_left(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """It has the same file names, and no catalogue knows of it; what was not saved over goes."""
        for name, later_s in (("1", 60.0), ("2", 0.0)):
            save_plainly(tmp_path / name)
            assert 0 == shardbook("import", str(tmp_path / name), "--run", run).code
            save = tmp_path / name / ".metadata"
            os.utime(save, (save.stat().st_atime, save.stat().st_mtime + later_s))
        ran = shardbook("rm", f"{run}@1", "--delete-files")
        assert (0, True) == (ran.code, "what was saved there since has it, too" in ran.out)
        assert 0 == shardbook("verify", str(tmp_path / "1")).code
        assert 0 == shardbook("rm", f"{run}@2", "--force", "--delete-files").code
        assert not (tmp_path / "2").exists()

    def test_a_directory_out_of_reach_is_not_taken_for_deleted(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Such as on a volume that is not mounted here: nothing is deleted; once it is back the same command does."""
        place = tmp_path / "volume" / "ckpt"
        first, _ = recorded(shardbook, place, run, 1, 2)
        place.parent.rename(tmp_path / "away")
        ran = shardbook("rm", f"{run}@1", "--delete-files")
        assert (3, True) == (ran.code, "out of reach" in ran.err)
        assert FileDeletion.NONE is client.get_checkpoint(f"{run}@1").file_deletion
        (tmp_path / "away").rename(place.parent)
        assert 0 == shardbook("rm", f"{run}@1", "--delete-files").code
        assert not first.exists()


class TestPrune:
    """A run, and directories."""

    def test_a_dry_run_says_what_goes_and_why(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """And nothing goes; nor does it without --yes where nobody can be asked."""
        recorded(shardbook, tmp_path, run, 1, 2, 3, 4)
        shardbook("alias", "good", f"{run}@2")
        ran = shardbook("prune", run, "--keep-last", "1", "--keep-every", "3", "--dry-run", "--all")
        what = {row[0]: (row[1], row[-1]) for row in ran.rows[1:5]}
        assert {
            f"{run}@4": ("keep", "@latest; one of the last 1"),
            f"{run}@3": ("keep", "every 3 steps"),
            f"{run}@2": ("keep", "@good"),
            f"{run}@1": ("delete", "no rule keeps it"),
        } == what
        assert "1 of 4 checkpoints are not kept, 130 B" in ran.out
        refused = shardbook("prune", run, "--keep-last", "1")
        assert (2, True) == (refused.code, "--yes" in refused.err)
        assert [4, 3, 2, 1] == steps(shardbook, run)
        done = shardbook("prune", run, "--keep-last", "1", "--keep-every", "3", "--yes")
        assert (0, True) == (done.code, "deleted 1 checkpoints; 130 B of data left" in done.out)
        assert [4, 3, 2] == steps(shardbook, run)

    def test_what_subscriptions_alone_keep_is_told_with_the_way_out(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Also without --all: how many, for which one, and how it is forgotten."""
        name = run.replace("/", "-")
        assert 0 == shardbook("watch", run, "--name", name, "--exec", "true", "--once").code
        recorded(shardbook, tmp_path, run, 1, 2, 3)
        ran = shardbook("prune", run, "--keep-last", "1", "--yes")
        assert (0, "everything is kept") == (ran.code, ran.out.splitlines()[0]), ran.err
        assert f"2 checkpoints are kept for the subscription {name} alone" in ran.out
        assert f"`shardbook watch --name {name} --delete`" in ran.out
        assert 0 == shardbook("watch", "--name", name, "--delete").code
        ran = shardbook("prune", run, "--keep-last", "1", "--yes")
        assert "deleted 2 checkpoints" in ran.out
        assert "subscription" not in ran.out

    def test_the_stored_policy_counts_without_rules(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """It is shown, stored and removed by `policy`."""
        first, *_ = recorded(shardbook, tmp_path, run, 1, 2, 3)
        assert (1, True) == ((ran := shardbook("prune", run, "--yes")).code, "`shardbook policy" in ran.err)
        assert "no policy" in shardbook("policy", run).out
        shardbook("policy", run, "--keep-last", "2", "--keep-best", "1", "--metric", "loss", "--min")
        shown = shardbook("policy", run, "--json").json["policy"]
        assert {"keep_last": 2, "keep_every": 0, "newer_than_s": 0} == {k: shown[k] for k in shown if k != "keep_best"}
        assert [{"metric": "loss", "count": 1, "largest": False}] == shown["keep_best"]
        assert 0 == shardbook("metric", f"{run}@3", "loss=1.5").code
        ran = shardbook("prune", run, "--delete-files", "--yes", "--json")
        assert ([f"{run}@1"], [6]) == (
            [one["ref"].partition(".")[0] for one in ran.json["deleted"]],
            [one["file_count"] for one in ran.json["files"]],
        )
        assert not first.exists()
        assert "no policy" in shardbook("policy", run, "--clear").out

    def test_run_again_it_ends_what_was_interrupted(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Killed behind the deletion in the catalogue, and between two files."""
        first, second, _ = recorded(shardbook, tmp_path, run, 1, 2, 3)
        policy = RetentionPolicy(keep_last=1)
        names = [one.name for one in client.preview_prune(run, policy) if not one.keep]
        list(client.prune(run, names, policy, delete_files=True))

        class KilledError(Exception):
            """The process ends here."""

        def kill(_done: int, _total: int, _unit: str) -> None:
            raise KilledError

        with pytest.raises(KilledError):
            delete_files(names[0], client=client, config=ClientConfig.from_env(), progress=kill)
        for name in names:
            with pytest.raises(FailedPreconditionError) as refused:
                client.undelete_checkpoint(name)
            assert "FILES_DELETED" == refused.value.reason
        dry = shardbook("prune", run, "--keep-last", "1", "--delete-files", "--dry-run")
        assert "deletions of files to end" in dry.out
        ran = shardbook("prune", run, "--keep-last", "1", "--delete-files", "--yes")
        assert (0, False, False) == (ran.code, first.exists(), second.exists())
        assert {FileDeletion.DONE} == {client.get_checkpoint(name).file_deletion for name in names}

    def test_directories_need_offline_beside_a_server(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Aliases and holds are in the catalogue."""
        first, second = recorded(shardbook, tmp_path, run, 1, 2)
        ran = shardbook("prune", str(tmp_path), "--keep-last", "1")
        assert (2, True) == (ran.code, "--offline" in ran.err)
        arguments = ("prune", str(tmp_path), "--keep-last", "1", "--offline")
        assert "directories are pruned with --delete-files" in shardbook(*arguments).out
        assert first.exists()
        assert 2 == shardbook(*arguments, "--delete-files").code
        assert 0 == shardbook(*arguments, "--delete-files", "--yes").code
        assert (False, True) == (first.exists(), second.exists())
        ran = shardbook("verify", f"{run}@1")
        assert (1, True) == (ran.code, "flagged in the catalogue" in ran.err)

    def test_somebody_at_the_terminal_is_asked(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No is no."""
        recorded(shardbook, tmp_path, run, 1, 2)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        answers = iter([False, True])

        def confirm(_text: str, *, abort: bool) -> None:
            if not next(answers) and abort:
                raise typer.Abort

        monkeypatch.setattr(typer, "confirm", confirm)
        assert 1 == shardbook("prune", run, "--keep-last", "1").code
        assert [2, 1] == steps(shardbook, run)
        assert 0 == shardbook("prune", run, "--keep-last", "1").code
        assert [2] == steps(shardbook, run)


class TestLostData:
    """The flag, set and cleared by who looks."""

    def test_verify_sets_and_clears_it(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """`latest` passes over it meanwhile; a look at some ranks clears nothing."""
        _, second = recorded(shardbook, tmp_path, run, 1, 2)
        file = second / identity().prefix / "__1_0.distcp"
        content = file.read_bytes()
        file.unlink()
        ran = shardbook("verify", f"{run}@latest")
        assert (1, True) == (ran.code, "flagged in the catalogue: its data is missing" in ran.err)
        assert [["2", "data missing"], ["1", "committed"]] == [row[:2] for row in shardbook("ls", run).rows[1:]]
        assert "missing: `shardbook verify" in shardbook("show", f"{run}@2").out
        assert 1 == client.get_checkpoint(f"{run}@latest").step
        assert 0 == shardbook("verify", f"{run}@2", "--rank", "0").code
        assert client.get_checkpoint(f"{run}@2").data_missing
        file.write_bytes(content)
        assert "no longer flagged" in shardbook("verify", f"{run}@2").err
        assert (2, False) == ((found := client.get_checkpoint(f"{run}@latest")).step, found.data_missing)

    def test_a_volume_that_is_not_here_flags_nothing(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Neither by verify nor by a reader."""
        place = tmp_path / "volume" / "ckpt"
        recorded(shardbook, place, run, 1)
        place.parent.rename(tmp_path / "away")
        assert 1 == shardbook("verify", f"{run}@1").code
        with pytest.raises(NotFoundError):
            shardbook_read(f"{run}@1")
        assert not client.get_checkpoint(f"{run}@1").data_missing

    def test_a_reader_that_misses_a_file_flags_it(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """`read`, `load` and torch's own `load`; and its own error is what it raises."""
        *bad, _ = recorded(shardbook, tmp_path, run, 1, 2, 3, 4)
        for path in bad:
            (path / identity().prefix / "__0_0.distcp").unlink()
        with pytest.raises(NotFoundError) as missed:
            shardbook_read(f"{run}@1")
        assert "NO_DATA_FILE" == missed.value.reason
        with pytest.raises(Exception, match="__0_0"):
            dcp.load({"note.0": None}, f"{run}@2")
        with pytest.raises(CheckpointException, match="__0_0"):
            torch_dcp.load({"note.0": None}, storage_reader=dcp.ShardbookReader(f"{run}@3"), no_dist=True)
        flagged = [client.get_checkpoint(f"{run}@{step}").data_missing for step in (1, 2, 3, 4)]
        assert [True, True, True, False] == flagged

    def test_a_file_that_a_user_object_misses_is_none_of_the_checkpoint(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """`latest` goes on to mean what is whole."""
        torch_dcp.save({"model": {"w": torch.ones(4)}}, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
        assert 0 == shardbook("import", str(tmp_path / "step-1"), "--run", run).code

        class Model:
            """Reads its vocabulary when it is loaded."""

            def state_dict(self) -> dict[str, torch.Tensor]:
                return {"w": torch.zeros(4)}

            def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
                assert [1.0] * 4 == state["w"].tolist()
                (tmp_path / "vocabulary").read_bytes()

        with pytest.raises(FileNotFoundError, match="vocabulary"):
            dcp.load({"model": Model()}, f"{run}@1")
        assert not client.get_checkpoint(f"{run}@1").data_missing


def shardbook_read(ref: str) -> np.ndarray:
    """Reads the rows of a tensor that rank 0 wrote."""
    return shardbook.read(ref, "model.w", np.s_[0:3])
