"""A file of named sections: an index in front, so that a reader fetches only the ranges it needs.

::

    8 bytes   magic
    4 bytes   length of the index, little-endian
    index     JSON: {"v": 1, "kind": ..., "sections": {name: [offset, size, crc32]}}; offsets from the end of the index
    sections  bytes

Nothing in a container is ever executed.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardbook.core.columns import ByteReader, ByteWriter
from shardbook.errors import CorruptManifestError, InvalidArgumentError

MAGIC = b"SHARDBK\n"
_VERSION = 1
_PREAMBLE = struct.Struct("<8sI")
#: Most bytes of an index.
_MAX_INDEX_BYTES = 16 << 20


@dataclass(frozen=True)
class Section:
    """Range of a section in its file: first byte, size in bytes, crc32 of the content."""

    offset: int
    size_bytes: int
    crc32: int


def write_container(kind: str, sections: Mapping[str, bytes]) -> bytes:
    """Returns the bytes of a container of ``kind``."""
    index: dict[str, list[int]] = {}
    offset = 0
    for name, content in sections.items():
        index[name] = [offset, len(content), zlib.crc32(content)]
        offset += len(content)
    head = json.dumps({"v": _VERSION, "kind": kind, "sections": index}, separators=(",", ":")).encode()
    return b"".join([_PREAMBLE.pack(MAGIC, len(head)), head, *sections.values()])


def read_index(content: bytes, kind: str) -> dict[str, Section]:
    """Returns the sections of a container, with absolute offsets; ``content`` begins at the file's first byte.

    Raises:
        CorruptManifestError: It is not a container of ``kind`` that this release reads.
    """
    if len(content) < _PREAMBLE.size:
        raise CorruptManifestError(f"a {kind} ends in its first {_PREAMBLE.size} bytes")
    magic, size_bytes = _PREAMBLE.unpack_from(content)
    if magic != MAGIC or size_bytes > _MAX_INDEX_BYTES or _PREAMBLE.size + size_bytes > len(content):
        raise CorruptManifestError(f"this is no {kind}, or it is cut off")
    start = _PREAMBLE.size + size_bytes
    try:
        index = json.loads(content[_PREAMBLE.size : start])
        if index["kind"] != kind:
            raise CorruptManifestError(f"this is a {index['kind']}, not a {kind}")
        if index["v"] != _VERSION:
            raise CorruptManifestError(f"{kind} has format version {index['v']}, this release reads {_VERSION}")
        return {
            str(name): Section(start + int(offset), int(size), int(crc32))
            for name, (offset, size, crc32) in index["sections"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptManifestError(f"the index of a {kind} is damaged") from exc


def read_section(content: bytes, section: Section, name: str) -> bytes:
    """Returns a section's bytes; raises CorruptManifestError when they are cut off or altered."""
    out = content[section.offset : section.offset + section.size_bytes]
    if section.offset < 0 or len(out) != section.size_bytes or zlib.crc32(out) != section.crc32:
        raise CorruptManifestError(f"section {name!r} is cut off or altered")
    return out


def read_container(content: bytes, kind: str) -> dict[str, bytes]:
    """Returns every section of a container, verified."""
    return {name: read_section(content, section, name) for name, section in read_index(content, kind).items()}


#: Items beyond one a byte that a list may have: empty ones of equal length cost nothing, a count from outside memory.
_EMPTY_ITEMS = 1024


def pack_list(items: Sequence[bytes]) -> bytes:
    """Returns ``items`` behind their count and lengths."""
    writer = ByteWriter()
    writer.varint(len(items))
    writer.column(np.fromiter(map(len, items), np.int64, len(items)), delta=False)
    for item in items:
        writer.raw(item)
    return writer.finish()


def unpack_list(content: bytes) -> list[bytes]:
    """Returns what ``pack_list`` packed; raises CorruptManifestError for other bytes."""
    try:
        reader = ByteReader(content)
        lengths = reader.column(reader.varint(len(content) + _EMPTY_ITEMS), delta=False).tolist()
        items = [reader.raw(length) for length in lengths]
        reader.end()
    except InvalidArgumentError as exc:
        raise CorruptManifestError("a list of payloads is damaged") from exc
    return items
