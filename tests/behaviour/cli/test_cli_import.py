"""``shardbook import``: checkpoints of plain DCP and of other catalogues, on both databases."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from shardbook import dcp
from shardbook.client import Client
from shardbook.core import directory as files
from shardbook.core.description import pack_said
from shardbook.core.names import RunName
from shardbook.errors import AlreadyExistsError
from shardbook.importing import ImportedCheckpoint, ImportInto, find_directories, import_directories
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.cli.test_cli_verify import Wrapped, save_plainly
from tests.behaviour.client.data_files import write_checkpoint
from tests.behaviour.client.directories import CheckpointDirectory, identity, manifest
from tests.behaviour.client.saves import save, start_session
from tests.torch.equality import differences

_numbers = itertools.count(1)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"import/run-{next(_numbers)}"


def outcomes(shardbook: Shardbook, *args: str) -> list[tuple[str, str, str]]:
    """Outcome, reason and field of every directory."""
    found = shardbook("import", *args, "--json").json["checkpoints"]
    return [(one["outcome"], one["reason"], one["field"]) for one in found]


class TestPlainCheckpoints:
    """Directories that torch's own DCP saved."""

    def test_recorded_once_and_loaded_by_name(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """The step is in the directory's name; the second run finds everything there; a load by ref reads its bytes."""
        for step in (10, 20):
            save_plainly(tmp_path / f"step-{step}")
        ran = shardbook("import", str(tmp_path), "--run", run)
        assert (0, "") == (ran.code, ran.err)
        assert ["2 recorded"] == ran.out.splitlines()[-1:]
        assert sorted(["recorded", "DCP", "1", "3"] for _ in range(2)) == sorted(
            [row[0], row[2], row[3], row[4]] for row in ran.rows[1:3]
        )
        assert [("present", "", "")] * 2 == outcomes(shardbook, str(tmp_path), "--run", run)
        found = {one.step: one for one in client.list_checkpoints(run)}
        assert {10: (0, True, True, ""), 20: (0, True, True, "")} == {
            step: (one.session, one.live, one.recovered, one.prefix) for step, one in found.items()
        }
        assert 20 == client.get_checkpoint(f"{run}@latest").step
        state: dict[str, Any] = {"w": torch.zeros(6, 10), "optim": {"lr": 0.0}, "v": torch.zeros(3).bfloat16()}
        dcp.load(state, f"{run}@10")
        assert (1770.0, 0.1, 3.0) == (float(state["w"].sum()), state["optim"]["lr"], float(state["v"].sum()))
        assert 0 == shardbook("verify", f"{run}@10").code

    def test_metadata_comes_back_as_it_was(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """What the catalogue exports is DCP's own metadata, object by object."""
        save_plainly(tmp_path / "7")
        shardbook("import", str(tmp_path / "7"), "--run", run)
        exported = pickle.loads(b"".join(client.get_metadata(f"{run}@7").dcp_metadata()))
        assert [] == differences(pickle.loads((tmp_path / "7" / ".metadata").read_bytes()), exported)

    def test_ranks_are_known_by_the_names_of_files(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """World size and verify's ranks."""
        save_plainly(tmp_path / "7")
        (data,) = (tmp_path / "7").glob("*.distcp")
        metadata = torch_dcp.FileSystemReader(tmp_path / "7").read_metadata()
        for info in metadata.storage_data.values():
            info.relative_path = "__6_0.distcp"
        (tmp_path / "7" / ".metadata").write_bytes(pickle.dumps(metadata))
        shardbook("import", str(tmp_path / "7"), "--run", run)
        assert 7 == client.get_checkpoint(f"{run}@7").world_size
        (fault,) = shardbook("verify", f"{run}@7", "--json").json["report"]["faults"]
        assert ("missing", 6) == (fault["kind"], fault["rank"])
        data.rename(data.with_name("__6_0.distcp"))
        assert [0, 0] == [shardbook("verify", f"{run}@7", "--rank", rank).code for rank in ("6", "0")]

    def test_other_content_is_refused_with_the_field(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """What was saved over since then is told apart, and recorded anew when asked to."""
        path = tmp_path / "step-5"
        save_plainly(path)
        arguments = (str(path), "--run", run)
        assert [("recorded", "", "")] == outcomes(shardbook, *arguments)
        with pytest.warns(UserWarning, match="overwriting"):
            save_plainly(path, {"w": torch.zeros(5)})
        ran = shardbook("import", *arguments)
        assert (1, True) == (ran.code, "--attempt 2" in ran.out)
        assert [("refused", "ALREADY_EXISTS", "metadata_header")] == outcomes(shardbook, *arguments)
        assert [("recorded", "", "")] == outcomes(shardbook, *arguments, "--attempt", "2")
        assert ["w"] == [tensor.fqn for tensor in client.list_tensors(f"{run}@5")]
        assert [("present", "", "")] == outcomes(shardbook, *arguments, "--attempt", "2")

    def test_step_and_part_can_be_given(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """A name without a number needs a step; one step is of one directory."""
        save_plainly(tmp_path / "final")
        path = str(tmp_path / "final")
        assert [("refused", "NO_STEP", "step")] == outcomes(shardbook, path, "--run", run)
        assert [("recorded", "", "")] == outcomes(shardbook, path, "--run", run, "--step", "99", "--part", "weights")
        assert "weights" == client.get_checkpoint(f"{run}:weights@99").part
        assert [("present", "", "")] == outcomes(shardbook, path, "--run", f"{run}:weights", "--step", "99")
        assert 2 == shardbook("import", path, "--run", f"{run}:a", "--part", "b").code
        save_plainly(tmp_path / "final-2")
        ran = shardbook("import", str(tmp_path), "--run", run, "--step", "3")
        assert (2, True) == (ran.code, "2 checkpoint directories" in ran.err)

    def test_dry_run_records_nothing(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """It says what would be; a run that is not there stays away."""
        save_plainly(tmp_path / "7")
        ran = shardbook("import", str(tmp_path), "--run", run, "--dry-run", "--json")
        assert (0, {"recorded": 0, "present": 0, "planned": 1, "superseded": 0, "refused": 0}) == (
            ran.code,
            ran.json["counts"],
        )
        assert 3 == shardbook("ls", run).code
        shardbook("import", str(tmp_path), "--run", run)
        assert [("present", "", "")] == outcomes(shardbook, str(tmp_path), "--run", run, "--dry-run")

    def test_metadata_is_never_executed(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """A pickle of something else is refused, others go on; --trusted takes what is sound all the same."""
        for step in (1, 2, 3):
            save_plainly(tmp_path / str(step))
        canary = tmp_path / "canary"
        metadata = torch_dcp.FileSystemReader(tmp_path / "2").read_metadata()
        (tmp_path / "1" / ".metadata").write_bytes(pickle.dumps(Wrapped(open, str(canary), "w")))
        (tmp_path / "2" / ".metadata").write_bytes(pickle.dumps(Wrapped(copy.copy, metadata)))
        assert [
            ("refused", "UNSAFE_METADATA", ""),
            ("refused", "UNSAFE_METADATA", ""),
            ("recorded", "", ""),
        ] == outcomes(shardbook, str(tmp_path), "--run", run)
        assert not canary.exists()
        ran = shardbook("import", str(tmp_path / "2"), "--run", run, "--trusted")
        assert (0, "1 recorded") == (ran.code, ran.out.splitlines()[-1])

    def test_what_has_no_exact_form_is_refused_by_name(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Never recorded almost as it was."""
        save_plainly(tmp_path / "7")
        metadata = torch_dcp.FileSystemReader(tmp_path / "7").read_metadata()
        metadata.planner_data = ["not", "a", "dict"]
        (tmp_path / "7" / ".metadata").write_bytes(pickle.dumps(metadata))
        (one,) = shardbook("import", str(tmp_path / "7"), "--run", run, "--json").json["checkpoints"]
        assert ("refused", "UNSUPPORTED_METADATA", True) == (one["outcome"], one["reason"], "list" in one["message"])

    def test_says_that_it_takes_torch(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For plain DCP's directories, and only for those."""
        save_plainly(tmp_path / "a-3")
        write_checkpoint(tmp_path / "b", identity(5, run="elsewhere/run"))
        monkeypatch.setitem(sys.modules, "shardbook.dcp.importing", None)
        found = shardbook("import", str(tmp_path), "--run", run, "--json").json["checkpoints"]
        assert [("refused", "MISSING_PACKAGE"), ("recorded", "")] == [(one["outcome"], one["reason"]) for one in found]
        assert "pip install 'shardbook[torch]'" in found[0]["message"]

    def test_directories_of_other_filesystems(self, client: Client, tmp_path: Path, run: str) -> None:
        """Found below a URL, and recorded by it."""
        save_plainly(tmp_path / "3")
        filesystem = fsspec.filesystem("memory")
        for path in (tmp_path / "3").iterdir():
            filesystem.pipe_file(f"memory://{run}/3/{path.name}", path.read_bytes())
        found = find_directories([f"memory://{run}"])
        assert 1 == len(found)
        (result,) = import_directories(client, found, ImportInto(RunName.parse(run)))
        assert "recorded" == result.outcome, result.message
        assert client.get_checkpoint(f"{run}@3").location.startswith("memory://")


class TestOtherCatalogues:
    """Directories that Shardbook saved into."""

    def test_of_another_run_is_recorded_as_an_offline_save(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Its session means nothing here; it never moves `latest` once the run has a session of its own."""
        who = identity(1500, run="elsewhere/run", session=7)
        write_checkpoint(tmp_path / "a", who)
        assert [("recorded", "", "")] == outcomes(shardbook, str(tmp_path), "--run", run)
        assert [("present", "", "")] == outcomes(shardbook, str(tmp_path), "--run", run)
        found = client.get_checkpoint(f"{run}@1500")
        assert (0, who.incarnation.hex(), who.prefix, True) == (
            found.session,
            found.incarnation,
            found.prefix,
            found.recovered,
        )
        assert (found.name, 0) == (client.get_checkpoint(f"{run}@latest").name, shardbook("verify", found.ref).code)
        save(client, tmp_path / "own", 10, run=run, incarnation=b"o" * 16)
        assert 1 == client.get_checkpoint(f"{run}@latest").session
        CheckpointDirectory(tmp_path / "b").add_manifest(replace(who, step=2000))
        assert [("recorded", "", "")] == outcomes(shardbook, str(tmp_path / "b"), "--run", run)
        assert 10 == client.get_checkpoint(f"{run}@latest").step

    @pytest.mark.parametrize("how", [[], ["--part", "default"], ["--step", "1500"]])
    def test_of_its_own_run_is_what_sync_records(
        self, how: list[str], client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """Session and attempt stay; import and sync take each other's for theirs."""
        who = identity(1500, run=run, session=7)
        write_checkpoint(tmp_path, who)
        assert [("recorded", "", "")] == outcomes(shardbook, str(tmp_path), "--run", run, *how)
        assert 1 == shardbook("sync", str(tmp_path), "--json").json["counts"]["present"]
        found = client.get_checkpoint(f"{run}@latest")
        assert (7, "1500.s7.a1", True) == (found.session, found.name.rpartition("/")[2], found.recovered)
        # No session number comes twice.
        assert 8 == start_session(client, run, b"n" * 16).session

    def test_the_newest_whole_attempt_is_what_a_directory_means(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """One checkpoint a directory, records that nobody folded included, and those of killed saves not."""
        old = identity(5, run=run, session=1)
        directory = CheckpointDirectory(tmp_path).add_manifest(old)
        directory.add_records(identity(5, run=run, session=2, incarnation=b"2" * 16))
        directory.add_records(identity(5, run=run, session=3, incarnation=b"3" * 16), without=(0,))
        assert [("recorded", "", "")] == outcomes(shardbook, str(tmp_path), "--run", run)
        assert [2] == [one.session for one in client.list_checkpoints(run, show_all=True)]

    def test_incomplete_saves_are_refused(self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
        """Half a checkpoint is none."""
        CheckpointDirectory(tmp_path).add_records(identity(5), without=(0, 1))
        assert [("refused", "INCOMPLETE", "directory")] == outcomes(shardbook, str(tmp_path), "--run", run)

    def test_a_step_that_a_session_of_the_run_holds(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """What it saved stays; the answer is negative, for nothing was recorded."""
        save(client, tmp_path / "own", 1500, run=run, incarnation=b"o" * 16)
        write_checkpoint(tmp_path / "other", identity(1500, run="elsewhere/run", session=7))
        ran = shardbook("import", str(tmp_path / "other"), "--run", run, "--json")
        assert (1, ["superseded"]) == (ran.code, [one["outcome"] for one in ran.json["checkpoints"]])

    def test_a_copy_elsewhere_is_refused_by_its_location(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str
    ) -> None:
        """An attempt has one place in the catalogue."""
        who = identity(5, run=run)
        for name in ("a", "b"):
            CheckpointDirectory(tmp_path / name).add_manifest(who)
        assert [("recorded", "", ""), ("refused", "ALREADY_EXISTS", "location.location")] == outcomes(
            shardbook, str(tmp_path / "a"), str(tmp_path / "b"), "--run", run
        )

    def test_large_worlds_come_in_parts(
        self, client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As sync sends them."""
        monkeypatch.setattr("shardbook.recording._PART_BYTES", 5_000)
        who = identity(10, run="elsewhere/run", world_size=300)
        CheckpointDirectory(tmp_path).add_manifest(who)
        assert [("recorded", "", "")] == outcomes(shardbook, str(tmp_path), "--run", run)
        assert list(manifest(who).segments) == [one for _, one in client.get_metadata(f"{run}@10").segments]


@pytest.mark.parametrize("by", ["dcp", "shardbook"])
def test_labels_metrics_and_a_note_are_given(
    client: Client, shardbook: Shardbook, tmp_path: Path, run: str, by: str
) -> None:
    """Rule: they add to what a save of Shardbook says of itself, which comes along with who wrote it."""
    if by == "dcp":
        save_plainly(tmp_path / "5")
        own, host = {}, ""
    else:
        own, host = {"kept": "yes", "stage": "old"}, "node-7"
        said = pack_said(own, {"loss": 2.0}, '"old"', {"host": host})
        content = replace(manifest(identity(5, run="elsewhere/run")), said=said).to_bytes()
        for path in (files.manifest_path(identity(5).prefix), files.MANIFEST):
            (tmp_path / "5" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "5" / path).write_bytes(content)
    given = ("--label", "stage=eval", "--metric", "loss=1.5", "--note", "of old")
    ran = shardbook("import", str(tmp_path), "--run", run, *given)
    assert (0, "") == (ran.code, ran.err)
    found = client.get_checkpoint(f"{run}@5")
    assert ({**own, "stage": "eval"}, {"loss": 1.5}, "of old") == (found.labels, found.metrics, found.note)
    assert host == found.writer.host
    for wrong in (("--label", "stage"), ("--metric", "loss=low"), ("--metric", "loss=nan"), ("--label", "a b=c")):
        assert 2 == shardbook("import", str(tmp_path), "--run", run, *wrong).code


def test_nothing_to_import_is_a_negative_answer(client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
    """Somebody named the wrong directory; one that is not there is another answer."""
    assert [1, 3] == [shardbook("import", str(path), "--run", run).code for path in (tmp_path, tmp_path / "absent")]


def test_exit_codes(shardbook: Shardbook, client: Client, tmp_path: Path, run: str) -> None:
    """2 for what names no run, 4 for a server that is away: what was recorded before is told."""
    save_plainly(tmp_path / "1")
    assert 2 == shardbook("import", str(tmp_path), "--run", "no-run").code
    assert 2 == shardbook("import", str(tmp_path)).code
    gone = ("--server", "127.0.0.1:1", "--timeout", "1")
    assert 4 == shardbook("import", str(tmp_path), "--run", run, *gone).code


def test_json_has_the_documented_keys(client: Client, shardbook: Shardbook, tmp_path: Path, run: str) -> None:
    """What docs/cli.md lists from the code, no more and no less."""
    save_plainly(tmp_path / "1")
    said = shardbook("import", str(tmp_path), "--run", run, "--json").json
    assert ["checkpoints", "counts"] == list(said)
    assert [field.name for field in dataclasses.fields(ImportedCheckpoint)] == list(said["checkpoints"][0])


def test_unreadable_directories_do_not_stop_the_others(
    client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that refuses one of them says nothing of the rest."""
    for step in (1, 2):
        save_plainly(tmp_path / str(step))
    original = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.parent == tmp_path / "1":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert [("refused", "STORAGE_DENIED", ""), ("recorded", "", "")] == outcomes(shardbook, str(tmp_path), "--run", run)


def test_already_exists_is_what_the_server_says(client: Client, tmp_path: Path, run: str) -> None:
    """The verdict is the service's own, under the run's lock: no client decides by what it saw before."""
    from shardbook.recording import record_attempt

    who = identity(5, run=run)
    first = manifest(who)
    record_attempt(client, first, "/a", recovered=True)
    swapped = replace(first, structure_digests=tuple(reversed(first.structure_digests)))
    with pytest.raises(AlreadyExistsError):
        record_attempt(client, swapped, "/a", recovered=True)
