"""Sends a whole attempt, as a manifest has it, by RecordCheckpoint: in parts, with the blobs that the server lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from shardbook._saving import BlobSource
from shardbook.client import Client
from shardbook.core.columns import unframe
from shardbook.core.description import origins_in, unpack_said
from shardbook.core.extents import decode_segment
from shardbook.core.limits import MAX_BLOB_BYTES, MAX_RECORD_REGISTRATIONS
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord, StoredBlob
from shardbook.core.names import RunName
from shardbook.core.structure import BlobKind, reference_of
from shardbook.errors import CorruptManifestError, InternalError, InvalidArgumentError
from shardbook.stores import check_location
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptKey, AttemptLocation, Blob, BlobRef, Description, LineageKind, Writer
from shardbook.v1.types_pb2 import BlobKind as BlobKindNumber
from shardbook.v1.types_pb2 import Checkpoint as CheckpointMessage
from shardbook.v1.types_pb2 import Origin as OriginMessage

#: Most bytes of a part: its registrations and every blob they need, so that one more call always completes it.
_PART_BYTES: Final = 12 << 20
#: The last call assembles the checkpoint when its structure is new, seconds.
_ASSEMBLY_S: Final = 600.0
#: Rounds of "send me these" for one part.
_MAX_ROUNDS: Final = 16

_Address = tuple[int, bytes]


def attempt_key(identity: AttemptIdentity) -> AttemptKey:
    """Returns the key of an attempt as calls carry it."""
    return AttemptKey(
        run=str(RunName.parse(identity.run)),
        part=identity.part,
        step=identity.step,
        session=identity.session,
        incarnation=identity.incarnation,
        attempt=identity.attempt,
        world_size=identity.world_size,
    )


@dataclass(frozen=True, eq=False)
class RecordedContent:
    """What an attempt holds, registration by registration.

    Attributes:
        structure_digests: By rank, 32 bytes each; of an import by slice.
        pairs: Payloads of extents and volatile properties, likewise.
        blobs: Every table, plan and structure, each once.
        metadata_header: See ``shardbook.core.head``; empty for saves by Shardbook.
        said: What is said of the checkpoint, see ``shardbook.core.description``; may be empty.
    """

    structure_digests: tuple[bytes, ...]
    pairs: tuple[tuple[bytes, bytes], ...]
    blobs: tuple[StoredBlob, ...]
    metadata_header: bytes = b""
    said: bytes = b""

    @classmethod
    def of(cls, manifest: Manifest) -> RecordedContent:
        """Returns the content of a manifest; raises CorruptManifestError when it contradicts itself."""
        try:
            pairs = tuple(pair for segment in manifest.segments for pair in decode_segment(segment))
        except InvalidArgumentError as error:
            raise CorruptManifestError(f"a manifest's extents are damaged: {error}") from error
        if len(pairs) != len(manifest.structure_digests) or not pairs:
            raise CorruptManifestError(
                f"a manifest has extents of {len(pairs)} ranks and structures of {len(manifest.structure_digests)}"
            )
        return cls(manifest.structure_digests, pairs, manifest.blobs, manifest.metadata_header, manifest.said)


def registration_of(record: RegistrationRecord, phase_ms: Sequence[int] = ()) -> pb.ShardRegistration:
    """Returns a rank's registration, as its record has it, as a call carries it."""
    return pb.ShardRegistration(
        rank=record.rank,
        structure_digest=record.structure_digest,
        extents=record.extents,
        volatile_properties=record.volatile,
        phase_ms=phase_ms,
    )


def message_of(blob: StoredBlob) -> Blob:
    """Returns a blob as a call carries it."""
    return Blob(kind=BlobKindNumber.Name(blob.kind), payload=blob.payload)


def blob_source(blobs: Sequence[StoredBlob]) -> BlobSource:
    """Returns what finds those of some blobs that the server asks for; InternalError when it asks for another."""
    held = {(int(blob.kind), blob.digest): blob for blob in blobs}

    def find(unknown: Sequence[BlobRef]) -> Iterable[Blob]:
        for ref in unknown:
            if (ref.kind, ref.digest) not in held:
                raise InternalError(f"the server asks for a blob that was not named: {ref.digest.hex()[:12]}")
        return [message_of(held[ref.kind, ref.digest]) for ref in unknown]

    return find


def description_of(said: bytes) -> Description:
    """Returns what a record or manifest says of its checkpoint, as a call carries it; damaged, it says nothing."""
    try:
        labels, metrics, note, writer = unpack_said(said)
        known = {name: value for name, value in writer.items() if name in Writer.DESCRIPTOR.fields_by_name}
        origins = [OriginMessage(kind=LineageKind.Name(one.kind), source=one.source) for one in origins_in(said)]
        return Description(labels=labels, metrics=metrics, note=note, writer=Writer(**known), origins=origins)
    except InvalidArgumentError:
        return Description()


def record_attempt(
    client: Client,
    manifest: Manifest,
    location: str,
    *,
    recovered: bool,
    phase_ms: Sequence[Sequence[int]] = (),
) -> CheckpointMessage:
    """Records an attempt and returns the committed checkpoint. Idempotent: what is known is not sent again.

    Args:
        client: The server.
        manifest: The attempt.
        location: Of its directory, see ``Stores.location_of``.
        recovered: True for what was saved while the service was away, the one way past the fence.
        phase_ms: What each rank took to plan, write and register, milliseconds; empty for who did not say.

    Raises:
        CorruptManifestError: The manifest contradicts itself.
        InvalidArgumentError: The location is no Unicode (``INVALID_LOCATION``).
        ShardbookError: What the server answered, or that it did not.
    """
    identity = manifest.identity
    place = AttemptLocation(location=location, prefix=identity.prefix)
    content = RecordedContent.of(manifest)
    return record_content(
        client,
        attempt_key(identity),
        place,
        content,
        recovered=recovered,
        write_time_s=identity.write_time_s,
        phase_ms=phase_ms,
    )


