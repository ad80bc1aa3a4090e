"""Registrations on their way into staging: checked before the transaction, judged and inserted within it.

Shared by RegisterShards and RecordCheckpoint, which stage the same thing one by one and many at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardbook.core.extents import (
    ExtentsFacts,
    StructureInfo,
    check_extents,
    decode_extents,
    decode_segment,
    decode_volatile,
    registration_digest,
    volatile_entry_count,
)
from shardbook.core.structure import BlobKind
from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook_server.service.timing import pack_phases
from shardbook_server.service.types import BlobRef, ShardRegistration
from shardbook_server.service.verdicts import about, other_content
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import structures as structure_rows
from shardbook_server.storage.blobs import BlobRow
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection
from shardbook_server.storage.registrations import RegistrationRow


@dataclass(frozen=True)
class CheckedShard:
    """A registration whose payloads parse.

    Attributes:
        registration: As sent.
        extents: What its extents say, without the columns: a batch holds many.
        entry_count: Entries that the volatile properties are about; None when there are none.
    """

    registration: ShardRegistration
    extents: ExtentsFacts
    entry_count: int | None

    @property
    def wanted(self) -> BlobRef:
        """The structure that has to be stored."""
        return BlobRef(BlobKind.STRUCTURE, self.registration.structure_digest)


class ShardChecker:
    """Parses registrations; payloads that many ranks share are parsed once. For one batch."""

    def __init__(self) -> None:
        self._extents: dict[bytes, ExtentsFacts] = {}
        self._counts: dict[bytes, int | None] = {b"": None}

    def check(self, registration: ShardRegistration) -> CheckedShard:
        """Returns the registration with what its extents say.

        Raises:
            InvalidArgumentError: A payload is damaged; the field is ``extents`` or ``volatile_properties``.
        """
        extents = self._extents.get(registration.extents)
        if extents is None:
            try:
                extents = decode_extents(registration.extents).facts
            except InvalidArgumentError as error:
                raise about(error, "extents") from error
            self._extents[registration.extents] = extents
        return CheckedShard(registration, extents, self._entry_count(registration.volatile_properties))

    def _entry_count(self, volatile: bytes) -> int | None:
        if volatile not in self._counts:
            try:
                count = volatile_entry_count(volatile)
                decode_volatile(volatile, count or 0)
            except InvalidArgumentError as error:
                raise about(error, "volatile_properties") from error
            self._counts[volatile] = count
        return self._counts[volatile]


def staged_row(checkpoint_id: int, shard: CheckedShard, blob: BlobRow) -> RegistrationRow:
    """Returns the row of a registration that fits its structure.

    Raises:
        InvalidArgumentError: It does not; the field is ``extents`` or ``volatile_properties``.
    """
    info = StructureInfo(blob.entry_count, blob.item_count, blob.variable_count, blob.fixed_bytes)
    size_bytes = check_extents(shard.extents, info)
    if shard.entry_count not in (None, info.entry_count):
        raise InvalidArgumentError(
            f"properties of {shard.entry_count} entries for a table of {info.entry_count}",
            reason="EXTENTS_MISMATCH",
            field="volatile_properties",
        )
    return RegistrationRow(
        checkpoint_id=checkpoint_id,
        rank=shard.registration.rank,
        structure_id=blob.id,
        explicit=int(shard.extents.explicit),
        size_bytes=size_bytes,
        extents=shard.registration.extents,
        volatile=shard.registration.volatile_properties,
        phases=pack_phases(shard.registration.phase_ms),
    )


def insert_rows(connection: Connection, rows: Sequence[RegistrationRow]) -> list[ShardbookError | None]:
    """Adds registrations to staging; returns a verdict a row, in order. The same content again is fine.

    Of several rows for one rank the first counts, and the others are compared with it.
    """
    first: dict[tuple[int, int], RegistrationRow] = {}
    for row in rows:
        first.setdefault((row.checkpoint_id, row.rank), row)
    added = registration_rows.insert_registrations(connection, list(first.values()))
    held = first | registration_rows.find_registrations(connection, [key for key in first if key not in added])
    return [
        None
        if same_content(held[row.checkpoint_id, row.rank], row)
        else other_content("registered", row.rank, "registration")
        for row in rows
    ]


def same_content(one: RegistrationRow, other: RegistrationRow) -> bool:
    """Returns True when two registrations say the same, however their payloads are compressed."""
    if (one.structure_id, one.extents, one.volatile) == (other.structure_id, other.extents, other.volatile):
        return True
    if one.structure_id != other.structure_id:
        return False
    return registration_digest(b"", one.extents, one.volatile) == registration_digest(
        b"", other.extents, other.volatile
    )


class CommittedRegistrations:
    """What ranks registered before a commit, to compare with when one says it again. For one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._structure_ids: dict[int, Sequence[int]] = {}
        self._segments: dict[int, Mapping[int, tuple[bytes, bytes]]] = {}

    def verdict(self, checkpoint: CheckpointRow, row: RegistrationRow) -> ShardbookError | None:
        """Returns None when ``row`` is what the rank registered before the commit, else the error."""
        if checkpoint.structure_id is None:
            return other_content("registered", row.rank, "registration")
        if checkpoint.id not in self._segments:
            self._read(checkpoint.id, checkpoint.structure_id)
        structure_ids, pairs = self._structure_ids[checkpoint.id], self._segments[checkpoint.id]
        if row.rank in pairs:
            extents, volatile = pairs[row.rank]
            held = RegistrationRow(checkpoint.id, row.rank, int(structure_ids[row.rank]), 0, 0, extents, volatile)
            if same_content(held, row):
                return None
        return other_content("registered", row.rank, "registration")

    def _read(self, checkpoint_id: int, structure_id: int) -> None:
        ids = structure_rows.read_rank_structure_ids(self._connection, structure_id)
        self._structure_ids[checkpoint_id] = ids.tolist()
        pairs: dict[int, tuple[bytes, bytes]] = {}
        for first_rank, payload in registration_rows.read_segments(self._connection, checkpoint_id, limit=len(ids)):
            pairs |= {first_rank + at: pair for at, pair in enumerate(decode_segment(payload))}
        self._segments[checkpoint_id] = pairs
