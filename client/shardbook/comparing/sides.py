"""The two checkpoints of a comparison: in the catalogue, in a directory by Shardbook, or in one by plain DCP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Protocol

import numpy as np

from shardbook._attempts import TreeFiles
from shardbook._described import Source, Target, read_directory, told_as_ours
from shardbook._plain import footprint_of, world_size_of
from shardbook._targets import METADATA_S, checkpoint_named
from shardbook._trees import open_tree
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.client import Client
from shardbook.comparing.report import ComparedCheckpoint
from shardbook.config import ClientConfig
from shardbook.core.blocks import decode_blocks
from shardbook.core.compare import Geometry
from shardbook.core.digest import structure_digest
from shardbook.core.dtype import dtype_code
from shardbook.core.fold import FoldedAttempt
from shardbook.core.footprint import Footprint
from shardbook.core.head import decode_head
from shardbook.core.names import CheckpointName
from shardbook.errors import FailedPreconditionError
from shardbook.reading.chunks import TensorChunks
from shardbook.reading.plain_metadata import read_plain_metadata, read_stand_ins
from shardbook.stored_metadata import StoredMetadata
from shardbook.stores import normalized

#: A prefix that the fqn of no entry has: names are UTF-8, and this is none.
_NO_ENTRY: Final = b"\xff"


class Side(Protocol):
    """One of the two checkpoints; what it holds is read when it is asked for."""

    @property
    def facts(self) -> ComparedCheckpoint:
        """What is known of it without looking at its entries; its bytes as whoever described it has them."""
        ...

    def geometry(self) -> Geometry:
        """Returns what its entries are."""
        ...


def side_of(target: Target, config: ClientConfig, client: Client | None) -> Side:
    """Returns a checkpoint; raises as ``shardbook.comparing.diff`` does."""
    name = checkpoint_named(target)
    if name is not None:
        if client is None:
            client = Client(config.server, token=config.token, timeout_s=config.timeout_s)
        return CatalogueSide(client, _committed(client, name))
    path = os.fspath(target)  # type: ignore[arg-type]  # a CheckpointName names itself
    with told_as_ours(f"cannot read {path}"):
        directory = normalized(path)
        found = read_directory(TreeFiles(open_tree(path), directory))
    if isinstance(found, FoldedAttempt):
        return ManifestSide(directory, found)
    return PlainSide.read(directory, found)


def _committed(client: Client, name: CheckpointName) -> Checkpoint:
    found = client.get_checkpoint(name)
    if found.state is not CheckpointState.COMMITTED:
        raise FailedPreconditionError(f"{found.ref} is {found.state.value}, not COMMITTED", reason="NOT_COMMITTED")
    return found


@dataclass(frozen=True, eq=False)
class CatalogueSide:
    """A committed checkpoint of the catalogue."""

    client: Client
    checkpoint: Checkpoint

    @property
    def facts(self) -> ComparedCheckpoint:
        """What the catalogue says of it."""
        one = self.checkpoint
        return ComparedCheckpoint(
            one.ref, one.location, Source.CATALOGUE, one.world_size, one.size_bytes, one.structure_digest
        )

    @cached_property
    def _stored(self) -> StoredMetadata:
        return self.client.get_metadata(self.checkpoint.name, deadline_s=METADATA_S)

    def blocks(self) -> Sequence[bytes]:
        """Returns its entries as they are stored; one call."""
        return self._stored.blocks

    def geometry(self) -> Geometry:
        """Returns what its entries are."""
        return self.geometry_of(self.blocks())

    def geometry_of(self, blocks: Sequence[bytes]) -> Geometry:
        """Returns what some of its entries are."""
        return Geometry.of(decode_blocks(blocks, decode_head(self._stored.head).rank_files))

    def unique_bytes(self, blocks: Sequence[bytes] | None) -> int:
        """Returns the bytes of its chunks, each once; only extents are fetched for who has the blocks already."""
        if blocks is None:
            _, located = self._stored.columns()
        else:
            extents = self.client.get_metadata(self.checkpoint.name, _NO_ENTRY, deadline_s=METADATA_S)
            _, located = replace(extents, blocks=list(blocks)).columns()
        return int(located.length.sum())


@dataclass(frozen=True, eq=False)
class ManifestSide:
    """The newest whole attempt of a directory."""

    directory: str
    folded: FoldedAttempt

    @property
    def facts(self) -> ComparedCheckpoint:
        """What its manifest says of it."""
        who = self.folded.manifest.identity
        digest = structure_digest(self.folded.manifest.structure_digests).hex()
        size_bytes = self.folded.unique_bytes
        return ComparedCheckpoint(
            who.checkpoint_name.ref, self.directory, Source.MANIFEST, who.world_size, size_bytes, digest
        )

    def blocks(self) -> Sequence[bytes]:
        """Returns its entries as they are stored."""
        return self.folded.manifest.blocks

    def geometry(self) -> Geometry:
        """Returns what its entries are."""
        return Geometry.of(self.folded.structure)

    def geometry_of(self, blocks: Sequence[bytes]) -> Geometry:
        """Returns what some of its entries are."""
        return Geometry.of(decode_blocks(blocks, self.folded.structure.rank_files))


@dataclass(frozen=True, eq=False)
class PlainSide:
    """What DCP's own ``.metadata`` says of a directory."""

    directory: str
    entries: dict[str, TensorChunks | None]
    footprint: Footprint

    @classmethod
    def read(cls, directory: str, content: bytes) -> PlainSide:
        """Returns what a ``.metadata`` says; raises FailedPreconditionError."""
        return cls(directory, read_plain_metadata(content), read_stand_ins(content, footprint_of))

    @property
    def facts(self) -> ComparedCheckpoint:
        """What its files tell of it."""
        world_size, size_bytes = world_size_of(self.footprint), int(self.footprint.length.sum())
        return ComparedCheckpoint(None, self.directory, Source.DCP, world_size, size_bytes, "")

    def geometry(self) -> Geometry:
        """Returns what its entries are."""
        return geometry_of([one for one in self.entries.values() if one is not None])


def geometry_of(tensors: Sequence[TensorChunks]) -> Geometry:
    """Returns what entries are that came one by one."""
    ndims = np.array([len(one.shape) for one in tensors], dtype=np.int64)
    width = max(int(ndims.max(initial=0)), 1)
    # A bytes entry is one chunk of no dimensions.
    counts = np.array([len(one.length) if one.is_tensor else 1 for one in tensors], dtype=np.int64)
    shapes = np.ones((len(tensors), width), dtype=np.int64)
    offsets = np.zeros((int(counts.sum()), width), dtype=np.int64)
    sizes = np.ones_like(offsets)
    at = 0
    for row, (one, count) in enumerate(zip(tensors, counts.tolist(), strict=True)):
        ndim = len(one.shape)
        shapes[row, :ndim] = one.shape
        if one.is_tensor:
            offsets[at : at + count, :ndim], sizes[at : at + count, :ndim] = one.offsets, one.sizes
        at += count
    return Geometry(
        fqns=tuple(one.fqn for one in tensors),
        is_tensor=np.array([one.is_tensor for one in tensors], dtype=np.bool_),
        dtypes=np.array([dtype_code(one.dtype) if one.is_tensor else 0 for one in tensors], dtype=np.uint8),
        ndims=ndims,
        shapes=shapes,
        chunk_counts=counts,
        offsets=offsets,
        sizes=sizes,
    )


__all__ = ["CatalogueSide", "ManifestSide", "PlainSide", "Side", "geometry_of", "side_of"]
