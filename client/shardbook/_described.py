"""What a checkpoint of the catalogue, or a directory, says of its data files; and where those are. No torch.

Torch is needed by who trusts a ``.metadata`` and has it unpickled, and by nobody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

from shardbook._attempts import TreeFiles
from shardbook._newest import incomplete_attempts, read_attempt
from shardbook._plain import footprint_of, world_size_of
from shardbook._targets import METADATA_S, checkpoint_named
from shardbook._trees import Tree, open_tree
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.directory import DCP_METADATA
from shardbook.core.fold import FoldedAttempt
from shardbook.core.footprint import Footprint
from shardbook.core.names import CheckpointName
from shardbook.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ShardbookError,
    StorageError,
)
from shardbook.reading.plain_metadata import read_stand_ins
from shardbook.stored_metadata import StoredMetadata
from shardbook.stores import encodable, normalized

#: A checkpoint as people pass it.
Target = str | os.PathLike[str] | CheckpointName


class Source(StrEnum):
    """What was asked where a checkpoint's bytes should be."""

    #: The service.
    CATALOGUE = "catalogue"
    #: Shardbook's manifest or records in the directory.
    MANIFEST = "manifest"
    #: DCP's own ``.metadata``.
    DCP = "dcp"


@dataclass(frozen=True, eq=False)
class Described:
    """What a checkpoint should have on storage.

    Attributes:
        ref: Short form of its name; None when it is a directory by plain DCP.
        directory: Path or URL, without credentials.
        source: What said it.
        world_size: Ranks that saved it; of a plain DCP directory what its files' names tell.
        footprint: Its extents by file.
        tree: The storage; None when there is no such directory.
        others: Where else the same files are, in the order in which readers try them.
        unknown: Locations that mean nothing on this machine.
        name: Full name in the catalogue; None when a directory was asked.
    """

    ref: str | None
    directory: str
    source: Source
    world_size: int
    footprint: Footprint
    tree: Tree | None
    others: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    name: str | None = None

    def elsewhere(self) -> Iterator[Described]:
        """Yields the same checkpoint at its other places."""
        for directory in self.others:
            yield replace(self, directory=directory, tree=_tree_at(directory), others=())


def describe(target: Target, *, trusted: bool, config: ClientConfig | None, client: Client | None) -> Described:
    """Asks the service for a ref, the directory for a path or URL; raises as ``shardbook.verify`` does."""
    name = checkpoint_named(target)
    if name is not None:
        return _of_ref(name, ClientConfig.from_env() if config is None else config, client)
    path = os.fspath(target)  # type: ignore[arg-type]  # a CheckpointName names itself
    with told_as_ours(f"cannot read {path}"):
        return _of_directory(path, trusted=trusted)


def _of_ref(name: CheckpointName, config: ClientConfig, client: Client | None) -> Described:
    if client is None:
        client = Client(config.server, token=config.token, timeout_s=METADATA_S)
    stored = client.get_metadata(name)
    directory, *others = config.stores.paths_of(stored.locations)
    found = described_at(stored, directory)
    unknown = tuple(one for one in stored.locations if config.stores.here(one) is None)
    return replace(found, others=tuple(others), unknown=unknown)


def described_at(stored: StoredMetadata, directory: str) -> Described:
    """Returns what a checkpoint of the catalogue should have in a directory.

    Raises:
        FailedPreconditionError: It does not say where its bytes are (``NO_STORAGE_DATA``).
    """
    place = stored.checkpoint.location
    structure, located = stored.columns()
    if not stored.header(directory).has_storage_data:
        raise no_storage_data(stored.checkpoint.ref)
    # Metadata that came as a whole, rather than from ranks, came with a header.
    has_ranks = not stored.metadata_header
    footprint = Footprint.of_columns(structure, located, place.prefix, has_ranks=has_ranks)
    known, tree = stored.checkpoint, _tree_at(directory)
    return Described(known.ref, directory, Source.CATALOGUE, known.world_size, footprint, tree, name=known.name)


