"""``shardbook move`` and ``stores``: real copies, readers that follow them, and what is refused."""

from __future__ import annotations

import itertools
import shutil
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from shardbook import move, read
from shardbook.cli import failures
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.manifest import AttemptIdentity
from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook.events import EventKind
from shardbook.moving import MoveOutcome
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.data_files import FILES, write_checkpoint
from tests.behaviour.client.directories import identity

_numbers = itertools.count(1)
STEPS = (10, 20, 30)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"move/run-{next(_numbers)}"


class Cluster:
    """Stores on a disk, and a run of three checkpoints in the first of them."""

    def __init__(
        self, root: Path, run: str, monkeypatch: pytest.MonkeyPatch, shardbook: Shardbook, folder: str = "8b"
    ) -> None:
        self.root, self.run, self.folder = root, run, folder
        self.who: dict[int, AttemptIdentity] = {step: identity(step, run=run) for step in STEPS}
        self.use(monkeypatch, lustre=root / "lustre", archive=root / "archive")
        for step, who in self.who.items():
            write_checkpoint(self.path("lustre", step), who)
        assert 0 == shardbook("sync", str(root / "lustre")).code

    def save_plainly(self, step: int, shardbook: Shardbook) -> None:
        """Saves a checkpoint with torch's own DCP, whose tensor can be read, and imports it."""
        with pytest.warns(UserWarning, match="single process"):
            torch_dcp.save(
                {"model.w": torch.arange(60.0).reshape(6, 10)}, checkpoint_id=self.path("lustre", step), no_dist=True
            )
        assert 0 == shardbook("import", str(self.path("lustre", step)), "--run", self.run).code

    def use(self, monkeypatch: pytest.MonkeyPatch, **stores: object) -> None:
        """Configures stores."""
        monkeypatch.setenv("SHARDBOOK_STORES", ",".join(f"{name}={root}" for name, root in stores.items()))

    def path(self, store: str, step: int) -> Path:
        """Where a checkpoint would be in a store."""
        return self.root / store / self.folder / f"step-{step}"

    def copy(self, *steps: int) -> None:
        """Copies checkpoints as rsync would."""
        for step in steps or STEPS:
            shutil.copytree(self.path("lustre", step), self.path("archive", step), dirs_exist_ok=True)

    def data(self, store: str, step: int, name: str = "__0_0.distcp") -> Path:
        """A data file of one."""
        folder = self.path(store, step)
        return (folder / self.who[step].prefix if step in self.who else folder) / name


@pytest.fixture
def cluster(client: Client, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch, shardbook: Shardbook) -> Cluster:
    """The stores ``lustre`` and ``archive``, and a run in the former."""
    return Cluster(tmp_path, run, monkeypatch, shardbook)


def locations(client: Client, run: str) -> dict[int, tuple[str, ...]]:
    """Where the checkpoints of a run are, by step."""
    return {one.step: one.locations for one in client.list_checkpoints(run)}


def test_a_run_is_moved_after_a_copy(client: Client, shardbook: Shardbook, cluster: Cluster) -> None:
    """The catalogue says the new place, readers find it, an event tells it, and its directory is whole by itself."""
    run, before = cluster.run, list(client.watch(run=cluster.run, since="start", until_now=True))
    cluster.copy()
    dry = shardbook("move", run, "--to", "archive", "--dry-run")
    assert (0, "3 moved, and nothing was switched") == (dry.code, dry.out.splitlines()[-1])
    assert {("lustre:8b/step-10",)} <= set(locations(client, run).values())
    ran = shardbook("move", run, "--to", "archive")
    assert (0, "", "3 moved") == (ran.code, ran.err, ran.out.splitlines()[-1])
    assert [["moved", f"{run}@{step}", "130 B", f"archive:8b/step-{step}", "-"] for step in (30, 20, 10)] == ran.rows[
        1:-1
    ]
    assert {step: (f"archive:8b/step-{step}",) for step in STEPS} == locations(client, run)
    shutil.rmtree(cluster.root / "lustre")
    assert 0 == shardbook("verify", f"{run}@20").code
    assert shardbook("verify", str(cluster.path("archive", 20))).out.startswith(str(cluster.path("archive", 20)))
    synced = shardbook("sync", str(cluster.root / "archive"), "--json").json["attempts"]
    assert ["present"] * 3 == [one["outcome"] for one in synced]
    told = [
        (one.kind, one.checkpoint and one.checkpoint.step)
        for one in client.watch(run=run, since="start", until_now=True)
    ][len(before) :]
    assert [(EventKind.MOVED, step) for step in (30, 20, 10)] == told
    again = shardbook("move", run, "--to", "archive", "--json").json
    assert [("present", False)] * 3 == [(one["outcome"], again["dry_run"]) for one in again["moves"]]


