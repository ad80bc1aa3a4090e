"""`shardbook gc`: what killed saves left is found and removed, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from shardbook._trees import Tree, open_tree
from shardbook.client import Client
from shardbook.collecting import LeftAttempt, Verdict, api, find_orphans, remove_orphan
from shardbook.core import directory as files
from shardbook.errors import FailedPreconditionError, StorageError
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.cli.left import DAY_S, KILLED, OLD_S, aged, everything, killed, put, verdicts
from tests.behaviour.client.directories import CheckpointDirectory, identity

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
    monkeypatch.setattr("shardbook._fsspec_tree._TIMES", ())
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
