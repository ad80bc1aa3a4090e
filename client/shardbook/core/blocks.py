"""One stored block an entry of a checkpoint: its specification, boxes, owners and expected extents.

Blocks are content-addressed one by one, so that a changed tensor does not store the others anew. They are sent and
stored as they are; whoever loads decodes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardbook.core import limits
from shardbook.core.checkpoint import CheckpointStructure, RankFiles
from shardbook.core.columns import (
    ByteReader,
    ByteWriter,
    Int64Array,
    expect_magic,
    frame,
    magic,
    malformed,
    pack_columns,
    unframe,
)
from shardbook.core.digest import digest_of
from shardbook.core.table import Encoded
from shardbook.core.texts import decode_name, encode_name

_KIND = b"BK"
_VERSION = 1
#: Columns of a chunk besides its box; True where values climb from chunk to chunk.
_CHUNK_COLUMNS = (
    ("owner", True),
    ("position", True),
    ("file", False),
    ("base", True),
    ("var_lo", False),
    ("var_hi", False),
    ("length", True),
)


def encode_blocks(structure: CheckpointStructure) -> list[Encoded]:
    """Returns one content-addressed block an entry, in state-dict order."""
    columns = _box_columns(structure)
    for name, climbs in _CHUNK_COLUMNS:
        packed = pack_columns(getattr(structure, name), structure.chunk_counts, delta=climbs)
        for row, content in enumerate(packed):
            columns[row].append(content)
    return [_encode_block(structure, row, columns[row]) for row in range(structure.entry_count)]


def _box_columns(structure: CheckpointStructure) -> list[list[bytes]]:
    """Packed sizes and offsets of every entry's chunks, dimension by dimension."""
    columns: list[list[bytes]] = [[] for _ in structure.fqns]
    ndims = np.repeat(structure.ndims, structure.chunk_counts)
    for dim in range(int(structure.ndims.max(initial=0))):
        entries, chunks = np.flatnonzero(structure.ndims > dim), ndims > dim
        size, offset = structure.sizes[chunks, dim], structure.offsets[chunks, dim]
        index = offset // np.maximum(size, 1) * (size > 0)
        for values, climbs in ((size, True), (index, True), (offset - index * size, False)):
            packed = pack_columns(values, structure.chunk_counts[entries], delta=climbs)
            for row, content in zip(entries.tolist(), packed, strict=True):
                columns[row].append(content)
    return columns


def _encode_block(structure: CheckpointStructure, row: int, columns: list[bytes]) -> Encoded:
    writer = ByteWriter()
    writer.raw(magic(_KIND, _VERSION))
    writer.blob(encode_name(structure.fqns[row]))
    for codes in (structure.kinds, structure.dtypes, structure.layouts, structure.memory_formats):
        writer.byte(int(codes[row]))
    ndim = int(structure.ndims[row])
    writer.varint(ndim)
    for size in structure.shapes[row, :ndim].tolist():
        writer.varint(size)
    writer.varint(int(structure.winner_entry[row]))
    writer.varint(int(structure.chunk_counts[row]))
    for column in columns:
        writer.raw(column)
    content = writer.finish()
    return Encoded(digest_of(content), frame(content))


def block_fqn(payload: bytes) -> str:
    """Returns the fqn of a block without decoding the rest."""
    reader = ByteReader(unframe(payload))
    expect_magic(reader, _KIND, _VERSION)
    return decode_name(reader.blob(limits.MAX_INFLATED_BYTES, "a name"))


def decode_blocks(payloads: Sequence[bytes], rank_files: RankFiles) -> CheckpointStructure:
    """Returns the entries of ``payloads``, in order, without key paths and warnings (those are in the head).

    Raises:
        InvalidArgumentError: A payload is damaged or beyond a limit.
    """
    fqns: list[str] = []
    codes: list[bytes] = []
    shapes: list[list[int]] = []
    winners: list[int] = []
    counts: list[int] = []
    boxes: list[list[tuple[Int64Array, Int64Array]]] = []
    columns: list[list[Int64Array]] = [[] for _ in _CHUNK_COLUMNS]
    for payload in payloads:
        reader = ByteReader(unframe(payload))
        expect_magic(reader, _KIND, _VERSION)
        fqns.append(decode_name(reader.blob(limits.MAX_INFLATED_BYTES, "a name")))
        codes.append(reader.raw(4))
        ndim = reader.varint(limits.MAX_NDIM, "the number of dimensions")
        shapes.append([reader.varint(limits.INT64_MAX, "a size") for _ in range(ndim)])
        winners.append(reader.varint(limits.MAX_ENTRIES, "an entry"))
        counts.append(reader.varint(limits.MAX_CELLS, "the number of chunks"))
        boxes.append([_read_box(reader, counts[-1]) for _ in range(ndim)])
        for out, (_, climbs) in zip(columns, _CHUNK_COLUMNS, strict=True):
            out.append(reader.column(counts[-1], delta=climbs))
        reader.end()
    return _join(fqns, codes, shapes, winners, counts, boxes, columns, rank_files)


def _read_box(reader: ByteReader, count: int) -> tuple[Int64Array, Int64Array]:
    size = reader.column(count, delta=True)
    index = reader.column(count, delta=True)
    offset = index * size + reader.column(count, delta=False)
    if count and (int(size.min()) < 0 or int(offset.min()) < 0):
        raise malformed("a box is negative")
    return offset, size


def _join(
    fqns: list[str],
    codes: list[bytes],
    shapes: list[list[int]],
    winners: list[int],
    counts: list[int],
    boxes: list[list[tuple[Int64Array, Int64Array]]],
    columns: list[list[Int64Array]],
    rank_files: RankFiles,
) -> CheckpointStructure:
    ndims = np.array([len(shape) for shape in shapes], dtype=np.int64)
    width = max(int(ndims.max(initial=0)), 1)
    total = sum(counts)
    code_columns = np.frombuffer(b"".join(codes), dtype=np.uint8).reshape(-1, 4)
    padded = np.ones((len(fqns), width), dtype=np.int64)
    offsets = np.zeros((total, width), dtype=np.int64)
    sizes = np.ones((total, width), dtype=np.int64)
    at = 0
    for row, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        padded[row, : len(shape)] = shape
        for dim, (offset, size) in enumerate(boxes[row]):
            offsets[at : at + count, dim] = offset
            sizes[at : at + count, dim] = size
        at += count
    owner, position, file, base, var_lo, var_hi, length = (
        np.concatenate([np.zeros(0, np.int64), *parts]) for parts in columns
    )
    return CheckpointStructure(
        fqns=tuple(fqns),
        kinds=code_columns[:, 0],
        dtypes=code_columns[:, 1],
        layouts=code_columns[:, 2],
        memory_formats=code_columns[:, 3],
        ndims=ndims,
        shapes=padded,
        winner_entry=np.array(winners, dtype=np.int64),
        chunk_counts=np.array(counts, dtype=np.int64),
        offsets=offsets,
        sizes=sizes,
        owner=owner,
        position=position,
        file=file,
        base=base,
        var_lo=var_lo,
        var_hi=var_hi,
        length=length,
        key_paths=None,
        rank_files=rank_files,
    )
