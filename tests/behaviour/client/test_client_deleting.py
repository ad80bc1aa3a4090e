"""Data files that are deleted: nothing that reads ever finds half of them whole, wherever it is interrupted."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardbook._attempts import TreeFiles
from shardbook._described import read_directory
from shardbook._publishing import export_dcp_metadata, settle
from shardbook._trees import Tree, open_tree
from shardbook.core import directory as names
from shardbook.core.fold import FoldedAttempt, fold
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.retention import RetentionPolicy
from shardbook.deleting import plan_directories
from shardbook.deleting.note import DeletionNote
from shardbook.deleting.removing import Doomed, remove
from shardbook.errors import CorruptManifestError, InvalidArgumentError, NotFoundError
from shardbook.verifying import verify
from tests.behaviour.client.data_files import FILES, records, write_checkpoint
from tests.behaviour.client.directories import CheckpointDirectory, identity

NOW_US = 1_700_000_100_000_000
LAST = RetentionPolicy(keep_last=1)
#: Sessions, and when they saved: the later one's clock was behind.
NUMBERED = ((1, 1_700_000_010.0), (2, 1_700_000_005.0))


def saved(path: Path, who: AttemptIdentity) -> Path:
    """A directory with data, manifest and `.metadata`."""
    write_checkpoint(path, who)
    files = TreeFiles(open_tree(path), str(path))
    assert () == settle(files, lambda one: export_dcp_metadata(str(path), one))
    assert (path / ".metadata").exists()
    return path


def doomed(path: Path | str, who: AttemptIdentity) -> Doomed:
    """All of an attempt's files."""
    return Doomed(str(path), who, tuple(f"{who.prefix}/{name}" for name in FILES))


def everything(path: Path) -> list[str]:
    """Files below a directory."""
    return sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file()) if path.exists() else []


class KilledError(BaseException):
    """The process ends here."""


class Fragile:
    """A tree whose process ends before one of the changes it makes."""

    def __init__(self, tree: Tree, fatal: int) -> None:
        self._tree = tree
        self._left = fatal
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tree, name)
        if name not in ("remove", "write", "remove_directory"):
            return method

        def change(*args: Any) -> Any:
            with self._lock:
                self._left -= 1
                if self._left < 0:
                    raise KilledError
            return method(*args)

        return change


def test_all_of_an_attempt_goes_and_its_directory(tmp_path: Path) -> None:
    """Data, manifests, `.metadata`, notes: nothing is left, and the same again finds nothing to do."""
    who = identity()
    path = saved(tmp_path / "step-1500", who)
    assert len(FILES) == remove(open_tree(tmp_path), doomed(path, who))
    assert not path.exists()
    path.mkdir()
    assert 0 == remove(open_tree(tmp_path), doomed(path, who))
    assert not path.exists()


def test_another_attempt_takes_the_place(tmp_path: Path) -> None:
    """Whichever of both goes, the directory means the other one, for plain DCP too; its files are not touched."""
    older, newer = identity(attempt=1), identity(attempt=2)
    for gone, left in ((newer, older), (older, newer)):
        path = tmp_path / f"without-{gone.attempt}"
        saved(path, older)
        before = everything(path)
        saved(path, newer)
        remove(open_tree(path), doomed(path, gone))
        found = read_directory(TreeFiles(open_tree(path), str(path)))
        assert isinstance(found, FoldedAttempt)
        assert left == found.manifest.identity
        assert verify(path).is_ok
        assert left.prefix in (path / ".metadata").read_bytes().decode("latin-1")
        kept = [name for name in everything(path) if "exported-" not in name]
        assert kept == [name.replace(older.prefix, left.prefix) for name in before if "exported-" not in name]


def claims(path: Path, who: AttemptIdentity) -> bool:
    """True when something says that the attempt is whole: to Shardbook, or to plain DCP."""
    if (path / ".metadata").exists():
        return True
    try:
        found = read_directory(TreeFiles(open_tree(path), str(path)))
    except NotFoundError:
        return False
    return isinstance(found, FoldedAttempt) and found.manifest.identity.prefix == who.prefix


@pytest.mark.parametrize("has_other", [False, True])
def test_killed_anywhere_nothing_claims_to_be_whole_that_is_not(tmp_path: Path, has_other: bool) -> None:
    """Killed before each change in turn: what a reader finds is whole, and the same again ends it."""
    who, other = identity(attempt=2), identity(attempt=1)
    for fatal in itertools.count():
        path = tmp_path / f"killed-{fatal}"
        if has_other:
            saved(path, other)
        saved(path, who)
        try:
            remove(Fragile(open_tree(path), fatal), doomed(path, who))
        except KilledError:
            is_over = False
        else:
            is_over = True
        data = [path / who.prefix / name for name in FILES]
        if not all(one.exists() for one in data) and claims(path, who):
            report = verify(path)
            assert has_other
            assert report.is_ok, fatal
            assert who.prefix not in (path / ".metadata").read_bytes().decode("latin-1")
        # A publisher that comes by in between repairs nothing that is being deleted.
        if path.exists():
            settle(TreeFiles(open_tree(path), str(path)), lambda one, at=path: export_dcp_metadata(str(at), one))  # type: ignore[misc]
        if path.exists():
            remove(open_tree(path), doomed(path, who))
        assert has_other is path.exists(), fatal
        assert not any(who.prefix in name for name in everything(path)), fatal
        assert not has_other or verify(path).is_ok
        if is_over:
            break
    assert fatal > len(FILES)


