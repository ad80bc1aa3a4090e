"""`shardbook gc`: what killed saves left is found and removed, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from shardbook._trees import Tree, open_tree
from shardbook.client import Client
from shardbook.collecting import LeftAttempt, Verdict, api, find_orphans, remove_orphan
from shardbook.collecting.known import Known
from shardbook.core import directory as files
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.names import RunName
from shardbook.errors import CheckpointClosedError, FailedPreconditionError, StorageError
from shardbook.recording import attempt_key
from shardbook.stores import Stores
from shardbook.v1 import catalog_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.app import running_server
from shardbook_server.settings import Settings
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.cli.test_cli_output import checkpoint
from tests.behaviour.client.directories import CheckpointDirectory, identity
from tests.behaviour.client.saves import register, start_session
from tests.behaviour.client.scripted import scripted_server
from tests.behaviour.rpc.api import wait_until

WHO = b"1" * 16
DAY_S = 86_400.0
OLD_S = 30 * DAY_S
KILLED = identity(10)


def put(path: Path, content: bytes = b"data") -> Path:
    """Writes a file and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def killed(folder: Path, who: AttemptIdentity = KILLED, *, without: tuple[int, ...] = (1, 3)) -> Path:
    """A save whose ranks wrote data, and whose job was killed before some of them left a record."""
    for rank in range(who.world_size):
        put(folder / who.prefix / f"__{rank}_0.distcp")
    CheckpointDirectory(folder).add_records(who, without=without)
    return folder


def aged(folder: Path, age_s: float = OLD_S) -> Path:
    """Makes everything below old."""
    for found in folder.rglob("*"):
        os.utime(found, (time.time() - age_s,) * 2, follow_symlinks=False)
    return folder


def verdicts(folder: Path | str, known: Known | None = None) -> dict[str, Verdict]:
    """What is said of each attempt."""
    return {one.prefix: one.verdict for one in find_orphans([folder], known=known)}


