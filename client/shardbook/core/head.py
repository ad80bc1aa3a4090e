"""What belongs to a checkpoint as a whole: file names by rank, merged key paths, storage meta and version."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from shardbook.core import limits
from shardbook.core.checkpoint import CheckpointStructure, RankFiles
from shardbook.core.columns import ByteReader, ByteWriter, expect_magic, frame, magic, malformed, unframe
from shardbook.core.structure import FileName
from shardbook.core.table import KeyPaths, read_key_paths, write_key_paths
from shardbook.errors import InvalidArgumentError

_KIND = b"HD"
_VERSION = 1

#: DCP's version of its metadata: what torch writes today.
DCP_VERSION: Final = "1.0.0"


@dataclass(frozen=True, eq=False)
class Head:
    """The part of a checkpoint structure that is not a matter of one entry.

    Attributes:
        rank_files: File names by rank.
        key_paths: DCP's planner_data, merged; None when no rank had any.
        warnings: Facts worth a person's attention.
    """

    rank_files: RankFiles
    key_paths: KeyPaths | None
    warnings: tuple[str, ...]


def encode_head(structure: CheckpointStructure | Head) -> bytes:
    """Returns the payload of the head of ``structure``, or of one that stands alone."""
    writer = ByteWriter()
    writer.raw(magic(_KIND, _VERSION))
    index, distinct = structure.rank_files.index, structure.rank_files.distinct
    writer.varint(len(index))
    writer.column(index, delta=False)
    writer.varint(len(distinct))
    for files in distinct:
        writer.varint(len(files))
        writer.bits(np.fromiter((file.ranked for file in files), np.bool_, len(files)))
        writer.names([file.name for file in files])
    write_key_paths(writer, structure.key_paths, ())
    writer.varint(len(structure.warnings))
    writer.names(structure.warnings)
    return frame(writer.finish())


def decode_head(payload: bytes) -> Head:
    """Returns the head in ``payload``.

    Raises:
        InvalidArgumentError: The payload is damaged or beyond a limit.
    """
    reader = ByteReader(unframe(payload))
    rank_files = _read_rank_files(reader)
    key_paths = read_key_paths(reader, ())
    count = reader.varint(limits.MAX_WARNINGS, "the number of warnings")
    warnings = reader.names(count)
    reader.end()
    return Head(rank_files, key_paths, warnings)


def _read_rank_files(reader: ByteReader) -> RankFiles:
    expect_magic(reader, _KIND, _VERSION)
    world_size = reader.varint(limits.MAX_WORLD_SIZE, "the world size")
    index = reader.column(world_size, delta=False)
    distinct_count = reader.varint(world_size, "the number of file lists")
    if world_size and (int(index.min()) < 0 or int(index.max()) >= distinct_count):
        raise malformed("a rank names an unknown file list")
    return RankFiles(tuple(_read_files(reader) for _ in range(distinct_count)), index)


def _read_files(reader: ByteReader) -> tuple[FileName, ...]:
    count = reader.varint(limits.MAX_ITEMS, "the number of files")
    ranked = reader.bits(count).tolist()
    return tuple(FileName(*pair) for pair in zip(ranked, reader.names(count), strict=True))


@dataclass(frozen=True)
class StorageMetaHeader:
    """DCP's ``StorageMeta``, attribute by attribute.

    Attributes:
        checkpoint_id: Text of the id; None when it is None.
        checkpoint_id_is_path: True when it was a ``Path`` rather than a ``str``.
        save_id: As in DCP.
        load_id: As in DCP.
        modules: As in DCP; None when the attribute is absent, as in files by older releases.
    """

    checkpoint_id: str | None = None
    checkpoint_id_is_path: bool = False
    save_id: str | None = None
    load_id: str | None = None
    modules: tuple[str, ...] | None = ()


@dataclass(frozen=True)
class MetadataHeader:
    """Attributes of DCP's ``Metadata`` that are about the whole.

    Attributes:
        attributes: Names in the object's ``__dict__``, in order.
        has_storage_data: False when ``storage_data`` is None.
        version: DCP's version of the format.
        storage_meta: None when ``storage_meta`` is None.
    """

    attributes: tuple[str, ...] = ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version")
    has_storage_data: bool = True
    version: str | None = None
    storage_meta: StorageMetaHeader | None = None


def default_header(location: str, prefix: str) -> MetadataHeader:
    """Returns the header of a save by Shardbook: what DCP's ``finish`` would have set.

    Args:
        location: Directory or URL of the checkpoint.
        prefix: Directory of the attempt; stands for DCP's random ``save_id``, so that every copy says the same.
    """
    meta = StorageMetaHeader(checkpoint_id=location, checkpoint_id_is_path="://" not in location, save_id=prefix)
    return MetadataHeader(version=DCP_VERSION, storage_meta=meta)


def encode_metadata_header(header: MetadataHeader) -> bytes:
    """Returns the payload of ``header``: framed JSON, names with lone surrogates escaped."""
    return frame(json.dumps({"v": 1, **asdict(header)}, separators=(",", ":"), sort_keys=True).encode())


def decode_metadata_header(payload: bytes) -> MetadataHeader:
    """Returns the header in ``payload``.

    Raises:
        InvalidArgumentError: The payload is damaged or of another version.
    """
    try:
        fields: dict[str, Any] = json.loads(unframe(payload, limits.MAX_HEADER_BYTES))
        if fields.pop("v") != 1:
            raise InvalidArgumentError("unknown version", reason="UNSUPPORTED_FORMAT", field="metadata_header")
        meta = fields.pop("storage_meta")
        return MetadataHeader(
            attributes=tuple(map(_text, fields.pop("attributes"))),
            has_storage_data=bool(fields.pop("has_storage_data")),
            version=_optional_text(fields.pop("version")),
            storage_meta=None if meta is None else _storage_meta(meta),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise malformed("it is no metadata header", field="metadata_header") from exc


def _storage_meta(fields: dict[str, Any]) -> StorageMetaHeader:
    modules = fields["modules"]
    return StorageMetaHeader(
        checkpoint_id=_optional_text(fields["checkpoint_id"]),
        checkpoint_id_is_path=bool(fields["checkpoint_id_is_path"]),
        save_id=_optional_text(fields["save_id"]),
        load_id=_optional_text(fields["load_id"]),
        modules=None if modules is None else tuple(map(_text, modules)),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _optional_text(value: object) -> str | None:
    return None if value is None else _text(value)
