"""A complete set of registration records as one manifest, and a manifest as columns. No I/O, no service.

The same assembly and the same checks as in the service: what a directory proves is what a commit would prove.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from shardbook.core import limits
from shardbook.core.assembly import assemble
from shardbook.core.blocks import decode_blocks, encode_blocks
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.extents import (
    StructureInfo,
    check_extents,
    decode_extents,
    decode_segment,
    decode_volatile,
    encode_segment,
    structure_info,
)
from shardbook.core.head import MetadataHeader, decode_head, decode_metadata_header, default_header, encode_head
from shardbook.core.locate import Located, locate
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord, StoredBlob
from shardbook.core.pickled_metadata import pickled_metadata
from shardbook.core.structure import BlobKind, RankPlan, RankStructure, decode_plan, decode_structure
from shardbook.core.table import TensorTable, decode_table
from shardbook.errors import CorruptManifestError, InvalidArgumentError

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class FoldedAttempt:
    """A whole attempt.

    Attributes:
        manifest: What is stored of it.
        structure: Its entries and chunks.
        located: Where they lie.
        written_bytes: What the ranks wrote, duplicates included; None when only the manifest is at hand.
    """

    manifest: Manifest
    structure: CheckpointStructure
    located: Located
    written_bytes: int | None = None

    @property
    def unique_bytes(self) -> int:
        """Bytes that the checkpoint's extents cover, each chunk once."""
        return int(self.located.length.sum())

    def header(self, location: str) -> MetadataHeader:
        """Returns what belongs to the whole: as it was imported, else that of a save into ``location``."""
        stored = self.manifest.metadata_header
        return decode_metadata_header(stored) if stored else default_header(location, self.manifest.identity.prefix)

    def dcp_metadata(self, header: MetadataHeader) -> Iterator[bytes]:
        """Returns the content of DCP's own ``.metadata`` in blocks; raises as ``pickled_metadata`` does."""
        return pickled_metadata(self.structure, self.located, self.manifest.identity.prefix, header)


def missing_ranks(records: Iterable[RegistrationRecord]) -> list[int]:
    """Returns the ranks that no record speaks for; nothing is missing of no records at all."""
    ranks: set[int] = set()
    world_size = 0
    for record in records:
        ranks.add(record.rank)
        world_size = record.identity.world_size
    return [rank for rank in range(world_size) if rank not in ranks]


def fold(records: Sequence[RegistrationRecord]) -> FoldedAttempt:
    """Assembles and validates a complete set of records of one attempt.

    Raises:
        CorruptManifestError: A record is damaged, or the records are not one attempt's complete set.
        InvalidGeometryError: The ranks' chunks do not make whole tensors.
    """
    by_rank = sorted(records, key=lambda record: record.rank)
    identity = _common_identity(by_rank)
    structures = _Structures(blob for record in by_rank for blob in record.blobs)
    digests = [record.structure_digest for record in by_rank]
    distinct = {digest: number for number, digest in enumerate(dict.fromkeys(digests))}
    rank_index = np.fromiter((distinct[digest] for digest in digests), np.int64, len(digests))
    decoded = [structures.structure(digest) for digest in distinct]
    infos = [structure_info(structure) for structure in decoded]
    written_bytes = sum(
        _check_registration(record, infos[number]) for record, number in zip(by_rank, rank_index.tolist(), strict=True)
    )
    registrations = [(record.extents, record.volatile) for record in by_rank]
    said = next((record.said for record in by_rank if record.said), b"")
    folded = fold_decoded(identity, decoded, digests, registrations, structures.used(distinct), said=said)
    return replace(folded, written_bytes=written_bytes)


def fold_decoded(
    identity: AttemptIdentity,
    structures: Sequence[RankStructure],
    digests: Sequence[bytes],
    registrations: Sequence[tuple[bytes, bytes]],
    blobs: tuple[StoredBlob, ...],
    metadata_header: bytes = b"",
    said: bytes = b"",
) -> FoldedAttempt:
    """Assembles and validates an attempt of which one process knows everything.

    Args:
        identity: The attempt.
        structures: The distinct ones, in the order in which ``digests`` first names them.
        digests: Of every registration's structure, 32 bytes each.
        registrations: Payloads of extents and volatile properties, likewise.
        blobs: Every table, plan and structure, each once.
        metadata_header: See ``shardbook.core.head``; empty for saves by Shardbook.
        said: What is said of the checkpoint, see ``shardbook.core.description``.

    Raises:
        InvalidGeometryError: The chunks do not make whole tensors.
    """
    number = {digest: at for at, digest in enumerate(dict.fromkeys(digests))}
    checkpoint = assemble(structures, np.fromiter((number[digest] for digest in digests), np.int64, len(digests)))
    manifest = Manifest(
        identity=identity,
        head=encode_head(checkpoint),
        blocks=tuple(block.payload for block in encode_blocks(checkpoint)),
        fqns=checkpoint.fqns,
        segments=tuple(
            encode_segment(registrations[first : first + limits.SEGMENT_RANKS])
            for first in range(0, len(registrations), limits.SEGMENT_RANKS)
        ),
        structure_digests=tuple(digests),
        blobs=blobs,
        metadata_header=metadata_header,
        said=said,
    )
    return FoldedAttempt(manifest, checkpoint, locate(checkpoint, registrations))


