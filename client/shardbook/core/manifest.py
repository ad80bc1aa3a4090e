"""The files that make a checkpoint directory enough: one registration record a rank, folded into one manifest.

A record holds all that a rank would have told the service; complete sets of records, or the manifest that they were
folded into, are what ``shardbook sync`` records and what ``load`` reads without any service. Where the files lie is
for ``shardbook.dcp`` to say; these are their contents.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from shardbook.core import limits
from shardbook.core.columns import ByteReader, ByteWriter, Int64Array
from shardbook.core.container import pack_list, read_container, unpack_list, write_container
from shardbook.core.digest import DIGEST_BYTES
from shardbook.core.names import (
    DEFAULT_PART,
    CheckpointId,
    CheckpointName,
    PartName,
    RunName,
    check_incarnation,
    prefix_of,
)
from shardbook.core.structure import BlobKind
from shardbook.errors import CorruptManifestError, InvalidArgumentError

_T = TypeVar("_T")
_RECORD, MANIFEST_KIND = "registration record", "manifest"
#: Section with lengths and checksums of blocks and segments, for readers of ranges. Earlier releases wrote none, and
#: pass over it.
RANGES = "ranges"
#: Section that is there when something is said of the checkpoint; likewise.
_SAID = "said"


@dataclass(frozen=True)
class AttemptIdentity:
    """Which attempt a file belongs to. The location is where the file lies, so that directories can be moved.

    Attributes:
        run: ``project/run``.
        part: Part of the run.
        step: Training step.
        session: Session number; 0 when the attempt was made offline.
        incarnation: 16 bytes.
        attempt: Attempt within the session.
        world_size: Ranks that take part.
        prefix: Directory of the attempt's data files, relative to the checkpoint's: what ``prefix_of`` says and
            nothing else, since paths are made of it.
        write_time_s: When the first of its ranks began, seconds since the epoch by that rank's clock.
    """

    run: str
    part: str = DEFAULT_PART
    step: int = 0
    session: int = 0
    incarnation: bytes = b""
    attempt: int = 1
    world_size: int = 1
    prefix: str = ""
    write_time_s: float = 0.0

    def __post_init__(self) -> None:
        _ = PartName(RunName.parse(self.run), self.part)
        check_incarnation(self.incarnation)
        for name, low, high in (
            ("step", 0, limits.INT64_MAX),
            ("session", 0, limits.INT64_MAX),
            ("attempt", 1, 2**31 - 1),
            ("world_size", 1, limits.MAX_WORLD_SIZE),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidArgumentError(f"{name} is {value}, not within {low} and {high}", field=name)
        if not math.isfinite(self.write_time_s):
            raise InvalidArgumentError(f"write_time_s is {self.write_time_s}", field="write_time_s")
        if self.prefix != prefix_of(self.incarnation, self.attempt):
            raise InvalidArgumentError(f"prefix {self.prefix!a} is not this attempt's", field="prefix")

    @property
    def key(self) -> tuple[str, str, int, int, bytes, int]:
        """What distinguishes the attempt from every other."""
        return self.run, self.part, self.step, self.session, self.incarnation, self.attempt

    def to_json(self) -> bytes:
        """Returns the identity as JSON."""
        return json.dumps({**asdict(self), "incarnation": self.incarnation.hex()}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> AttemptIdentity:
        """Returns the identity in ``content``; raises CorruptManifestError when there is none."""
        try:
            fields = json.loads(content)
            return cls(
                run=str(fields["run"]),
                part=str(fields["part"]),
                step=int(fields["step"]),
                session=int(fields["session"]),
                incarnation=bytes.fromhex(fields["incarnation"]),
                attempt=int(fields["attempt"]),
                world_size=int(fields["world_size"]),
                prefix=str(fields["prefix"]),
                write_time_s=float(fields["write_time_s"]),
            )
        except InvalidArgumentError as exc:
            raise CorruptManifestError(f"the identity of an attempt is damaged: {exc}") from exc
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
            raise CorruptManifestError("the identity of an attempt is damaged") from exc

    @property
    def checkpoint_name(self) -> CheckpointName:
        """What the attempt is called for ever."""
        full = CheckpointId.full(self.step, self.session, self.attempt, self.incarnation)
        return CheckpointName(PartName(RunName.parse(self.run), self.part), full)


@dataclass(frozen=True)
class StoredBlob:
    """A content-addressed payload with its address. The address is checked where the payload is decoded."""

    kind: BlobKind
    digest: bytes
    payload: bytes


@dataclass(frozen=True)
class RegistrationRecord:
    """All that one rank would tell the service.

    Attributes:
        identity: The attempt.
        rank: Rank in the save's process group.
        host: Host of the rank, for people.
        structure_digest: 32 bytes.
        extents: Payload, see ``shardbook.core.extents``.
        volatile: Payload, see ``shardbook.core.extents``.
        blobs: The rank's table, plan and structure.
        host: Host of the rank.
        said: What the coordinator says of the checkpoint, see ``shardbook.core.description``; empty on other ranks.
    """

    identity: AttemptIdentity
    rank: int
    structure_digest: bytes
    extents: bytes
    volatile: bytes
    blobs: tuple[StoredBlob, ...]
    host: str = ""
    said: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.identity.world_size:
            raise InvalidArgumentError(f"rank {self.rank} of {self.identity.world_size}", field="rank")

    def to_bytes(self) -> bytes:
        """Returns the content of the record's file."""
        return write_container(
            _RECORD,
            {
                "identity": self.identity.to_json(),
                "rank": json.dumps({"rank": self.rank, "host": self.host}).encode(),
                "registration": pack_list([self.structure_digest, self.extents, self.volatile]),
                "blobs": _pack_blobs(self.blobs),
            }
            | _said(self.said),
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> RegistrationRecord:
        """Returns the record in ``content``; raises CorruptManifestError when it is damaged."""
        sections = read_container(content, _RECORD)
        return _guarded(lambda: cls._of(sections), _RECORD)

    @classmethod
    def _of(cls, sections: dict[str, bytes]) -> RegistrationRecord:
        who = json.loads(sections["rank"])
        structure_digest, extents, volatile = unpack_list(sections["registration"])
        return cls(
            identity=AttemptIdentity.from_json(sections["identity"]),
            rank=int(who["rank"]),
            host=str(who["host"]),
            structure_digest=structure_digest,
            extents=extents,
            volatile=volatile,
            blobs=_unpack_blobs(sections["blobs"]),
            said=sections.get(_SAID, b""),
        )


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint in one file: what the service knows of it.

    Attributes:
        identity: The attempt.
        head: Payload, see ``shardbook.core.head``.
        blocks: One payload an entry in state-dict order, see ``shardbook.core.blocks``.
        fqns: Names of the entries, so that a reader fetches only the blocks it needs.
        segments: Extents of 256 ranks each, see ``shardbook.core.extents``.
        structure_digests: By rank, 32 bytes each.
        blobs: Every table, plan and structure of the ranks, each once; what ``sync`` sends.
        metadata_header: See ``shardbook.core.head``; empty for saves by Shardbook.
        said: What is said of the checkpoint, see ``shardbook.core.description``; may be empty.
    """

    identity: AttemptIdentity
    head: bytes
    blocks: tuple[bytes, ...]
    fqns: tuple[str, ...]
    segments: tuple[bytes, ...]
    structure_digests: tuple[bytes, ...]
    blobs: tuple[StoredBlob, ...]
    metadata_header: bytes = field(default=b"")
    said: bytes = b""

    def to_bytes(self) -> bytes:
        """Returns the content of the manifest's file."""
        return write_container(
            MANIFEST_KIND,
            {
                "identity": self.identity.to_json(),
                "head": self.head,
                "metadata_header": self.metadata_header,
                "fqns": _pack_names(self.fqns),
                RANGES: _pack_ranges(self.blocks, self.segments),
                "segments": pack_list(self.segments),
                "blocks": pack_list(self.blocks),
                "structures": _pack_digests(self.structure_digests),
                "blobs": _pack_blobs(self.blobs),
            }
            | _said(self.said),
        )

    def read_blocks(self, rows: Sequence[int]) -> list[bytes]:
        """Returns the payloads of some entries."""
        return [self.blocks[row] for row in rows]

    def read_segments(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the extents of some groups of 256 ranks; raises CorruptManifestError where there are none."""
        if numbers and max(numbers) >= len(self.segments):
            raise CorruptManifestError("a manifest lacks the extents of a rank")
        return [self.segments[number] for number in numbers]

    def whole(self) -> Manifest:
        """Returns it."""
        return self

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Returns the manifest in ``content``; raises CorruptManifestError when it is damaged."""
        sections = read_container(content, MANIFEST_KIND)
        return _guarded(lambda: cls._of(sections), MANIFEST_KIND)

    @classmethod
    def _of(cls, sections: dict[str, bytes]) -> Manifest:
        return cls(
            identity=AttemptIdentity.from_json(sections["identity"]),
            head=sections["head"],
            blocks=tuple(unpack_list(sections["blocks"])),
            fqns=unpack_names(sections["fqns"]),
            segments=tuple(unpack_list(sections["segments"])),
            structure_digests=_unpack_digests(sections["structures"]),
            blobs=_unpack_blobs(sections["blobs"]),
            metadata_header=sections["metadata_header"],
            said=sections.get(_SAID, b""),
        )


class StoredManifest(Protocol):
    """A manifest of which parts are read when they are needed: in memory, or in a file. Picklable."""

    @property
    def identity(self) -> AttemptIdentity:
        """The attempt."""
        ...

    @property
    def head(self) -> bytes:
        """Payload of ``shardbook.core.head``."""
        ...

    @property
    def metadata_header(self) -> bytes:
        """Likewise; empty for saves by Shardbook."""
        ...

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the entries, in state-dict order."""
        ...

    def read_blocks(self, rows: Sequence[int]) -> list[bytes]:
        """Returns the payloads of some entries."""
        ...

    def read_segments(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the extents of some groups of 256 ranks."""
        ...

    def whole(self) -> Manifest:
        """Returns all of it."""
        ...


def _said(content: bytes) -> dict[str, bytes]:
    return {_SAID: content} if content else {}


def _guarded(read: Callable[[], _T], kind: str) -> _T:
    try:
        return read()
    except (ValueError, KeyError, TypeError, InvalidArgumentError) as exc:
        raise CorruptManifestError(f"a {kind} is damaged: {exc}") from exc


def _pack_names(names: tuple[str, ...]) -> bytes:
    writer = ByteWriter()
    writer.varint(len(names))
    writer.names(names)
    return writer.finish()


def unpack_names(content: bytes) -> tuple[str, ...]:
    """Returns the names of entries in a section; raises InvalidArgumentError when it is damaged."""
    reader = ByteReader(content)
    names = reader.names(reader.varint(limits.MAX_CELLS, "the number of names"))
    reader.end()
    return names


def _pack_ranges(*lists: Sequence[bytes]) -> bytes:
    """Lengths and checksums of blocks, then of segments."""
    writer = ByteWriter()
    for items in lists:
        writer.varint(len(items))
        writer.column(np.fromiter(map(len, items), np.int64, len(items)), delta=False)
        writer.column(np.fromiter(map(zlib.crc32, items), np.int64, len(items)), delta=False)
    return writer.finish()


def unpack_ranges(content: bytes) -> dict[str, tuple[Int64Array, Int64Array]]:
    """Returns lengths, bytes, and checksums, crc32, of ``blocks`` and ``segments``.

    Raises:
        CorruptManifestError: The section is damaged.
    """
    reader = ByteReader(content)
    ranges = {}
    try:
        for name in ("blocks", "segments"):
            count = reader.varint(limits.MAX_CELLS, "the number of items")
            ranges[name] = reader.column(count, delta=False), reader.column(count, delta=False)
        reader.end()
    except InvalidArgumentError as exc:
        raise CorruptManifestError("the ranges of a manifest are damaged") from exc
    if any(int(lengths.min(initial=0)) < 0 for lengths, _ in ranges.values()):
        raise CorruptManifestError("the ranges of a manifest are damaged")
    return ranges


def _pack_digests(digests: tuple[bytes, ...]) -> bytes:
    """Distinct digests once, then which one each rank has."""
    distinct = {digest: number for number, digest in enumerate(dict.fromkeys(digests))}
    writer = ByteWriter()
    writer.varint(len(distinct))
    writer.raw(b"".join(distinct))
    writer.varint(len(digests))
    writer.column(np.fromiter((distinct[digest] for digest in digests), np.int64, len(digests)), delta=False)
    return writer.finish()


def _unpack_digests(content: bytes) -> tuple[bytes, ...]:
    reader = ByteReader(content)
    distinct = [reader.raw(DIGEST_BYTES) for _ in range(reader.varint(limits.MAX_WORLD_SIZE, "digests"))]
    index = reader.column(reader.varint(limits.MAX_WORLD_SIZE, "ranks"), delta=False)
    reader.end()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(distinct):
        raise CorruptManifestError("a rank names an unknown structure")
    return tuple(distinct[number] for number in index.tolist())


def _pack_blobs(blobs: tuple[StoredBlob, ...]) -> bytes:
    return pack_list([bytes((blob.kind,)) + blob.digest + blob.payload for blob in blobs])


def _unpack_blobs(content: bytes) -> tuple[StoredBlob, ...]:
    return tuple(
        StoredBlob(BlobKind(item[0]), item[1 : 1 + DIGEST_BYTES], item[1 + DIGEST_BYTES :])
        for item in unpack_list(content)
        if item
    )