def _tree_at(directory: str) -> Tree | None:
    try:
        return open_tree(directory)
    except NotFoundError:
        return None


def _of_directory(path: str, *, trusted: bool) -> Described:
    tree = open_tree(path)
    directory = normalized(path)
    found = read_directory(TreeFiles(tree, directory))
    if isinstance(found, FoldedAttempt):
        identity = found.manifest.identity
        ref = identity.checkpoint_name.ref
        footprint = Footprint.of_columns(found.structure, found.located, identity.prefix)
        return Described(ref, directory, Source.MANIFEST, identity.world_size, footprint, tree)
    footprint = _plain_footprint(directory, found, trusted=trusted)
    return Described(None, directory, Source.DCP, world_size_of(footprint), footprint, tree)


def _plain_footprint(directory: str, content: bytes, *, trusted: bool) -> Footprint:
    """What a ``.metadata`` says; torch reads it only for who trusts it."""
    if trusted:
        with needs_torch(directory):
            from shardbook.dcp.importing import read_metadata
        return footprint_of(read_metadata(directory, content, trusted=True))
    try:
        return read_stand_ins(content, footprint_of)
    except FailedPreconditionError as error:
        if error.reason != "UNSAFE_METADATA":
            raise
        raise FailedPreconditionError(
            f"{error.message}. If you trust whoever wrote it as you trust your own programs, pass --trusted",
            reason=error.reason,
        ) from error


def read_directory(files: TreeFiles) -> FoldedAttempt | bytes:
    """Returns what a checkpoint directory means: Shardbook's newest whole attempt, else the content of ``.metadata``.

    Raises:
        NotFoundError: Neither is there, or an attempt that is not whole.
        CorruptManifestError: What Shardbook left is damaged.
        OSError: The storage failed.
    """
    folded = read_attempt(files)
    if folded is not None:
        return folded
    content = files.read(DCP_METADATA)
    if content is None:
        raise _nothing_in(files)
    return content


def _nothing_in(files: TreeFiles) -> NotFoundError:
    begun = incomplete_attempts(files)
    if begun:
        told = ", ".join(f"{prefix} ({count} ranks)" for prefix, count in begun.items())
        return NotFoundError(
            f"no whole checkpoint in {encodable(files.directory)}: attempts without all of their ranks: {told}",
            reason="INCOMPLETE",
            field="directory",
        )
    return NotFoundError(
        f"no checkpoint in {encodable(files.directory)}: neither .shardbook nor .metadata is there",
        reason="NO_CHECKPOINT",
        field="directory",
    )


@contextmanager
def needs_torch(directory: str) -> Iterator[None]:
    """Says what is missing where an import of ``shardbook.dcp`` finds no torch."""
    try:
        yield
    except ImportError as error:
        raise InvalidArgumentError(
            f"{encodable(directory)} was written by plain DCP, and this takes torch to read its .metadata "
            f"({error}): pip install 'shardbook[torch]'",
            reason="MISSING_PACKAGE",
            field="directory",
        ) from error


def no_storage_data(what: str) -> FailedPreconditionError:
    """Returns the error for metadata that names no file for what it describes."""
    return FailedPreconditionError(f"{what} does not say where its bytes are", reason="NO_STORAGE_DATA")


@contextmanager
def told_as_ours(what: str) -> Iterator[None]:
    """Raises what the storage says as PermissionDeniedError or StorageError."""
    try:
        yield
    except ShardbookError:
        raise
    except PermissionError as error:
        raise PermissionDeniedError(encodable(f"{what}: {error}"), reason="STORAGE_DENIED") from error
    except OSError as error:
        raise StorageError(encodable(f"{what}: {error}")) from error


__all__ = [
    "Described",
    "Source",
    "Target",
    "describe",
    "described_at",
    "needs_torch",
    "no_storage_data",
    "read_directory",
    "told_as_ours",
]
