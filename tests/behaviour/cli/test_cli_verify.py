"""``shardbook verify``: refs of the catalogue and directories, what it prints, and its exit codes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from shardbook.cli import progress
from shardbook.client import Client
from shardbook.verifying import FileFault, VerifyReport
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.data_files import write_checkpoint
from tests.behaviour.client.directories import CheckpointDirectory, identity

_numbers = itertools.count(1)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"verify/run-{next(_numbers)}"


def recorded(shardbook: Shardbook, folder: Path, run: str, step: int = 1500) -> Path:
    """A checkpoint with its data in a folder, and in the catalogue; returns where its data files are."""
    who = identity(step, run=run)
    write_checkpoint(folder / f"step-{step}", who)
    assert 0 == shardbook("sync", str(folder)).code
    return folder / f"step-{step}" / who.prefix


def save_plainly(path: Path, state: dict[str, Any] | None = None) -> None:
    """Saves with torch's own DCP: three entries, unless it is given others."""
    usual = {"w": torch.arange(60.0).reshape(6, 10), "optim": {"lr": 0.1}, "v": torch.ones(3, dtype=torch.bfloat16)}
    with pytest.warns(UserWarning, match="single process"):
        torch_dcp.save(usual if state is None else state, checkpoint_id=path, no_dist=True)


