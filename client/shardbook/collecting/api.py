"""``find_orphans`` and ``remove_orphan``: what killed saves left, and taking it away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from shardbook._attempts import FoundAttempt, TreeFiles, find_manifests, find_record_sets, read_identity
from shardbook._described import told_as_ours
from shardbook._side_by_side import side_by_side
from shardbook._trees import Tree, open_tree
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.collecting.known import Known, state_if_needed
from shardbook.collecting.report import LeftAttempt, Verdict, time_of
from shardbook.core import directory as names
from shardbook.core.exported import FileFacts
from shardbook.errors import FailedPreconditionError
from shardbook.stores import normalized

#: How long nothing may have been written, seconds: with a catalogue to ask, and without.
OLD_S: Final = 24 * 3600.0
OLD_OFFLINE_S: Final = 7 * 24 * 3600.0
#: Files that one thread removes before it takes more.
_REMOVED_AT_ONCE: Final = 64
_KEPT: Final = {
    CheckpointState.OPEN: Verdict.OPEN,
    CheckpointState.COMMITTED: Verdict.COMMITTED,
    CheckpointState.EXPIRED: Verdict.REVIVABLE,
    CheckpointState.DELETED: Verdict.DELETED,
}

#: Hears how many of how many are done, and of what.
Progress = Callable[[int, int, str], None]


def find_orphans(
    directories: Iterable[str | os.PathLike[str]],
    *,
    known: Known | None,
    older_than_s: float | None = None,
    now_s: float | None = None,
) -> Iterator[LeftAttempt]:
    """Looks at what attempts left in all checkpoint directories at and below some; changes nothing.

    An attempt is an orphan when it has no manifest, not a record of every rank, is not named by ``.metadata``, nothing
    of it was written lately, and the catalogue neither has it open or committed nor may revive it.

    Args:
        directories: Paths, or URLs where fsspec is installed.
        known: The catalogue; None to go by manifests, records and age alone.
        older_than_s: How long nothing of it may have been written, seconds; a day, a week without a catalogue.
        now_s: The time, seconds since the epoch; that of this machine's clock when None.

    Yields:
        Every attempt, orphan or not, directory by directory.

    Raises:
        NotFoundError: A directory is not there.
        StorageError, PermissionDeniedError: The storage could not be asked.
        ShardbookError: The service could not be asked.
    """
    least_s = (OLD_OFFLINE_S if known is None else OLD_S) if older_than_s is None else older_than_s
    for directory in directories:
        with told_as_ours(f"cannot look at {normalized(directory)}"):
            tree = open_tree(directory)
            for checkpoint in tree.checkpoints(begun=True):
                yield from _Directory(tree, checkpoint, known, least_s, now_s).attempts()


def remove_orphan(
    orphan: LeftAttempt, *, known: Known | None, older_than_s: float | None = None, now_s: float | None = None
) -> LeftAttempt:
    """Looks again, and removes the files of an attempt that still is an orphan; returns what was found.

    An expired attempt is failed for good first: its ranks cannot come back and complete what is gone. Records go
    before data: what is left of an interrupted removal can never become a whole set. Calling it again goes on.
    Only the attempt's own two directories are touched, and in them the files that were looked at.

    Raises:
        FailedPreconditionError: It is no orphan any more (reason ``NOT_AN_ORPHAN``); nothing was removed.
        StorageError, PermissionDeniedError: The storage failed; some files may be gone.
        ShardbookError: The service could not be asked.
    """
    least_s = (OLD_OFFLINE_S if known is None else OLD_S) if older_than_s is None else older_than_s
    with told_as_ours(f"cannot remove {orphan.prefix} in {orphan.directory}"):
        tree = open_tree(orphan.directory)
        look = _Directory(tree, normalized(orphan.directory), known, least_s, now_s)
        now = next((one for one in look.attempts() if one.prefix == orphan.prefix), None)
        if now is None:
            return replace(orphan, file_count=0, size_bytes=0)
        if not now.is_orphan:
            raise FailedPreconditionError(
                f"{orphan.prefix} in {orphan.directory} is no orphan any more: {now.verdict.value}",
                reason="NOT_AN_ORPHAN",
            )
        look.close(orphan.prefix)
        for folder in _folders(orphan.prefix):
            _remove(tree, f"{look.path}/{folder}", look.files_of(folder))
    return now


def _folders(prefix: str) -> tuple[str, str]:
    """The two directories of an attempt: records first."""
    return names.attempt_path(prefix), prefix


def _remove(tree: Tree, folder: str, files: Iterable[str]) -> None:
    paths = [f"{folder}/{file}" for file in sorted(files)]

    def remove(some: list[str]) -> None:
        for path in some:
            tree.remove(path)

    side_by_side(remove, [paths[at : at + _REMOVED_AT_ONCE] for at in range(0, len(paths), _REMOVED_AT_ONCE)])
    tree.remove_empty(folder)


class _Directory:
    """One checkpoint directory, looked at once."""

    def __init__(self, tree: Tree, path: str, known: Known | None, least_s: float, now_s: float | None) -> None:
        self.path = path
        self._tree = tree
        self._files = TreeFiles(tree, path)
        self._known = known
        self._least_s = least_s
        self._now_s = now_s
        self._held: dict[str, dict[str, FileFacts]] = {}
        self._expired: dict[str, list[Checkpoint]] = {}

    def files_of(self, folder: str) -> dict[str, FileFacts]:
        """The files of one of an attempt's directories as they were when it was judged."""
        return self._held[folder]

    def close(self, prefix: str) -> None:
        """Fails what may have expired of an orphan for good; raises FailedPreconditionError when it cannot be."""
        for one in self._expired.get(prefix, ()):
            if self._known is not None and not self._known.close(one):
                raise FailedPreconditionError(f"{one.ref} was taken up again meanwhile", reason="NOT_AN_ORPHAN")

    def attempts(self) -> Iterator[LeftAttempt]:
        """Every attempt that left files."""
        prefixes = set(filter(names.is_prefix, self._files.names("")))
        prefixes |= set(filter(names.is_prefix, self._files.names(names.ROOT)))
        listed = {}
        for prefix in sorted(prefixes):
            records = self._look(names.attempt_path(prefix))
            listed[prefix] = frozenset(name for name in records if "/" not in name)
        manifests = {one.prefix: one for one in find_manifests(self._files, listed)}
        sets = {one.prefix: one for one in find_record_sets(self._files, listed)}
        rest = set(listed) - set(manifests)
        exported = self._files.read(names.DCP_METADATA) if rest else None
        # One that cannot be read may be anybody's.
        is_damaged = bool(rest) and self._is_damaged(names.MANIFEST)
        for prefix, there in listed.items():
            has_manifest = prefix in manifests or names.MANIFEST_NAME in there or is_damaged
            # A checkpoint's data is nobody's business here, and may be a hundred thousand files.
            data = {} if has_manifest else self._look(prefix)
            if there or data or has_manifest:
                found = manifests.get(prefix) or sets.get(prefix)
                is_named = exported is not None and f"{prefix}/".encode() in exported
                yield self._judge(prefix, found, has_manifest=has_manifest, is_named=is_named)

    def _look(self, folder: str) -> dict[str, FileFacts]:
        self._held[folder] = self._tree.files(f"{self.path}/{folder}")
        return self._held[folder]

    def _is_damaged(self, path: str) -> bool:
        return self._files.read(path, 1) is not None and read_identity(self._files, path) is None

    def _judge(self, prefix: str, found: FoundAttempt | None, *, has_manifest: bool, is_named: bool) -> LeftAttempt:
        facts = [one for folder in _folders(prefix) for one in self._held.get(folder, {}).values()]
        times = [one.mtime_s for one in facts if one.mtime_s is not None]
        youngest_s = max(times) if len(times) == len(facts) else None
        identity = None if found is None else found.identity
        verdict = _of_files(found, has_manifest=has_manifest, is_named=is_named)
        state = ""
        if verdict is Verdict.ORPHAN:
            verdict = self._of_age(youngest_s)
        if verdict is Verdict.ORPHAN and self._known is not None:
            verdict, state = self._of_catalogue(prefix, found)
        return LeftAttempt(
            directory=self.path,
            prefix=prefix,
            verdict=verdict,
            ref=None if identity is None else identity.checkpoint_name.ref,
            state=state,
            record_count=0 if found is None else len(found.ranks),
            world_size=None if identity is None else identity.world_size,
            file_count=len(facts),
            size_bytes=sum(one.size_bytes for one in facts),
            last_write_time=time_of(youngest_s),
        )

    def _of_age(self, youngest_s: float | None) -> Verdict:
        if youngest_s is None:
            return Verdict.UNDATED
        now_s = time.time() if self._now_s is None else self._now_s
        return Verdict.YOUNG if now_s - youngest_s < self._least_s else Verdict.ORPHAN

    def _of_catalogue(self, prefix: str, found: FoundAttempt | None) -> tuple[Verdict, str]:
        assert self._known is not None  # noqa: S101 - asked for by who has one
        attempts = self._known.find(self.path, prefix, None if found is None else found.identity)
        for one in attempts:
            needed = state_if_needed(one, self._known)
            if needed is not None:
                return _KEPT.get(needed, Verdict.OPEN), needed.value
        known = [one.checkpoint for one in attempts]
        self._expired[prefix] = [one for one in known if one.state is CheckpointState.EXPIRED]
        return Verdict.ORPHAN, known[0].state.value if known else ""


def _of_files(found: FoundAttempt | None, *, has_manifest: bool, is_named: bool) -> Verdict:
    """What the files alone say: ORPHAN for a save that never finished."""
    if has_manifest:
        return Verdict.MANIFEST
    if is_named:
        return Verdict.REFERENCED
    if found is None:
        return Verdict.ORPHAN
    if found.identity is None:
        return Verdict.UNREADABLE
    return Verdict.ORPHAN if found.missing_ranks else Verdict.WHOLE


__all__ = ["OLD_OFFLINE_S", "OLD_S", "Progress", "find_orphans", "remove_orphan"]