def everything(folder: Path) -> dict[str, bytes]:
    """All files below, with their content."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


# ------------------------------------------------------------------ what the files say


def _whole(folder: Path) -> None:
    CheckpointDirectory(folder).add_records(KILLED)


def _manifest(folder: Path) -> None:
    CheckpointDirectory(folder).add_manifest(KILLED)


def _damaged(folder: Path) -> None:
    put(folder / files.manifest_path(KILLED.prefix), b"\0" * 64)


def _damaged_top(folder: Path) -> None:
    put(folder / files.MANIFEST, b"\0" * 64)


def _copied(folder: Path) -> None:
    CheckpointDirectory(folder).add_manifest(KILLED)
    (folder / files.manifest_path(KILLED.prefix)).unlink()


def _named(folder: Path) -> None:
    put(folder / files.DCP_METADATA, f"..{KILLED.prefix}/__0_0.distcp..".encode())


def _unreadable(folder: Path) -> None:
    for rank in (0, 2):
        put(folder / files.record_path(KILLED.prefix, rank), b"\0" * 64)


@pytest.mark.parametrize(
    ("then", "verdict"),
    [
        (lambda _: None, Verdict.ORPHAN),
        (_whole, Verdict.WHOLE),
        (_manifest, Verdict.MANIFEST),
        (_damaged, Verdict.MANIFEST),
        (_damaged_top, Verdict.MANIFEST),
        (_copied, Verdict.MANIFEST),
        (_named, Verdict.REFERENCED),
        (_unreadable, Verdict.UNREADABLE),
    ],
    ids=["killed", "whole", "manifest", "damaged", "damaged-top", "copied", "named", "unreadable"],
)
def test_whatever_may_become_a_checkpoint_is_kept(
    then: Callable[[Path], None], verdict: Verdict, tmp_path: Path
) -> None:
    """Rule: in doubt it is kept, however old it is."""
    then(killed(tmp_path))
    assert {KILLED.prefix: verdict} == verdicts(aged(tmp_path))


def test_data_without_any_record_is_found(tmp_path: Path) -> None:
    """A job that was killed while it wrote its first checkpoint left nothing but data."""
    killed(tmp_path / "run" / "step-10", without=(0, 1, 2, 3))
    put(tmp_path / "run" / "notes" / "plan.txt")
    [found] = find_orphans([aged(tmp_path)], known=None)
    assert (Verdict.ORPHAN, None, 0, None, 4, 16) == (
        found.verdict,
        found.ref,
        found.record_count,
        found.world_size,
        found.file_count,
        found.size_bytes,
    )
    assert str(tmp_path / "run" / "step-10") == found.directory


@pytest.mark.parametrize("young", ["data", "record", "nested"])
def test_one_young_file_keeps_all(young: str, tmp_path: Path) -> None:
    """Rule: a rank that writes keeps the files of all others; how long it may be silent can be said."""
    killed(tmp_path)
    nested = put(tmp_path / KILLED.prefix / "below" / "part")
    aged(tmp_path)
    fresh = {
        "data": tmp_path / KILLED.prefix / "__2_0.distcp",
        "record": tmp_path / files.record_path(KILLED.prefix, 0),
        "nested": nested,
    }[young]
    os.utime(fresh, (time.time() - DAY_S,) * 2)
    assert {KILLED.prefix: Verdict.YOUNG} == verdicts(tmp_path)
    found = find_orphans([tmp_path], known=None, older_than_s=DAY_S / 2)
    assert [Verdict.ORPHAN] == [one.verdict for one in found]
    os.utime(fresh, (time.time() + OLD_S,) * 2)
    assert {KILLED.prefix: Verdict.YOUNG} == verdicts(tmp_path)


def test_what_a_link_leads_to_is_not_touched(tmp_path: Path) -> None:
    """Data may be shared by a link: neither the directory nor the files behind it are looked at."""
    shared = tmp_path / "shared"
    put(shared / "__0_0.distcp")
    step = tmp_path / "step-10"
    killed(step, identity(10, incarnation=b"2" * 16))
    (step / KILLED.prefix).symlink_to(shared)
    (step / identity(10, incarnation=b"2" * 16).prefix / "linked").symlink_to(shared)
    aged(tmp_path)
    [found] = find_orphans([step], known=None)
    remove_orphan(found, known=None)
    assert {"__0_0.distcp": b"data"} == everything(shared)
    assert (step / KILLED.prefix).is_symlink()


# ------------------------------------------------------------------ what the catalogue says


@pytest.mark.parametrize("has_records", [True, False], ids=["records", "data-alone"])
def test_the_catalogue_knows_who_is_at_work(has_records: bool, client: Client, tmp_path: Path) -> None:
    """Rule: open and committed attempts are kept, also those whose name no record tells; failed ones are not."""
    run = f"gc/at-work-{has_records}"
    session = start_session(client, run, WHO).session
    who = replace(identity(10, run=run, incarnation=WHO), session=session)
    killed(tmp_path, who, without=(1, 3) if has_records else (0, 1, 2, 3))
    register(client, who, tmp_path, ranks=(0, 2))
    known = Known(client, RunName.parse(run))
    assert {who.prefix: Verdict.OPEN} == verdicts(aged(tmp_path), known)
    place = types_pb2.AttemptLocation(location=str(tmp_path), prefix=who.prefix)
    failed = replace(who, step=20, attempt=2, prefix=identity(20, incarnation=WHO, attempt=2).prefix)
    failure = types_pb2.RankFailure(rank=0, phase="write", reason="disk full")
    place = types_pb2.AttemptLocation(location=str(tmp_path), prefix=failed.prefix)
    client.report_failure(pb.ReportFailureRequest(key=attempt_key(failed), location=place, failure=failure))
    killed(tmp_path, failed, without=(1, 3) if has_records else (0, 1, 2, 3))
    known.forget()
    assert {who.prefix: Verdict.OPEN, failed.prefix: Verdict.ORPHAN} == verdicts(aged(tmp_path), known)
    register(client, who, tmp_path, ranks=(1, 3))
    client.commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(who)), timeout_s=10)
    known.forget()
    assert {who.prefix: Verdict.COMMITTED, failed.prefix: Verdict.ORPHAN} == verdicts(tmp_path, known)
    # All runs are looked at where none is named.
    assert verdicts(tmp_path, known) == verdicts(tmp_path, Known(client))


@pytest.mark.parametrize(
    ("state", "is_writing", "verdict"),
    [
        ("EXPIRED", True, Verdict.REVIVABLE),
        ("EXPIRED", False, Verdict.ORPHAN),
        ("DELETED", False, Verdict.DELETED),
        ("UNSPECIFIED", False, Verdict.OPEN),
    ],
    ids=["alive", "gone", "deleted", "of-a-newer-release"],
)
def test_what_may_come_back_is_kept(state: str, is_writing: bool, verdict: Verdict, tmp_path: Path) -> None:
    """Ranks of a session that lives may go on with what expired; a deletion may be undone; who knows what is new."""
    killed(tmp_path, without=(0, 1, 2, 3))
    number = types_pb2.CheckpointState.Value(f"CHECKPOINT_STATE_{state}")
    place = types_pb2.AttemptLocation(location=str(tmp_path))
    expired = checkpoint(10, state=number, incarnation=KILLED.incarnation, live=False, location=place)
    run = types_pb2.Run(name="projects/llm/runs/8b", parts=[{"part": "default", "session": 3, "writing": is_writing}])
    with scripted_server(
        ListRuns=lambda *_: catalog_pb2.ListRunsResponse(runs=[run]),
        GetRun=lambda *_: catalog_pb2.GetRunResponse(run=run),
        ListCheckpoints=lambda *_: catalog_pb2.ListCheckpointsResponse(checkpoints=[expired]),
    ) as server:
        assert {KILLED.prefix: verdict} == verdicts(aged(tmp_path), Known(Client(server.target)))


@pytest.mark.parametrize(
    ("location", "state", "verdict"),
    [
        ("FOLDER/step-10", "COMMITTED", Verdict.COMMITTED),
        ("disk:step-10", "COMMITTED", Verdict.COMMITTED),
        ("disk:step-10", "EXPIRED", Verdict.ORPHAN),
        ("FOLDER/step-20", "COMMITTED", Verdict.ORPHAN),
        ("elsewhere:step-20", "OPEN", Verdict.ORPHAN),
        ("/mounted/elsewhere/step-10", "COMMITTED", Verdict.COMMITTED),
        ("elsewhere:run/step-10", "OPEN", Verdict.OPEN),
        ("elsewhere:step-10", "EXPIRED", Verdict.REVIVABLE),
    ],
    ids=["path", "store", "store-expired", "other-step", "other-step-store", "mount", "other-store", "mount-expired"],
)
def test_data_without_a_record_is_known_by_where_it_lies(
    location: str, state: str, verdict: Verdict, tmp_path: Path
) -> None:
    """Rule: a session's attempts share a name, so the directory decides; where it may be the same it is kept."""
    killed(tmp_path / "step-10", without=(0, 1, 2, 3))
    number = types_pb2.CheckpointState.Value(f"CHECKPOINT_STATE_{state}")
    place = types_pb2.AttemptLocation(location=location.replace("FOLDER", str(tmp_path)))
    known_one = checkpoint(10, state=number, incarnation=KILLED.incarnation, location=place)
    run = types_pb2.Run(name="projects/llm/runs/8b", parts=[{"part": "default", "session": 4, "writing": True}])
    with scripted_server(
        ListRuns=lambda *_: catalog_pb2.ListRunsResponse(runs=[run]),
        GetRun=lambda *_: catalog_pb2.GetRunResponse(run=run),
        ListCheckpoints=lambda *_: catalog_pb2.ListCheckpointsResponse(checkpoints=[known_one]),
    ) as server:
        known = Known(Client(server.target), stores=Stores({"disk": str(tmp_path)}))
        assert {KILLED.prefix: verdict} == verdicts(aged(tmp_path), known)