def record_content(
    client: Client,
    key: AttemptKey,
    place: AttemptLocation,
    content: RecordedContent,
    *,
    recovered: bool,
    write_time_s: float = 0.0,
    phase_ms: Sequence[Sequence[int]] = (),
) -> CheckpointMessage:
    """Records an attempt of which there is no manifest; arguments and errors as for ``record_attempt``.

    Args:
        client: The server.
        key: The attempt.
        place: Where its files are.
        content: What it holds.
        recovered: True for what was saved while the service was away, or without it.
        write_time_s: When it was written, seconds since the epoch; 0 when nobody knows.
        phase_ms: See ``record_attempt``.
    """
    check_location(place.location)
    attempt = _Attempt(content)
    for registration, took_ms in zip(attempt.registrations, phase_ms, strict=False):
        registration.phase_ms[:] = took_ms
    request = pb.RecordCheckpointRequest(
        key=key,
        location=place,
        registration_count=len(attempt.registrations),
        recovered=recovered,
        metadata_header=content.metadata_header,
    )
    if write_time_s > 0:
        request.write_time.FromNanoseconds(int(write_time_s * 1e9))
    parts = list(attempt.parts())
    answer = pb.RecordCheckpointResponse()
    for number, part in enumerate(parts, 1):
        del request.registrations[:]
        request.registrations.extend(part)
        request.complete = number == len(parts)
        if request.complete:
            request.description.CopyFrom(description_of(content.said))
        answer = _send(client, request, attempt)
    return answer.checkpoint


def _send(client: Client, request: pb.RecordCheckpointRequest, attempt: _Attempt) -> pb.RecordCheckpointResponse:
    """Makes one call, and again with the blobs that the server asks for until it has them."""
    deadline_s = _ASSEMBLY_S if request.complete else None
    del request.blobs[:]
    for _ in range(_MAX_ROUNDS):
        answer = client.record(request, deadline_s=deadline_s)
        if not answer.unknown:
            return answer
        del request.blobs[:]
        request.blobs.extend(attempt.blobs(answer.unknown))
    raise InternalError("the server asks for the same blobs again and again", reason="BLOBS_NOT_ACCEPTED")


class _Attempt:
    """Registrations and blobs as calls carry them."""

    def __init__(self, content: RecordedContent) -> None:
        self._blobs: dict[_Address, StoredBlob] = {(blob.kind, blob.digest): blob for blob in content.blobs}
        self._needs: dict[bytes, tuple[_Address, ...]] = {}
        self.registrations = [
            pb.ShardRegistration(rank=rank, structure_digest=digest, extents=extents, volatile_properties=volatile)
            for rank, (digest, (extents, volatile)) in enumerate(
                zip(content.structure_digests, content.pairs, strict=True)
            )
        ]

    def parts(self) -> Iterator[list[pb.ShardRegistration]]:
        """Yields the registrations in parts that one call can carry together with all they need."""
        part: list[pb.ShardRegistration] = []
        needed: set[_Address] = set()
        size_bytes = 0
        for registration in self.registrations:
            new = set(self._needed_by(registration.structure_digest)) - needed
            added = registration.ByteSize() + sum(len(self._blobs[address].payload) for address in new)
            if part and (len(part) >= MAX_RECORD_REGISTRATIONS or size_bytes + added > _PART_BYTES):
                yield part
                part, needed, size_bytes = [], set(), 0
                new = set(self._needed_by(registration.structure_digest))
                added = registration.ByteSize() + sum(len(self._blobs[address].payload) for address in new)
            part.append(registration)
            needed |= new
            size_bytes += added
        yield part

    def blobs(self, unknown: Sequence[BlobRef]) -> list[Blob]:
        """Returns the blobs asked for, tables first; as many as fit one call.

        Raises:
            CorruptManifestError: The manifest lacks one.
        """
        chosen: list[Blob] = []
        size_bytes = 0
        for kind, digest in sorted({(int(ref.kind), ref.digest) for ref in unknown}):
            blob = self._blob((kind, digest))
            size_bytes += len(blob.payload)
            if chosen and size_bytes > max(MAX_BLOB_BYTES, _PART_BYTES):
                break
            chosen.append(message_of(blob))
        return chosen

    def _needed_by(self, structure: bytes) -> tuple[_Address, ...]:
        """Addresses of a structure, its plan and its table."""
        if structure not in self._needs:
            chain: list[_Address] = []
            reference: tuple[BlobKind, bytes] | None = (BlobKind.STRUCTURE, structure)
            while reference is not None:
                chain.append(reference)
                try:
                    reference = reference_of(reference[0], unframe(self._blob(reference).payload))
                except InvalidArgumentError as error:
                    raise CorruptManifestError(f"a blob of a manifest is damaged: {error}") from error
            self._needs[structure] = tuple(chain)
        return self._needs[structure]

    def _blob(self, address: _Address) -> StoredBlob:
        blob = self._blobs.get(address)
        if blob is None:
            kind = BlobKind(address[0]).name.lower()
            raise CorruptManifestError(f"a manifest lacks its {kind} {address[1].hex()[:12]}")
        return blob