def unfold(manifest: Manifest) -> FoldedAttempt:
    """Returns the columns of a manifest.

    Raises:
        CorruptManifestError: It is damaged.
    """
    try:
        head = decode_head(manifest.head)
        body = decode_blocks(manifest.blocks, head.rank_files)
        checkpoint = replace(body, key_paths=head.key_paths, warnings=head.warnings)
        registrations = [pair for segment in manifest.segments for pair in decode_segment(segment)]
        return FoldedAttempt(manifest, checkpoint, locate(checkpoint, registrations))
    except InvalidArgumentError as exc:
        raise CorruptManifestError(f"a manifest is damaged: {exc}") from exc


def _common_identity(by_rank: Sequence[RegistrationRecord]) -> AttemptIdentity:
    """The identity of the attempt; a rank that was cut off from the service knew session 0 only."""
    if not by_rank:
        raise CorruptManifestError("there are no registration records")
    identity = max((record.identity for record in by_rank), key=lambda one: one.session)
    for record in by_rank:
        other = record.identity
        same = replace(other, session=identity.session, write_time_s=identity.write_time_s) == identity
        if not same or other.session not in (0, identity.session):
            raise CorruptManifestError(f"the record of rank {record.rank} belongs to another attempt")
    if [record.rank for record in by_rank] != list(range(identity.world_size)):
        missing = missing_ranks(by_rank)[: limits.MAX_NAMED_RANKS]
        raise CorruptManifestError(f"records of an attempt of {identity.world_size} ranks are not whole: {missing}")
    return identity


def _proved(decoded: _T, found: bytes, digest: bytes) -> _T:
    if found != digest:
        raise CorruptManifestError(f"a blob is not what its address {digest.hex()[:12]} says")
    return decoded


def _check_registration(record: RegistrationRecord, info: StructureInfo) -> int:
    """Returns the bytes that a rank wrote."""
    try:
        decode_volatile(record.volatile, info.entry_count)
        return check_extents(decode_extents(record.extents).facts, info)
    except InvalidArgumentError as exc:
        raise CorruptManifestError(f"the record of rank {record.rank} is damaged: {exc}") from exc


class _Structures:
    """Decodes each blob of a set of records once, and proves that it is what its address says."""

    def __init__(self, blobs: Iterable[StoredBlob]) -> None:
        self._blobs: dict[tuple[BlobKind, bytes], StoredBlob] = {}
        for blob in blobs:
            self._blobs.setdefault((blob.kind, blob.digest), blob)
        self._tables: dict[bytes, TensorTable] = {}
        self._plans: dict[bytes, RankPlan] = {}

    def structure(self, digest: bytes) -> RankStructure:
        """Returns the structure with this address."""
        try:
            structure, found = decode_structure(self._payload(BlobKind.STRUCTURE, digest), self._plan)
        except InvalidArgumentError as exc:
            raise CorruptManifestError(f"a structure is damaged: {exc}") from exc
        return _proved(structure, found, digest)

    def _plan(self, digest: bytes) -> RankPlan:
        if digest not in self._plans:
            plan, found = decode_plan(self._payload(BlobKind.PLAN, digest), self._table)
            self._plans[digest] = _proved(plan, found, digest)
        return self._plans[digest]

    def _table(self, digest: bytes) -> TensorTable:
        if digest not in self._tables:
            table, found = decode_table(self._payload(BlobKind.TABLE, digest))
            self._tables[digest] = _proved(table, found, digest)
        return self._tables[digest]

    def _payload(self, kind: BlobKind, digest: bytes) -> bytes:
        blob = self._blobs.get((kind, digest))
        if blob is None:
            raise CorruptManifestError(f"no record holds the {kind.name.lower()} {digest.hex()[:12]}")
        return blob.payload

    def used(self, structures: Iterable[bytes]) -> tuple[StoredBlob, ...]:
        """Returns the blobs that were decoded: tables, then plans, then ``structures``."""
        keys = [(BlobKind.TABLE, digest) for digest in self._tables]
        keys += [(BlobKind.PLAN, digest) for digest in self._plans]
        keys += [(BlobKind.STRUCTURE, digest) for digest in structures]
        return tuple(self._blobs[key] for key in keys)
