"""``list_files`` and ``delete_files``: what goes with a checkpoint of the catalogue, and making it go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardbook._attempts import TreeFiles
from shardbook._described import told_as_ours
from shardbook._lost import is_within_reach
from shardbook._targets import METADATA_S
from shardbook._trees import Tree, open_tree
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core import directory as names
from shardbook.core import limits
from shardbook.core.footprint import Footprint
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.names import CheckpointName, prefix_of
from shardbook.deleting.note import DeletionNote, check_inside
from shardbook.deleting.removing import Doomed, Progress, remove, with_leftovers
from shardbook.errors import NotFoundError
from shardbook.stored_metadata import StoredMetadata
from shardbook.stores import Stores, encodable, normalized

#: In place of a name: something was saved over a checkpoint that plain DCP saved, and has its files.
SAVED_SINCE: Final = "what was saved there since"
#: How exact the times of files are, seconds.
_CLOCK_S: Final = 1.0


@dataclass(frozen=True)
class FileList:
    """The data files of a checkpoint.

    Attributes:
        ref: Short form of its name.
        directory: Path or URL on this machine.
        files: Files that go with it, relative to ``directory``.
        size_bytes: Bytes that its extents cover.
        other_directories: Where else the same files are; they go from there, too.
    """

    ref: str
    directory: str
    files: tuple[str, ...]
    size_bytes: int
    other_directories: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "files": list(self.files), "other_directories": list(self.other_directories)}


@dataclass(frozen=True)
class DeletedFiles:
    """What became of the data files of a checkpoint.

    Attributes:
        ref: Short form of its name.
        directory: Path or URL on this machine.
        file_count: Files that are gone, those that were gone already included.
        found_count: Files that were still there.
        size_bytes: Bytes that its extents covered.
        shared_with: Names of other checkpoints that have some of the files too: then all of them were left. Also
            ``SAVED_SINCE``.
        waits_for: Names of saves that are not over and may have some of the files, or come to need them: then all of
            them were left, too, and the deletion stays begun; the same again ends it once those saves are over.
    """

    ref: str
    directory: str
    file_count: int
    found_count: int
    size_bytes: int
    shared_with: tuple[str, ...]
    waits_for: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "shared_with": list(self.shared_with), "waits_for": list(self.waits_for)}


def list_files(name: CheckpointName | str, *, client: Client, config: ClientConfig) -> FileList:
    """Returns the data files of a checkpoint, committed or deleted, as the catalogue has them; touches nothing.

    Who shares them is known once it is deleted, see ``delete_files``.

    Raises:
        NotFoundError: There is no such checkpoint.
        InvalidArgumentError: Its store is not configured here (``UNKNOWN_STORE``).
    """
    stored = client.get_metadata(name, show_deleted=True, deadline_s=METADATA_S)
    directory, *others = map(config.stores.path_of, stored.locations)
    footprint = _footprint(stored)
    return FileList(stored.checkpoint.ref, directory, footprint.paths, footprint.size_bytes, tuple(others))


def check_reach(name: CheckpointName | str, *, client: Client, config: ClientConfig) -> Checkpoint:
    """Returns a checkpoint, committed or deleted, whose files can be deleted from here.

    Refuses what ``delete_files`` would refuse for where the files are, before anything is deleted.

    Raises:
        NotFoundError: There is no such checkpoint, or its directory is out of reach from here (``NO_DIRECTORY``).
        InvalidArgumentError: Its store is not configured here (``UNKNOWN_STORE``).
        StorageError, PermissionDeniedError: The storage failed or refused.
    """
    checkpoint = client.get_checkpoint(name, show_deleted=True)
    for directory in map(config.stores.path_of, checkpoint.locations):
        with told_as_ours(f"cannot look at {directory}"):
            _tree_of(directory)
    return checkpoint


def delete_files(
    name: CheckpointName | str, *, client: Client, config: ClientConfig, progress: Progress | None = None
) -> DeletedFiles:
    """Deletes the data files of a checkpoint that is deleted in the catalogue, and what says that they are there.

    The catalogue knows that the files are going before the first one does, and that they are gone after the last one.
    A deletion that was interrupted is made again from the beginning; what is gone already is no error. Where another
    checkpoint of the catalogue has some of the files too, all are left alone: they go with the last one. So they are
    while a save that is not over may have some of them; then the deletion stays begun.

    Args:
        name: Full name of the checkpoint.
        client: The server.
        config: Says where stores are on this machine.
        progress: Hears how many files are gone.

    Raises:
        NotFoundError: There is no such checkpoint, or its directory is out of reach from here (``NO_DIRECTORY``).
        FailedPreconditionError: It is not deleted (``NOT_DELETED``), or purged (``CHECKPOINT_PURGED``).
        InvalidArgumentError: Its store is not configured here (``UNKNOWN_STORE``).
        StorageError, PermissionDeniedError: The storage failed or refused; the same again goes on.
        ShardbookError: The service could not be asked.
    """
    checkpoint = client.get_checkpoint(name)
    directories = list(map(config.stores.path_of, checkpoint.locations))
    with told_as_ours(f"cannot delete the files in {' and '.join(directories)}"):
        trees = list(map(_tree_of, directories))
        others = _also_called(config.stores, checkpoint.locations, directories)
        # Durable before the first file goes, and from here on there is no way back.
        checkpoint, sharing = client.record_file_deletion(checkpoint.name, locations=others, done=False)
        footprint = _footprint(client.get_metadata(checkpoint.name, show_deleted=True, deadline_s=METADATA_S))
        shared_with, waits_for = _sharing(client, sharing, checkpoint.prefix, footprint)
        if any(
            tree is not None and _is_saved_again(tree, directory, checkpoint, footprint)
            for directory, tree in zip(directories, trees, strict=True)
        ):
            shared_with = (*shared_with, SAVED_SINCE)
        doomed_count = found_count = 0
        for directory, tree in zip(directories, trees, strict=True):
            if not (shared_with or waits_for) and tree is not None:
                doomed = with_leftovers(tree, directory, checkpoint.prefix, footprint.paths)
                doomed_count += len(doomed)
                found_count += remove(tree, Doomed(directory, _identity(tree, directory, checkpoint), doomed), progress)
        if not waits_for:
            client.record_file_deletion(checkpoint.name, done=True)
    size_bytes = footprint.size_bytes
    return DeletedFiles(checkpoint.ref, directories[0], doomed_count, found_count, size_bytes, shared_with, waits_for)


def _also_called(stores: Stores, locations: Sequence[str], directories: Sequence[str]) -> tuple[str, ...]:
    """Returns what else a catalogue may call the directories of a checkpoint."""
    found = {name for pair in zip(locations, directories, strict=True) for name in same_locations(stores, *pair)}
    return tuple(sorted(found - set(locations)))


def same_locations(stores: Stores, location: str, directory: str) -> tuple[str, ...]:
    """Returns what else a catalogue may call a directory of this machine, beside ``location``."""
    plain = normalized(directory)
    found = {plain, directory, stores.location_of(plain), f"{plain}/"}
    for name, root in stores.roots.items():
        found.add(Stores({name: root}).location_of(plain))
    if "://" not in plain:
        found.add(f"file://{plain}")
    return tuple(sorted(found - {location}))


def _tree_of(directory: str) -> Tree | None:
    """Returns the storage; None when the directory is gone from where it would be.

    Raises:
        NotFoundError: It may be there and out of reach, such as on a volume that is not mounted here.
    """
    try:
        return open_tree(directory)
    except NotFoundError:
        if not is_within_reach(directory):
            raise NotFoundError(
                f"{encodable(directory)} is out of reach from here: nothing of what it should lie beside is there",
                reason="NO_DIRECTORY",
                field="directory",
            ) from None
        return None


def _footprint(stored: StoredMetadata) -> Footprint:
    structure, located = stored.columns()
    prefix = stored.checkpoint.location.prefix
    footprint = Footprint.of_columns(structure, located, prefix, has_ranks=not stored.metadata_header)
    for path in footprint.paths:
        check_inside(path, prefix)
    return footprint


def _sharing(
    client: Client, others: Sequence[str], prefix: str, footprint: Footprint
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns those of the other checkpoints of a directory that have some of the files of one, and those that may yet.

    An attempt's directory is its own, and all that lies in it goes with it.
    """
    if len(others) >= limits.MAX_PAGE_SIZE:
        return tuple(others), ()  # and more, of which nobody has said anything
    own = set(footprint.paths)
    inside = f"{prefix}/" if prefix else None

    def is_own(path: str) -> bool:
        return path in own or (inside is not None and path.startswith(inside))

    sharing, writing = [], []
    for name in others:
        other = client.get_checkpoint(name)
        within = f"{other.prefix}/" if other.prefix else ""
        if other.state in (CheckpointState.COMMITTED, CheckpointState.DELETED):
            if inside is not None and within.startswith(inside):
                is_sharing = True
            else:
                stored = client.get_metadata(other.name, show_deleted=True, deadline_s=METADATA_S)
                is_sharing = any(map(is_own, _footprint(stored).paths))
            if is_sharing:
                sharing.append(other.name)
        elif other.state is not CheckpointState.FAILED:
            # Of what is not committed nobody knows the files, only where they are: without a prefix, anywhere.
            is_below = inside is not None and within.startswith(inside)
            if not within or is_below or any(path.startswith(within) for path in own):
                writing.append(other.name)
    return tuple(sharing), tuple(writing)