def test_what_is_half_there_stays(client: Client, shardbook: Shardbook, cluster: Cluster) -> None:
    """Exit 1 and why; the others are switched, and the same again goes on where it was."""
    cluster.copy()
    cluster.data("archive", 20).write_bytes(bytes(FILES["__0_0.distcp"] - 1))
    cluster.data("archive", 30).unlink()
    ran = shardbook("move", cluster.run, "--to", "archive")
    assert (failures.NEGATIVE, "1 moved, 2 incomplete") == (ran.code, ran.out.splitlines()[-1])
    assert "1 of 6 files are not there as a whole, the first is" in ran.out
    where = locations(client, cluster.run)
    assert {
        10: ("archive:8b/step-10",),
        20: ("lustre:8b/step-20",),
        30: ("lustre:8b/step-30",),
    } == where
    cluster.copy()
    again = shardbook("move", cluster.run, "--to", "archive")
    assert (0, "2 moved, 1 present") == (again.code, again.out.splitlines()[-1])


def test_an_interrupted_move_goes_on(client: Client, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one call switched stays switched; nothing of the next one is."""
    cluster.copy()
    monkeypatch.setattr("shardbook.moving.api._BATCH", 1)
    config = ClientConfig.from_env()
    going = move(cluster.run, "archive", config=config, client=client)
    assert MoveOutcome.MOVED is next(going).outcome
    going.close()  # type: ignore[attr-defined]
    assert 1 == sum(one[0].startswith("archive") for one in locations(client, cluster.run).values())
    left = [one.outcome for one in move(cluster.run, "archive", config=config, client=client)]
    assert [MoveOutcome.PRESENT, MoveOutcome.MOVED, MoveOutcome.MOVED] == left


def test_what_is_saved_meanwhile_is_not_touched(client: Client, shardbook: Shardbook, cluster: Cluster) -> None:
    """It goes where it goes."""
    cluster.copy()
    going = move(cluster.run, "archive", config=ClientConfig.from_env(), client=client)
    write_checkpoint(cluster.path("lustre", 40), identity(40, run=cluster.run))
    first = next(going)
    assert 0 == shardbook("sync", str(cluster.path("lustre", 40))).code
    assert {MoveOutcome.MOVED} == {first.outcome, *(one.outcome for one in going)}
    where = locations(client, cluster.run)
    assert ("lustre:8b/step-40",) == where.pop(40)
    assert {step: (f"archive:8b/step-{step}",) for step in STEPS} == where


def test_readers_go_on_at_the_second_place(
    client: Client, shardbook: Shardbook, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is missing at the first: they say so, and read the copy; `verify` tells which place is whole."""
    ref = f"{cluster.run}@50"
    cluster.save_plainly(50, shardbook)
    cluster.copy(50)
    added = shardbook("move", ref, "--to", "archive", "--keep")
    assert (0, "1 moved") == (added.code, added.out.splitlines()[-1])
    assert ("lustre:8b/step-50", "archive:8b/step-50") == client.get_checkpoint(ref).locations
    assert "and in" in shardbook("show", ref).out
    whole = shardbook("cat", ref, "model.w", "--json").out
    assert "lacks a data file" not in caplog.text
    shutil.rmtree(cluster.path("lustre", 50))
    caplog.clear()
    assert whole == shardbook("cat", ref, "model.w", "--json").out
    assert f"{ref} lacks a data file in {cluster.path('lustre', 50)}: reading from {cluster.path('archive', 50)}" in (
        caplog.text
    )
    report = shardbook("verify", ref, "--json").json["report"]
    assert (str(cluster.path("archive", 50)), [str(cluster.path("lustre", 50))]) == (
        report["directory"],
        report["faulty_directories"],
    )
    ran = shardbook("verify", ref)
    assert (0, f"NOT all there in {cluster.path('lustre', 50)}, where it should be too") == (
        ran.code,
        ran.out.splitlines()[-1],
    )
    cluster.data("archive", 50).unlink()
    lost = shardbook("verify", ref)
    assert (failures.NEGATIVE, f"NOT all there in {cluster.path('archive', 50)}, where it should be too") == (
        lost.code,
        lost.out.splitlines()[-1],
    )
    with pytest.raises(NotFoundError) as caught:
        read(ref, "model.w")
    assert str(cluster.path("lustre", 50)) in caught.value.message


def test_lost_is_what_no_place_has(client: Client, shardbook: Shardbook, cluster: Cluster) -> None:
    """A copy that is whole keeps the flag away; without one it is set, and a move to where all is takes it away."""
    ref = f"{cluster.run}@30"
    cluster.copy()
    spare = cluster.root / "spare"
    shutil.copytree(cluster.path("archive", 30), spare)
    assert 0 == shardbook("move", ref, "--to", "archive", "--keep").code
    cluster.data("lustre", 30).unlink()
    assert 0 == shardbook("verify", ref).code
    assert not client.get_checkpoint(ref).data_missing
    cluster.data("archive", 30).unlink()
    assert failures.NOT_FOUND == shardbook("cat", ref, "model.w[0:3]", "--json").code
    assert client.get_checkpoint(ref).data_missing
    assert f"{cluster.run}@20" == client.get_checkpoint(f"{cluster.run}@latest").ref
    shutil.copytree(spare, cluster.path("archive", 30), dirs_exist_ok=True)
    assert 0 == shardbook("move", ref, "--to", "archive").code
    assert (False, ("archive:8b/step-30",)) == (
        client.get_checkpoint(ref).data_missing,
        client.get_checkpoint(ref).locations,
    )
    assert ref == client.get_checkpoint(f"{cluster.run}@latest").ref


def test_a_place_that_nobody_looked_at_may_have_all(
    client: Client, shardbook: Shardbook, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who knows one of two stores flags nothing."""
    ref = f"{cluster.run}@10"
    cluster.copy(10)
    assert 0 == shardbook("move", ref, "--to", "archive", "--keep").code
    cluster.use(monkeypatch, lustre=cluster.root / "lustre")
    cluster.data("lustre", 10).unlink()
    assert failures.NEGATIVE == shardbook("verify", ref).code
    assert failures.NOT_FOUND == shardbook("cat", ref, "model.w[0:3]", "--json").code
    assert not client.get_checkpoint(ref).data_missing


def test_files_are_deleted_at_all_places(
    client: Client, shardbook: Shardbook, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no other checkpoint has them: to the server, places of the same name are the same."""
    cluster = Cluster(tmp_path, run, monkeypatch, shardbook, folder=f"own-{uuid.uuid4().hex}")
    ref = f"{cluster.run}@20"
    cluster.copy(20)
    assert 0 == shardbook("move", ref, "--to", "archive", "--keep").code
    ran = shardbook("rm", ref, "--delete-files")
    assert 0 == ran.code, ran
    assert [] == sorted(cluster.path("lustre", 20).rglob("*")), ran
    assert not cluster.path("archive", 20).exists()
    assert cluster.path("lustre", 30).exists()


def test_other_clients_have_other_roots(
    client: Client, shardbook: Shardbook, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop knows the archive alone, in memory: it reads there; without any store it is told what to set."""
    ref, root = f"{cluster.run}@50", f"memory://{uuid.uuid4().hex}"
    cluster.save_plainly(50, shardbook)
    cluster.copy(50)
    assert 0 == shardbook("move", ref, "--to", "archive/", "--keep").code
    there = shardbook("cat", ref, "model.w", "--json").out
    filesystem = fsspec.filesystem("memory")
    for path in cluster.path("archive", 50).rglob("*.distcp"):
        filesystem.pipe_file(f"{root}/8b/step-50/{path.name}", path.read_bytes())
    cluster.use(monkeypatch, archive=root)
    assert there == shardbook("cat", ref, "model.w", "--json").out
    report = shardbook("verify", ref)
    assert (0, "not looked at: lustre:8b/step-50") == (report.code, report.out.splitlines()[-1])
    monkeypatch.delenv("SHARDBOOK_STORES")
    refused = shardbook("cat", ref, "model.w")
    assert failures.USAGE == refused.code
    assert "store 'lustre' of 'lustre:8b/step-50' is not configured here: set SHARDBOOK_STORES=lustre=ROOT" in (
        refused.err
    )
    assert "`shardbook stores`" in refused.err


def test_what_was_copied_is_said_with_from(client: Client, shardbook: Shardbook, cluster: Cluster) -> None:
    """Paths outside all stores need it; what is not below it stays."""
    shutil.copytree(cluster.root / "lustre" / "8b", cluster.root / "archive" / "cold")
    ran = shardbook("move", cluster.run, "--to", "archive/cold", "--from", "lustre/8b/step-10", "--plain")
    assert (failures.NEGATIVE, "1 incomplete, 2 outside") == (ran.code, ran.out.splitlines()[-1])
    ran = shardbook("move", cluster.run, "--to", "archive/cold", "--from", str(cluster.root / "lustre/8b"))
    assert (0, "3 moved") == (ran.code, ran.out.splitlines()[-1])
    assert ("archive:cold/step-10",) == locations(client, cluster.run)[10]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--to", "nowhere"], "UNKNOWN_STORE"),
        (["--to", "s3://me:secret@bucket/x"], "CREDENTIALS_IN_URI"),
        (["--to", "archive", "--from", "https://host/x?sig=secret"], "CREDENTIALS_IN_URI"),
        (["--to", "archive/../.."], "INVALID_LOCATION"),
        (["--to", "archive:/etc"], "INVALID_LOCATION"),
    ],
)
def test_places_that_are_refused(
    client: Client, shardbook: Shardbook, cluster: Cluster, words: list[str], reason: str
) -> None:
    """Exit 2 before anything is asked or looked at; no secret is repeated."""
    ran = shardbook("move", cluster.run, *words)
    assert (failures.USAGE, "") == (ran.code, ran.out)
    assert "secret" not in ran.err
    with pytest.raises(InvalidArgumentError) as caught:
        move(cluster.run, words[1], source=words[3] if len(words) > 2 else None, config=ClientConfig.from_env())
    assert reason == caught.value.reason


def test_one_that_is_not_committed_or_not_there(client: Client, shardbook: Shardbook, cluster: Cluster) -> None:
    """Exit 3 for what is not there."""
    assert failures.NOT_FOUND == shardbook("move", f"{cluster.run}@99", "--to", "archive").code
    assert failures.NOT_FOUND == shardbook("move", "move/no-such-run", "--to", "archive").code


def test_stores_says_which_roots_can_be_reached(
    shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1 when one cannot; asks no server."""
    monkeypatch.delenv("SHARDBOOK_SERVER", raising=False)
    monkeypatch.setenv("SHARDBOOK_STORES", f"here={tmp_path}")
    ran = shardbook("stores")
    assert (
        0,
        [["STORE", "REACHABLE", "ROOT", "WHAT"], ["here", "yes", str(tmp_path), f"{tmp_path} can be listed, 0 names"]],
    ) == (
        ran.code,
        ran.rows,
    )
    monkeypatch.setenv("SHARDBOOK_STORES", f"here={tmp_path},gone={tmp_path}/gone")
    found = shardbook("stores", "--json")
    assert (failures.NEGATIVE, {"here": True, "gone": False}) == (
        found.code,
        {one["name"]: one["reachable"] for one in found.json["stores"]},
    )
    monkeypatch.setenv("SHARDBOOK_STORES", "s=s3://me:secret@bucket/x")
    refused = shardbook("stores")
    assert failures.USAGE == refused.code
    assert "secret" not in refused.err
    monkeypatch.delenv("SHARDBOOK_STORES")
    assert (0, "none: SHARDBOOK_STORES=NAME=ROOT,NAME=ROOT names them\n") == (
        shardbook("stores").code,
        shardbook("stores").out,
    )
