"""Removes the files of one checkpoint from storage, in the order in which no reader finds half of them whole.

1. The note that the attempt is being deleted: no reader of Shardbook counts it any more.
2. What else says that it is whole: another attempt's manifest and ``.metadata`` take the place of its own, or they go;
   then its own manifest and records. So plain DCP does not find it either.
3. The data files, side by side.
4. The second step again, for whoever had read the manifest before it went and wrote it back; and at last the note.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from shardbook._attempts import TreeFiles, list_attempts, read_exported, read_identity
from shardbook._plain import footprint_of
from shardbook._publishing import export_dcp_metadata, settle
from shardbook._side_by_side import side_by_side
from shardbook._trees import Tree
from shardbook.core import directory as names
from shardbook.core.footprint import rank_of_file
from shardbook.core.manifest import AttemptIdentity
from shardbook.deleting.note import DeletionNote
from shardbook.reading.plain_metadata import read_stand_ins

#: Files that one thread removes before it takes more.
_BATCH: Final = 64

#: Hears how many files of how many are gone, from several threads.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Doomed:
    """What is removed of a checkpoint.

    Attributes:
        directory: Path or URL of the checkpoint.
        identity: The attempt by Shardbook whose own directory the files lie in; None for what plain DCP saved.
        files: Data files to remove, relative to ``directory``.
    """

    directory: str
    identity: AttemptIdentity | None
    files: tuple[str, ...]


def with_leftovers(tree: Tree, directory: str, prefix: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the files of a checkpoint, with those of its ranks that hold nothing but what others hold too.

    Ranks that planned without the service write all of their replicas; of these one counts, and the rest may fill files
    that no extent lies in. The attempt's directory is its own, so by their names they are known.

    Args:
        tree: Reads the directory.
        directory: The checkpoint's.
        prefix: Its attempt's; without one nothing is known.
        paths: Files that its extents lie in.
    """
    if not prefix:
        return paths
    known = set(paths)
    listed = (f"{prefix}/{name}" for name in tree.names(f"{directory}/{prefix}"))
    return (*paths, *(path for path in listed if path not in known and rank_of_file(path) is not None))


def remove(tree: Tree, doomed: Doomed, progress: Progress | None = None) -> int:
    """Removes the files of a checkpoint; what is gone already is no error, so that it can be done again.

    Returns:
        How many data files were there.

    Raises:
        OSError: The storage failed; the same again goes on.
        CorruptManifestError: ``.metadata`` of plain DCP is damaged.
    """
    files = TreeFiles(tree, doomed.directory)
    if doomed.identity is not None:
        note = names.deleted_path(doomed.identity.prefix)
        if files.read(note, 1) is None:
            files.write(note, DeletionNote(doomed.identity, doomed.files).to_bytes())
        _take_claims(tree, files, doomed.identity.prefix)
    else:
        _take_plain_claim(tree, files, doomed.files)
    count = _remove_data(tree, doomed, progress)
    if doomed.identity is not None:
        _take_claims(tree, files, doomed.identity.prefix)
        _forget(tree, files, doomed.identity.prefix)
    tree.remove_directory(f"{doomed.directory}/{names.ROOT}")
    tree.remove_directory(doomed.directory)
    return count


def _take_claims(tree: Tree, files: TreeFiles, prefix: str) -> None:
    """Takes away what says that an attempt is whole, but for the note."""
    settle(files, lambda folded: export_dcp_metadata(files.directory, folded))
    listed = list_attempts(files)
    exported = read_exported(files, listed)
    top = read_identity(files, names.MANIFEST)
    if top is not None and top.prefix == prefix:
        _remove(tree, files, names.MANIFEST)
    if exported.prefix == prefix:
        _remove(tree, files, names.DCP_METADATA)
    own = listed.get(prefix, frozenset())
    claims = [name for name in own if name == names.MANIFEST_NAME or names.rank_of_record(name) is not None]
    side_by_side(lambda name: _remove(tree, files, f"{names.attempt_path(prefix)}/{name}"), sorted(claims))
    # A crash of the machine must not bring back what says that the files are there.
    for folder in (f"/{names.attempt_path(prefix)}", f"/{names.ROOT}", ""):
        tree.flush(f"{files.directory}{folder}")


def _take_plain_claim(tree: Tree, files: TreeFiles, doomed: Sequence[str]) -> None:
    """Takes away a ``.metadata`` by plain DCP that names one of the files."""
    content = files.read(names.DCP_METADATA)
    if content is None or read_exported(files, list_attempts(files)).prefix is not None:
        return
    if set(read_stand_ins(content, footprint_of).paths) & set(doomed):
        _remove(tree, files, names.DCP_METADATA)
        tree.flush(files.directory)


def _remove_data(tree: Tree, doomed: Doomed, progress: Progress | None) -> int:
    done = 0

    def remove_some(some: Sequence[str]) -> int:
        nonlocal done
        count = sum(tree.remove(f"{doomed.directory}/{name}") for name in some)
        done += len(some)
        if progress is not None:
            progress(min(done, len(doomed.files)), len(doomed.files), "files")
        return count

    batches = [doomed.files[at : at + _BATCH] for at in range(0, len(doomed.files), _BATCH)]
    count = sum(side_by_side(remove_some, batches))
    folders = {posixpath.dirname(name) for name in doomed.files} - {""}
    for folder in sorted(folders, key=len, reverse=True):
        tree.remove_directory(f"{doomed.directory}/{folder}")
    return count


def _forget(tree: Tree, files: TreeFiles, prefix: str) -> None:
    """Takes away what is left of an attempt, the note at last."""
    folder = names.attempt_path(prefix)
    left = [name for name in files.names(folder) if name != names.DELETED_NAME]
    for name in left:
        _remove(tree, files, f"{folder}/{name}")
    tree.flush(f"{files.directory}/{folder}")
    _remove(tree, files, names.deleted_path(prefix))
    tree.remove_directory(f"{files.directory}/{folder}")


def _remove(tree: Tree, files: TreeFiles, path: str) -> None:
    tree.remove(f"{files.directory}/{path}")


__all__ = ["Doomed", "Progress", "remove"]