def _is_saved_again(tree: Tree, directory: str, checkpoint: Checkpoint, footprint: Footprint) -> bool:
    """Returns True when files were written after a checkpoint was: plain DCP saves over what lies in a directory.

    Its ``.metadata`` is written last, and its time is that of the checkpoint. No attempt by Shardbook is written over.
    """
    if checkpoint.prefix or checkpoint.create_time is None:
        return False
    saved_s = checkpoint.create_time.timestamp() + _CLOCK_S
    times = (tree.facts(f"{directory}/{name}") for name in (names.DCP_METADATA, *footprint.paths))
    return any(facts is not None and facts.mtime_s is not None and facts.mtime_s > saved_s for facts in times)


def _identity(tree: Tree, directory: str, checkpoint: Checkpoint) -> AttemptIdentity | None:
    """Returns who wrote the attempt, as its directory would say it; None for what plain DCP saved."""
    if not checkpoint.prefix:
        return None
    content = TreeFiles(tree, directory).read(names.deleted_path(checkpoint.prefix))
    if content is not None:
        return DeletionNote.of(content, checkpoint.prefix).identity
    incarnation = bytes.fromhex(checkpoint.incarnation)
    if prefix_of(incarnation, checkpoint.attempt) != checkpoint.prefix:
        return None  # recorded under another name than it was saved under
    name = CheckpointName.parse(checkpoint.name)
    return AttemptIdentity(
        run=name.part.run.ref,
        part=name.part.part,
        step=checkpoint.step,
        session=checkpoint.session,
        incarnation=incarnation,
        attempt=checkpoint.attempt,
        world_size=checkpoint.world_size,
        prefix=checkpoint.prefix,
    )


__all__ = ["DeletedFiles", "FileList", "check_reach", "delete_files", "list_files", "same_locations"]
