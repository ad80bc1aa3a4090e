"""Pruning without a catalogue: directories are judged by their manifests, and remember what is being deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from shardbook._attempts import FoundAttempt, TreeFiles, find_attempts, list_attempts, newest_identity
from shardbook._described import told_as_ours
from shardbook._trees import Tree, open_tree
from shardbook.core import directory as names
from shardbook.core.description import unpack_said
from shardbook.core.footprint import Footprint
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.names import LATEST
from shardbook.core.retention import OPEN, Candidate, RetentionPolicy, judge, newest_first
from shardbook.deleting.api import DeletedFiles
from shardbook.deleting.note import DeletionNote
from shardbook.deleting.removing import Doomed, Progress, remove, with_leftovers
from shardbook.descriptions import PruneDecision
from shardbook.errors import CorruptManifestError, InvalidArgumentError, InvalidGeometryError


@dataclass(frozen=True, eq=False)
class _Whole:
    """A whole attempt in a directory."""

    files: TreeFiles
    identity: AttemptIdentity
    footprint: Footprint
    metrics: dict[str, float]


@dataclass(frozen=True, eq=False)
class PrunedDirectories:
    """What becomes of the checkpoints of some directories.

    Attributes:
        decisions: About each, part by part, newest session and step first.
        unfinished: Directories with an attempt whose deletion was begun and not ended, and its short name.
    """

    decisions: tuple[PruneDecision, ...]
    unfinished: tuple[tuple[str, str], ...]
    _doomed: tuple[tuple[Tree, str, Doomed, int], ...]

    def delete(self, progress: Progress | None = None) -> list[DeletedFiles]:
        """Deletes what is not kept, data files and all, after what was begun before.

        Raises:
            StorageError, PermissionDeniedError: The storage failed or refused; the same again goes on.
        """
        done = []
        for tree, ref, doomed, size_bytes in self._doomed:
            with told_as_ours(f"cannot delete the files in {doomed.directory}"):
                count = remove(tree, doomed, progress)
            done.append(DeletedFiles(ref, doomed.directory, len(doomed.files), count, size_bytes, ()))
        return done


def plan_directories(
    directories: Iterable[str | os.PathLike[str]], policy: RetentionPolicy, *, now_us: int
) -> PrunedDirectories:
    """Judges all checkpoints by Shardbook in and below some directories, each part by itself; deletes nothing.

    Nobody here knows of aliases and holds: those are in the catalogue. What is not whole is kept, and so is everything
    by plain DCP, and what a job would resume from.

    Args:
        directories: Paths or URLs.
        policy: What to keep.
        now_us: The time, microseconds since the epoch.

    Raises:
        NotFoundError: A directory is not there.
        InvalidArgumentError: The policy has no rule.
        StorageError, PermissionDeniedError: The storage failed or refused.
    """
    if not policy:
        raise InvalidArgumentError("the policy has no rule: say what to keep", field="policy")
    whole: list[_Whole] = []
    decisions: list[PruneDecision] = []
    unfinished: list[tuple[Tree, str, Doomed, int]] = []
    for directory in directories:
        with told_as_ours(f"cannot read {os.fspath(directory)}"):
            tree = open_tree(directory)
            for one in tree.checkpoints():
                files = TreeFiles(tree, one)
                listed = list_attempts(files)
                unfinished += _unfinished(files, listed)
                for found in find_attempts(files, listed):
                    _sort(found, files, whole, decisions)
    doomed: list[tuple[Tree, str, Doomed, int]] = []
    for _, of_part in sorted(_by_part(whole).items()):
        for made in judge(policy, _with_latest(_candidates([some[0] for some in of_part])), now_us):
            for chosen in of_part[made.candidate.key]:
                ref, size_bytes = chosen.identity.checkpoint_name.ref, chosen.footprint.size_bytes
                saved = datetime.fromtimestamp(chosen.identity.write_time_s, UTC)
                decisions.append(PruneDecision("", ref, made.keep, made.reasons, size_bytes, saved))
                if not made.keep:
                    tree, directory = chosen.files.tree, chosen.files.directory
                    # All in the attempt's own directory: no other save that is going on, or may, has a file there.
                    going = with_leftovers(tree, directory, chosen.identity.prefix, chosen.footprint.paths)
                    goes = Doomed(directory, chosen.identity, going)
                    doomed.append((tree, ref, goes, size_bytes))
    begun = tuple((one.directory, ref) for _, ref, one, _ in unfinished)
    return PrunedDirectories(tuple(decisions), begun, (*unfinished, *doomed))


def _by_part(whole: Iterable[_Whole]) -> dict[tuple[str, str], list[list[_Whole]]]:
    """Returns the checkpoints of each (run, part), each with its copies.

    A copy of a directory, or one that is named twice, by another path perhaps, is the same checkpoint: what is kept of
    it is not deleted as another.
    """
    parts: dict[tuple[str, str], dict[Any, list[_Whole]]] = {}
    for one in whole:
        part = parts.setdefault((one.identity.run, one.identity.part), {})
        part.setdefault(one.identity.key, []).append(one)
    return {name: list(part.values()) for name, part in parts.items()}


def _sort(found: FoundAttempt, files: TreeFiles, whole: list[_Whole], decisions: list[PruneDecision]) -> None:
    """Puts an attempt among those that can be judged, or says why it is kept."""
    why = OPEN
    try:
        folded = None if found.identity is None or found.missing_ranks else found.whole()
    except (CorruptManifestError, InvalidGeometryError) as error:
        folded, why = None, f"it is damaged: {error}"
    if folded is None:
        ref = found.prefix if found.identity is None else found.identity.checkpoint_name.ref
        decisions.append(PruneDecision("", ref, True, (why,), 0, None))
        return
    identity = folded.manifest.identity
    _, metrics, _, _ = unpack_said(folded.manifest.said)
    footprint = Footprint.of_columns(folded.structure, folded.located, identity.prefix)
    whole.append(_Whole(files, identity, footprint, metrics))


def _candidates(whole: list[_Whole]) -> list[Candidate]:
    live = _live(one.identity for one in whole)
    return [
        Candidate(
            key=at,
            session=one.identity.session,
            incarnation=one.identity.incarnation,
            step=one.identity.step,
            attempt=one.identity.attempt,
            time_us=round(one.identity.write_time_s * 1e6),
            is_live=one.identity.key in live,
            metrics=one.metrics,
        )
        for at, one in enumerate(whole)
    ]


def _live(identities: Iterable[AttemptIdentity]) -> set[Any]:
    """Returns the keys of what a step means.

    That is two things where an offline attempt comes in: by its session's number, as in the catalogue, and by the clock
    to whoever loads a directory. Neither takes the other's place.
    """
    steps: dict[int, list[AttemptIdentity]] = {}
    for one in identities:
        steps.setdefault(one.step, []).append(one)
    kinds = [kind for some in steps.values() for kind in (some, [one for one in some if one.session])]
    return {newest.key for kind in kinds if (newest := newest_identity(kind)) is not None}


def _with_latest(candidates: list[Candidate]) -> list[Candidate]:
    """Says which one a job resumes from, as the catalogue's ``latest`` does: no rule lets that go.

    The newest by session and step; and what was saved last, which may be of an incarnation without a session.
    """
    live = newest_first(one for one in candidates if one.is_live)
    latest = {live[0].key, max(live, key=lambda one: one.time_us).key} if live else set()
    return [replace(one, aliases=(LATEST,)) if one.key in latest else one for one in candidates]


def _unfinished(files: TreeFiles, listed: Mapping[str, frozenset[str]]) -> list[tuple[Tree, str, Doomed, int]]:
    """Returns the deletions in a directory that were begun and not ended."""
    begun = []
    for prefix, there in listed.items():
        content = files.read(names.deleted_path(prefix)) if names.DELETED_NAME in there else None
        if content is not None:
            note = DeletionNote.of(content, prefix)
            doomed = Doomed(files.directory, note.identity, note.files)
            begun.append((files.tree, note.identity.checkpoint_name.ref, doomed, 0))
    return begun


__all__ = ["PrunedDirectories", "plan_directories"]