def test_a_manifest_that_comes_back_meanwhile_goes_again(tmp_path: Path) -> None:
    """A publisher may have read it before; it writes it back while data files go."""
    who = identity()
    path = saved(tmp_path / "step", who)
    top = (path / names.MANIFEST).read_bytes()

    def write_back(_done: int, _total: int, _unit: str) -> None:
        (path / names.MANIFEST).write_bytes(top)

    remove(open_tree(path), doomed(path, who), write_back)
    assert [] == everything(path)


def test_records_that_nobody_folded_go_too(tmp_path: Path) -> None:
    """A complete set of records says that it is whole."""
    who = identity(world_size=4)
    path = tmp_path / "step"
    write_checkpoint(path, who)
    for name in (names.MANIFEST, names.manifest_path(who.prefix)):
        (path / name).unlink()
    for one in records(who):
        CheckpointDirectory(path).add_record(one)
    assert fold(records(who)).manifest.identity == who
    remove(open_tree(path), doomed(path, who))
    assert [] == everything(path)


@pytest.fixture
def memory() -> Iterator[Any]:
    """An object store: no directories, no rename."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def test_on_an_object_store(tmp_path: Path, memory: Any) -> None:
    """The same order over fsspec; what other checkpoints have stays."""
    who, other = identity(attempt=2), identity(attempt=1)
    for attempt in (other, who):
        for name, content in write_checkpoint(tmp_path / attempt.prefix, attempt).items():
            memory.pipe_file(f"/bucket/step/{name}", content)
    tree = open_tree("memory://bucket/step")
    assert len(FILES) == remove(tree, doomed("memory://bucket/step", who))
    assert not [name for name in memory.find("/bucket") if who.prefix in name]
    assert verify("memory://bucket/step").is_ok
    remove(tree, doomed("memory://bucket/step", other))
    assert [] == memory.find("/bucket")


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/passwd", "{prefix}/../../x", "elsewhere/__0_0.distcp"])
def test_a_note_names_no_file_of_others(name: str) -> None:
    """It lies on storage that others write, so what it says is checked."""
    who = identity()
    with pytest.raises(CorruptManifestError):
        DeletionNote(who, (name.format(prefix=who.prefix),))
    with pytest.raises(CorruptManifestError, match="is of"):
        DeletionNote.of(DeletionNote(who, ()).to_bytes(), "0123456789ab-a1")


class TestDirectories:
    """Pruning without a catalogue."""

    def test_what_is_not_kept_goes_and_the_rest_is_whole(self, tmp_path: Path) -> None:
        """Newest by session and step first; a plan alone touches nothing."""
        paths = {step: saved(tmp_path / f"step-{step}", identity(step, session=1)) for step in (10, 20, 30)}
        branch = saved(tmp_path / "branch", identity(11, session=2, incarnation=b"b" * 16))
        before = everything(tmp_path)
        plan = plan_directories([tmp_path], RetentionPolicy(keep_last=2), now_us=NOW_US)
        assert before == everything(tmp_path)
        assert [("llm/8b@11.s2.a1", True), ("llm/8b@30.s1.a1", True), ("llm/8b@20.s1.a1", False)] == [
            (one.ref, one.keep) for one in plan.decisions[:3]
        ]
        done = plan.delete()
        assert [6, 6] == [one.found_count for one in done]
        assert sorted([branch, paths[30]]) == sorted(tmp_path.iterdir())
        assert all(verify(one).is_ok for one in tmp_path.iterdir())

    def test_a_directory_that_is_named_twice_is_one_checkpoint(self, tmp_path: Path) -> None:
        """Also by a link, and a copy: what is kept of one is not deleted as another, nor does it take its place."""
        for step in (1, 2, 3):
            saved(tmp_path / "run" / f"step-{step}", identity(step))
        (tmp_path / "link").symlink_to(tmp_path / "run")
        shutil.copytree(tmp_path / "run" / "step-3", tmp_path / "copy")
        places = [tmp_path / name for name in ("run", "run/step-3", "link/step-3", "copy")]
        planned = plan_directories(places, RetentionPolicy(keep_last=2), now_us=NOW_US)
        assert [1] == [one.file_count and 1 for one in planned.delete()]
        assert ["step-2", "step-3"] == sorted(one.name for one in (tmp_path / "run").iterdir())
        assert verify(tmp_path / "run" / "step-3").is_ok

    def test_what_a_job_would_resume_from_stays(self, tmp_path: Path) -> None:
        """Whatever the rules say, as in the catalogue."""
        for step in (10, 20, 25):
            saved(tmp_path / f"step-{step}", identity(step))
        planned = plan_directories([tmp_path], RetentionPolicy(keep_every=20), now_us=NOW_US)
        assert [(25, True), (20, True), (10, False)] == [
            (int(one.ref.partition("@")[2].partition(".")[0]), one.keep) for one in planned.decisions
        ]

    def test_offline_and_numbered_saves_of_a_step_both_count(self, tmp_path: Path) -> None:
        """Clocks that disagree make circles of them: in whatever order they are found, the same ones go."""
        numbered = [identity(10, session=one, incarnation=bytes([one]) * 16, write_time_s=s) for one, s in NUMBERED]
        offline = identity(10, incarnation=b"o" * 16, write_time_s=1_700_000_007.0)
        later = identity(20, session=2, incarnation=bytes([2]) * 16, attempt=2)
        paths = [saved(tmp_path / one.prefix, one) for one in (*numbered, offline)]
        saved(tmp_path / "later", later)
        kept = set()
        for order in itertools.permutations(paths):
            plan = plan_directories([*order, tmp_path / "later"], RetentionPolicy(keep_every=10), now_us=NOW_US)
            kept.add(tuple(sorted(one.ref for one in plan.decisions if one.keep)))
        assert {("llm/8b@10.s1.a1", "llm/8b@10.s2.a1", "llm/8b@20.s2.a2")} == kept
        # What was saved offline last is what its directory means, though the catalogue means the one with a session.
        last = identity(10, incarnation=b"p" * 16, write_time_s=1_700_000_050.0)
        saved(paths[0], last)
        plan = plan_directories([*paths, tmp_path / "later"], RetentionPolicy(keep_every=10), now_us=NOW_US)
        left = {one.ref.partition("@")[2] for one in plan.decisions if one.keep}
        assert {"10.s0.a1.707070707070", "10.s2.a1", "20.s2.a2"} == left

    def test_what_is_not_whole_stays(self, tmp_path: Path) -> None:
        """A save that may be going on, or may have to be synced."""
        saved(tmp_path / "step-2", identity(2))
        CheckpointDirectory(tmp_path / "step-1").add_records(identity(1), without=(3,))
        plan = plan_directories([tmp_path], LAST, now_us=NOW_US)
        assert {
            "llm/8b@1.s0.a1.010203040506": ("it is not committed",),
            "llm/8b@2.s0.a1.010203040506": ("@latest", "one of the last 1"),
        } == {one.ref: one.reasons for one in plan.decisions}
        assert [] == plan.delete()

    def test_an_interrupted_deletion_is_ended_by_the_next(self, tmp_path: Path) -> None:
        """Whatever was there to be judged since then: the directory remembers."""
        who = identity(1, session=1)
        path = saved(tmp_path / "step-1", who)
        saved(tmp_path / "step-2", identity(2, session=1))
        for fatal in (4, 8):
            with pytest.raises(KilledError):
                remove(Fragile(open_tree(path), fatal), doomed(path, who))
            plan = plan_directories([tmp_path], LAST, now_us=NOW_US)
            assert ["llm/8b@2.s1.a1"] == [one.ref for one in plan.decisions]
            assert ((str(path), "llm/8b@1.s1.a1"),) == plan.unfinished
        plan_directories([tmp_path], LAST, now_us=NOW_US).delete()
        assert not path.exists()
        assert () == plan_directories([tmp_path], LAST, now_us=NOW_US).unfinished

    def test_no_rule_is_no_policy(self, tmp_path: Path) -> None:
        """It would keep one."""
        with pytest.raises(InvalidArgumentError):
            plan_directories([tmp_path], RetentionPolicy(), now_us=NOW_US)


class _Sweeping(MemoryFileSystem):  # type: ignore[misc]
    """Takes along what is in a directory that it removes, as Arrow's filesystems do, and so HDFS."""

    protocol = "sweeping"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("sweeping:/")))

    def rmdir(self, path: str) -> None:
        self.rm(path, recursive=True)


def test_a_filesystem_that_removes_full_directories_is_not_asked_to(tmp_path: Path) -> None:
    """Another attempt lies in the same directory."""
    fsspec.register_implementation("sweeping", _Sweeping, clobber=True)
    store = fsspec.filesystem("sweeping")
    who, other = identity(attempt=2), identity(attempt=1)
    for attempt in (other, who):
        for name, content in write_checkpoint(tmp_path / attempt.prefix, attempt).items():
            store.pipe_file(f"/bucket/step/{name}", content)
    tree = open_tree("sweeping://bucket/step")
    assert len(FILES) == remove(tree, doomed("sweeping://bucket/step", who))
    tree.remove_empty("sweeping://bucket")
    assert verify("sweeping://bucket/step").is_ok