# ------------------------------------------------------------------ removing


def _orphan(folder: Path) -> LeftAttempt:
    return next(one for one in find_orphans([folder], known=None) if one.is_orphan)


def test_removing_leaves_all_else_as_it_was(tmp_path: Path) -> None:
    """Rule: the attempt's two directories go, and nothing else; again it is no error."""
    kept = identity(10, incarnation=b"2" * 16)
    put(tmp_path / kept.prefix / "__0_0.distcp")
    CheckpointDirectory(tmp_path).add_manifest(kept)
    put(tmp_path / "__0_0.distcp", b"another writer's")
    before = everything(tmp_path)
    orphan = _orphan(aged(killed(tmp_path)))
    removed = remove_orphan(orphan, known=None)
    assert (before, 6) == (everything(tmp_path), removed.file_count)
    assert not (tmp_path / KILLED.prefix).exists()
    assert not (tmp_path / files.attempt_path(KILLED.prefix)).exists()
    assert 0 == remove_orphan(orphan, known=None).file_count


@pytest.mark.parametrize("then", [_whole, _manifest], ids=["records", "manifest"])
def test_a_save_that_is_completed_after_the_look_is_kept(then: Callable[[Path], None], tmp_path: Path) -> None:
    """Rule: it is judged again before anything goes."""
    orphan = _orphan(aged(killed(tmp_path)))
    then(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(FailedPreconditionError) as refused:
        remove_orphan(orphan, known=None)
    assert ("NOT_AN_ORPHAN", before) == (refused.value.reason, everything(tmp_path))


def test_an_interrupted_removal_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: wherever it stops, no set of records is whole, and the next run finds what is left."""
    for stop_after in range(6):
        folder = tmp_path / str(stop_after)
        orphan = _orphan(aged(killed(folder)))
        left = stop_after
        tree = open_tree(folder)
        remove = type(tree).remove

        def failing(self: Tree, path: str) -> None:
            nonlocal left
            if not left:
                raise OSError("the disk is gone")
            left -= 1
            remove(self, path)  # noqa: B023 - called in this turn

        with monkeypatch.context() as patch:
            patch.setattr(type(tree), "remove", failing)
            with pytest.raises(StorageError, match="the disk is gone"):
                remove_orphan(orphan, known=None)
        records = sum((folder / files.record_path(KILLED.prefix, rank)).exists() for rank in range(4))
        assert max(0, 2 - stop_after) == records
        assert 6 - stop_after == remove_orphan(_orphan(folder), known=None).file_count
        assert {} == everything(folder)


def test_an_expired_attempt_is_failed_for_good_before_its_files_go(tmp_path: Path) -> None:
    """Rule: ranks that come back, however late, never complete a checkpoint whose files are gone."""
    url = f"sqlite:///{tmp_path / 'db'}"
    short = Settings(
        listen="127.0.0.1:0", http_listen="", database_url=url, drain_s=5, lease_ttl_s=0.6, reap_interval_s=0.1
    )
    with running_server(short) as server:
        client = Client(server.address)
        known = Known(client)
        session = start_session(client, "gc/late", WHO).session
        who = replace(identity(10, run="gc/late", incarnation=WHO), session=session)
        other = replace(who, step=20, attempt=2, prefix=identity(20, incarnation=WHO, attempt=2).prefix)
        orphans = {}
        for one in (who, other):
            folder = killed(tmp_path / f"step-{one.step}", one)
            register(client, one, folder, ranks=(0, 2))
        wait_until(
            lambda: {"EXPIRED"} == {one.state.value for one in client.list_checkpoints("gc/late", show_all=True)}
        )
        for one in (who, other):
            [orphans[one.step]] = find_orphans([aged(tmp_path / f"step-{one.step}")], known=known)
        # One is completed between the look and the removal, by ranks that do not leave records here.
        register(client, other, tmp_path / "step-20", ranks=(1, 3))
        client.commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(other)), timeout_s=10)
        with pytest.raises(FailedPreconditionError, match="no orphan any more: committed"):
            remove_orphan(orphans[20], known=known)
        wait_until(lambda: not known.is_alive(client.get_checkpoint("gc/late@20")))
        remove_orphan(orphans[10], known=known)
        assert not everything(tmp_path / "step-10")
        with pytest.raises(CheckpointClosedError):
            register(client, who, tmp_path / "step-10", ranks=(1, 3))
        assert "FAILED" == client.get_checkpoint(f"gc/late@10.s{session}.a1").state.value


# ------------------------------------------------------------------ other storage


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder in memory, as a URL."""
    filesystem = fsspec.filesystem("memory")
    yield "memory://gc-bucket"
    filesystem.rm("/gc-bucket", recursive=True)


def test_object_stores_are_looked_at_and_cleaned(bucket: str, tmp_path: Path) -> None:
    """The same by URL: one listing tells sizes and times."""
    filesystem = fsspec.filesystem("memory")
    killed(tmp_path)
    for path, content in everything(tmp_path).items():
        filesystem.pipe_file(f"/gc-bucket/step-10/{path}", content)
    filesystem.pipe_file("/gc-bucket/step-10/other", b"x")
    assert {KILLED.prefix: Verdict.YOUNG} == verdicts(bucket)
    later = time.time() + OLD_S
    [found] = find_orphans([bucket], known=None, now_s=later)
    assert (Verdict.ORPHAN, 6, 2, 4) == (found.verdict, found.file_count, found.record_count, found.world_size)
    remove_orphan(found, known=None, now_s=later)
    assert ["/gc-bucket/step-10/other"] == filesystem.find("/gc-bucket")


def test_files_of_unknown_age_are_kept(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: a store that does not say when a file was written has nothing old."""
    filesystem = fsspec.filesystem("memory")
    for path, content in everything(killed(tmp_path)).items():
        filesystem.pipe_file(f"/gc-bucket/step-10/{path}", content)
    monkeypatch.setattr("shardbook._trees._TIMES", ())
    assert [Verdict.UNDATED] == [one.verdict for one in find_orphans([bucket], known=None, now_s=time.time() + OLD_S)]


# ------------------------------------------------------------------ the command


def test_the_command_lists_asks_and_removes(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """Rule: nothing goes unless --yes says so, or somebody at a terminal; kept ones are counted and told why."""
    folder = aged(killed(tmp_path / "step-10"))
    CheckpointDirectory(tmp_path / "step-20").add_manifest(identity(20))
    before = everything(tmp_path)
    listed = shardbook("gc", str(tmp_path), "--dry-run")
    assert (0, "") == (listed.code, listed.err)
    assert [KILLED.prefix, str(folder), "2 of 4", "6"] == [listed.rows[1][at] for at in (-1, -2, 2, 1)]
    assert "kept: 1 has a manifest" == listed.out.splitlines()[-1]
    told = shardbook("gc", str(tmp_path), "--dry-run", "--all").rows[1:3]
    assert {"-", "has a manifest"} == {row[0] for row in told}
    nobody = shardbook("gc", str(tmp_path))
    assert (2, True) == (nobody.code, "--dry-run" in nobody.err)
    assert before == everything(tmp_path)
    ran = shardbook("gc", str(tmp_path), "--yes", "--json")
    assert (0, [KILLED.prefix], 1, False) == (
        ran.code,
        [one["prefix"] for one in ran.json["removed"]],
        ran.json["kept"]["manifest"],
        ran.json["offline"],
    )
    assert not everything(folder)
    assert ["no orphans"] == shardbook("gc", str(tmp_path), "--dry-run").out.splitlines()[:1]


def test_without_a_server_it_has_to_be_said(
    shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: a catalogue that does not answer is no reason to think that nobody is at work."""
    aged(killed(tmp_path / "ckpt"), 3 * DAY_S)
    monkeypatch.setenv("SHARDBOOK_STORES", f"disk={tmp_path}")
    away = shardbook("gc", "disk:ckpt", "--dry-run", "--server", "127.0.0.1:9")
    assert (4, "") == (away.code, away.out)
    alone = shardbook("gc", "disk:ckpt", "--dry-run", "--offline")
    assert (0, "no orphans") == (alone.code, alone.out.splitlines()[0])
    assert "no server was asked" in alone.out
    assert "nobody needs" in shardbook("gc", "disk:", "--dry-run", "--offline", "--older-than", "2d").out
    assert 3 == shardbook("gc", str(tmp_path / "nothing"), "--dry-run", "--offline").code
    assert api.OLD_S < 3 * DAY_S < api.OLD_OFFLINE_S