class Wrapped:
    """Pickles as what a function of no part of DCP returns."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._made = function, arguments

    def __reduce__(self) -> Any:
        return self._made


class TestRefs:
    """Checkpoints of the catalogue, at their location."""

    def test_all_there(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """One line says what was looked at."""
        recorded(shardbook, tmp_path, run)
        ran = shardbook("verify", f"{run}@1500")
        assert (0, "") == (ran.code, ran.err)
        assert f"{run}@1500: all there: 6 files of 4 ranks, 130 B in 9 extents in {tmp_path / 'step-1500'}\n" == ran.out
        assert ran.out.replace("@1500", "@latest") == shardbook("verify", f"{run}@latest").out

    def test_a_loss_names_rank_file_and_bytes(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """A table of what is gone and cut; exit 1."""
        data = recorded(shardbook, tmp_path, run)
        (data / "__0_0.distcp").write_bytes(bytes(30))
        (data / "__3_1.distcp").unlink()
        ran = shardbook("verify", f"{run}@1500")
        assert 1 == ran.code
        assert [
            ["RANK", "FILE", "WHAT", "EXPECTED", "FOUND", "FROM BYTE", "LOST", "ENTRIES"],
            ["0", f"{data.name}/__0_0.distcp", "truncated", "34", "30", "30", "4", "note.0"],
            ["3", f"{data.name}/__3_1.distcp", "missing", "9", "-", "0", "9", "model.v"],
        ] == ran.rows[:3]
        assert "files of 2 ranks: 1 missing, 1 truncated; 13 B lost" == ran.out.splitlines()[-1]
        assert (0, 1) == tuple(shardbook("verify", f"{run}@1500", "--rank", rank).code for rank in ("1", "3"))

    def test_checksums_are_compared_when_asked_for(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """They come with the metadata from the catalogue, too."""
        who = identity(1500, run=run)
        write_checkpoint(tmp_path / "step-1500", who, has_sums=True)
        assert 0 == shardbook("sync", str(tmp_path)).code
        ran = shardbook("verify", f"{run}@1500", "--checksums")
        assert (0, True) == (ran.code, ran.out.endswith("; 6 of them compared with their checksums\n"))
        data = tmp_path / "step-1500" / who.prefix / "__1_0.distcp"
        data.write_bytes(bytes(35))
        assert 0 == shardbook("verify", f"{run}@1500").code
        ran = shardbook("verify", f"{run}@1500", "--checksums")
        assert (1, "files of 1 rank: 1 altered; 35 B lost") == (ran.code, ran.out.splitlines()[-1])

    def test_json_has_the_documented_keys(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """What docs/cli.md lists from the code, no more and no less."""
        (recorded(shardbook, tmp_path, run) / "__0_0.distcp").unlink()
        ran = shardbook("verify", f"{run}@1500", "--json", "--rank", "0", "--rank", "1")
        report = ran.json["report"]
        assert (1, ["report"]) == (ran.code, list(ran.json))
        assert [field.name for field in dataclasses.fields(VerifyReport)] == list(report)
        assert [field.name for field in dataclasses.fields(FileFault)] == list(report["faults"][0])
        assert ("catalogue", [0, 1], {"missing": 1, "truncated": 0, "overlapping": 0, "altered": 0}, "missing") == (
            report["source"],
            report["ranks"],
            report["fault_counts"],
            report["faults"][0]["kind"],
        )

    def test_a_location_that_is_gone_has_lost_everything(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """The catalogue says what there should be: a negative answer, not a question that cannot be answered."""
        recorded(shardbook, tmp_path / "ckpt", run)
        (tmp_path / "ckpt" / "step-1500").rename(tmp_path / "moved")
        ran = shardbook("verify", f"{run}@1500", "--json")
        assert (1, 6, 130) == (
            ran.code,
            ran.json["report"]["fault_counts"]["missing"],
            ran.json["report"]["lost_bytes"],
        )

    def test_stores_say_where_to_look(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was recorded below one mount is looked for below another; a store that is unknown here is an error."""
        monkeypatch.setenv("SHARDBOOK_STORES", f"box={tmp_path / 'here'}")
        recorded(shardbook, tmp_path / "here", run)
        (tmp_path / "here").rename(tmp_path / "there")
        assert 1 == shardbook("verify", f"{run}@1500").code
        monkeypatch.setenv("SHARDBOOK_STORES", f"box={tmp_path / 'there'}")
        assert 0 == shardbook("verify", f"{run}@1500").code
        monkeypatch.delenv("SHARDBOOK_STORES")
        ran = shardbook("verify", f"{run}@1500")
        assert (2, True) == (ran.code, "SHARDBOOK_STORES=box=" in ran.err)

    def test_many_losses_are_named_within_a_limit(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Fifty rows, the rest and all sums in numbers."""
        CheckpointDirectory(tmp_path / "1").add_manifest(identity(1, run=run, world_size=300))
        assert 0 == shardbook("sync", str(tmp_path)).code
        lines = shardbook("verify", f"{run}@1").out.splitlines()
        assert 1 + 50 + 3 == len(lines)
        assert ("and 250 more", "files of 300 ranks: 300 missing; 7.0 KiB lost") == (lines[51], lines[-1])


class TestExitCodes:
    """3 not found, 4 unavailable, 5 denied, 2 for what cannot be meant."""

    def test_not_found(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """Neither in the catalogue nor on storage; a run without a step is told how to go on."""
        assert [3, 3, 3] == [
            shardbook("verify", target).code for target in (f"{run}@7", str(tmp_path / "absent"), str(tmp_path))
        ]
        ran = shardbook("verify", run)
        assert (3, True) == (ran.code, f"{run}@latest" in ran.err)

    def test_usage(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """A rank that is none; a ref without a server."""
        recorded(shardbook, tmp_path, run)
        assert 2 == shardbook("verify", f"{run}@1500", "--rank", "4").code
        assert 2 == shardbook("verify", f"{run}@1500", "--rank", "-1").code

    def test_unavailable(self, shardbook: Shardbook, run: str) -> None:
        """The server is away."""
        assert 4 == shardbook("verify", f"{run}@1500", "--server", "127.0.0.1:1", "--timeout", "1").code

    def test_storage_that_does_not_answer(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is no loss: nobody could look."""
        recorded(shardbook, tmp_path, run)

        def fail(*_: Any) -> Any:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("shardbook._trees._LocalTree.sizes", fail)
        ran = shardbook("verify", f"{run}@1500")
        assert (4, "", True) == (ran.code, ran.out, "Input/output error" in ran.err)

    def test_denied(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The storage lets nobody look; no token would help."""
        recorded(shardbook, tmp_path, run)

        def denied(*_: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("shardbook._trees._LocalTree.sizes", denied)
        ran = shardbook("verify", f"{run}@1500")
        assert (5, True, False) == (ran.code, "Permission denied" in ran.err, "SHARDBOOK_TOKEN" in ran.err)


class TestPlainDirectories:
    """What torch's own DCP saved, by its ``.metadata``."""

    def test_needs_no_server(self, shardbook: Shardbook, tmp_path: Path) -> None:
        """All there, then cut, then gone."""
        save_plainly(tmp_path / "5")
        (data,) = (tmp_path / "5").glob("*.distcp")
        ran = shardbook("verify", str(tmp_path / "5"))
        assert (0, True) == (ran.code, ran.out.startswith(f"{tmp_path / '5'}: all there: 1 file of 1 rank, "))
        whole = data.read_bytes()
        data.write_bytes(whole[:-1])
        (fault,) = shardbook("verify", str(tmp_path / "5"), "--json").json["report"]["faults"]
        assert ("truncated", 0, len(whole), len(whole) - 1, 1, 1) == tuple(
            fault[key] for key in ("kind", "rank", "expected_bytes", "found_bytes", "lost_bytes", "extent_count")
        )
        data.unlink()
        report = shardbook("verify", str(tmp_path / "5"), "--json").json["report"]
        assert ("dcp", None, 3, len(whole)) == (
            report["source"],
            report["ref"],
            report["faults"][0]["extent_count"],
            report["lost_bytes"],
        )

    def test_metadata_is_never_executed(self, shardbook: Shardbook, tmp_path: Path) -> None:
        """What is not DCP's alone is refused before it is looked up; --trusted is for who knows better."""
        save_plainly(tmp_path / "5")
        path = tmp_path / "5" / ".metadata"
        metadata = torch_dcp.FileSystemReader(tmp_path / "5").read_metadata()
        canary = tmp_path / "canary"
        path.write_bytes(pickle.dumps(Wrapped(open, str(canary), "w")))
        ran = shardbook("verify", str(tmp_path / "5"))
        assert (1, True, False) == (ran.code, "--trusted" in ran.err, canary.exists())
        path.write_bytes(pickle.dumps(Wrapped(copy.copy, metadata)))
        assert [1, 0] == [shardbook("verify", str(tmp_path / "5"), *more).code for more in ((), ("--trusted",))]

    def test_a_file_outside_of_the_directory_is_refused(self, shardbook: Shardbook, tmp_path: Path) -> None:
        """A path is never followed out of the checkpoint."""
        save_plainly(tmp_path / "5")
        metadata = torch_dcp.FileSystemReader(tmp_path / "5").read_metadata()
        for info in metadata.storage_data.values():
            info.relative_path = "../../etc/passwd"
        (tmp_path / "5" / ".metadata").write_bytes(pickle.dumps(metadata))
        assert 1 == shardbook("verify", str(tmp_path / "5")).code

    def test_a_chunk_that_is_nowhere_is_refused(self, shardbook: Shardbook, tmp_path: Path) -> None:
        """Metadata that forgets one loses it, however whole the files are."""
        save_plainly(tmp_path / "5")
        metadata = torch_dcp.FileSystemReader(tmp_path / "5").read_metadata()
        del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == "w")]
        (tmp_path / "5" / ".metadata").write_bytes(pickle.dumps(metadata))
        ran = shardbook("verify", str(tmp_path / "5"))
        assert (1, True) == (ran.code, "1 of 3 chunks" in ran.err)

    def test_needs_no_torch(self, tmp_path: Path) -> None:
        """But for who trusts the pickle, whom the extra is named to; for an import, too."""
        save_plainly(tmp_path / "5")
        write_checkpoint(tmp_path / "6", identity(6))
        code = "import sys; sys.modules['torch'] = None; from shardbook.cli import main; main()"

        def run(*words: str) -> tuple[int, bool, str]:
            command = [sys.executable, "-c", code, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return done.returncode, "pip install 'shardbook[torch]'" in done.stderr, done.stderr

        assert [(0, False, "")] * 2 == [run("verify", str(tmp_path / name)) for name in ("5", "6")]
        assert (2, True) == run("verify", str(tmp_path / "5"), "--trusted")[:2]


class TestTerminal:
    """What somebody who watches sees."""

    def test_progress_is_shown_once_it_takes_long(
        self, shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On stderr, on a terminal, and never with --plain."""
        monkeypatch.setattr(progress, "_SOON_S", 0.0)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        with progress.shown("verifying") as tell:
            tell(1, 2, "files")
        write_checkpoint(tmp_path, identity(1500))
        shown = [shardbook("verify", str(tmp_path), *more) for more in ((), ("--plain",), ("--plain", "--json"))]
        assert [0, 0, 0] == [ran.code for ran in shown]
        assert ["", ""] == [ran.err for ran in shown[1:]]
        assert all("verifying" not in ran.out for ran in shown)

    def test_plain_tables_are_whole_on_narrow_terminals(
        self, shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A row is a line, without colours, whatever the terminal."""
        who = identity(1500)
        write_checkpoint(tmp_path, who)
        for path in (tmp_path / who.prefix).iterdir():
            path.unlink()
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.delenv("NO_COLOR")
        ran = shardbook("verify", str(tmp_path), "--plain")
        assert (1, 1 + 6 + 2, False) == (ran.code, len(ran.out.splitlines()), "\x1b" in ran.out)
