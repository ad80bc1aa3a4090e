"""The table of a rank: what its state dict holds, by name, apart from who holds which box.

Ranks that shard the same model share one table, so it is stored and sent once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from shardbook.core import limits
from shardbook.core.columns import (
    ByteReader,
    ByteWriter,
    Int64Array,
    expect_magic,
    frame,
    magic,
    malformed,
    not_canonical,
    unframe,
)
from shardbook.core.digest import digest_of
from shardbook.core.dtype import DTYPE_COUNT, LAYOUT_COUNT, MEMORY_FORMAT_COUNT
from shardbook.core.texts import encode_name
from shardbook.errors import InvalidArgumentError

UInt8Array = npt.NDArray[np.uint8]
#: Path of a value in the nested state dict: mapping keys and list indices, as DCP's planner_data has it.
KeyPath = tuple[str | int, ...]
KeyPaths = tuple[tuple[str, KeyPath], ...]

_KIND = b"TB"
_VERSION = 1
_NO_PATHS, _PATHS_OF_FQNS, _PATHS_OF_KEYS = 0, 1, 2


class EntryKind(IntEnum):
    """How DCP writes an entry: its ``WriteItemType``."""

    TENSOR = 1
    SHARD = 2
    BYTES = 3


@dataclass(frozen=True)
class Encoded:
    """A content-addressed blob, ready to send.

    Attributes:
        digest: SHA-256 of the canonical uncompressed bytes, 32 bytes.
        payload: Framed bytes.
    """

    digest: bytes
    payload: bytes


@dataclass(frozen=True, eq=False)
class TensorTable:
    """Entries of a rank's state dict, in its order.

    Geometry is padded to the largest ndim D of the table (at least 1): dimensions past an entry's own have size 1.

    Attributes:
        fqns: (E,) fully qualified names; any ``str``, also empty or with NUL and lone surrogates.
        kinds: (E,) EntryKind.
        dtypes: (E,) codes of ``shardbook.core.dtype``; 0 for BYTES entries.
        layouts: (E,) codes; 0 for BYTES entries.
        memory_formats: (E,) codes; 0 for BYTES entries.
        ndims: (E,) dimensions; 0 for BYTES entries.
        shapes: (E, D) sizes of the whole tensors, elements.
        key_paths: DCP's planner_data in its order; None when the planner kept none.

    Raises:
        InvalidArgumentError: Columns disagree in length, or a value is out of its range.
    """

    fqns: tuple[str, ...]
    kinds: UInt8Array
    dtypes: UInt8Array
    layouts: UInt8Array
    memory_formats: UInt8Array
    ndims: Int64Array
    shapes: Int64Array
    key_paths: KeyPaths | None

    def __post_init__(self) -> None:
        count = len(self.fqns)
        if count > limits.MAX_ENTRIES:
            raise InvalidArgumentError(f"{count} entries, the limit is {limits.MAX_ENTRIES}", field="fqns")
        for field in ("kinds", "dtypes", "layouts", "memory_formats", "ndims", "shapes"):
            if len(getattr(self, field)) != count:
                raise InvalidArgumentError(f"{field} has {len(getattr(self, field))} rows for {count}", field=field)
        self._check_codes()
        check_padded(self.ndims, self.shapes, "shapes")
        if count:
            check_volumes(self.shapes)

    def _check_codes(self) -> None:
        is_bytes = self.kinds == EntryKind.BYTES
        if ((self.kinds < EntryKind.TENSOR) | (self.kinds > EntryKind.BYTES)).any():
            raise InvalidArgumentError("an entry is neither tensor, shard nor bytes", field="kinds")
        if ((self.dtypes == 0) != is_bytes).any() or (self.dtypes >= DTYPE_COUNT).any():
            raise InvalidArgumentError("unknown dtype code", field="dtypes")
        if (self.layouts >= LAYOUT_COUNT).any():
            raise InvalidArgumentError("unknown layout code", field="layouts")
        if (self.memory_formats >= MEMORY_FORMAT_COUNT).any():
            raise InvalidArgumentError("unknown memory format code", field="memory_formats")
        if (self.layouts[is_bytes].any()) or self.memory_formats[is_bytes].any() or self.ndims[is_bytes].any():
            raise InvalidArgumentError("a bytes entry has tensor properties", field="kinds")

    @property
    def entry_count(self) -> int:
        """Number of entries, E."""
        return len(self.fqns)


def check_padded(ndims: Int64Array, shapes: Int64Array, field: str) -> None:
    """Raises InvalidArgumentError unless ``shapes`` (N, D) are sizes padded with 1 beyond ``ndims`` (N,)."""
    if shapes.ndim != 2 or shapes.shape[1] < 1:
        raise InvalidArgumentError("sizes are not a matrix", field=field)
    if len(ndims) == 0:
        return
    width = shapes.shape[1]
    if int(ndims.min()) < 0 or int(ndims.max()) > min(width, limits.MAX_NDIM):
        raise InvalidArgumentError(f"a tensor has {int(ndims.max())} dimensions", field=field)
    if len(ndims) * width > limits.MAX_CELLS:
        raise InvalidArgumentError(f"more than {limits.MAX_CELLS} sizes in all", field=field)
    if int(shapes.min()) < 0:
        raise InvalidArgumentError("a size is negative", field=field)
    if (shapes[np.arange(width) >= ndims[:, None]] != 1).any():
        raise InvalidArgumentError("a padded dimension is not 1", field=field)


def check_volumes(shapes: Int64Array) -> None:
    """Raises InvalidArgumentError when a tensor of ``shapes`` (N, D) has 2**63 elements or more."""
    estimate = np.where((shapes == 0).any(1), 0.0, np.maximum(shapes, 1).astype(np.float64).prod(1))
    for row in np.flatnonzero(estimate > 2.0**62).tolist():
        volume = 1
        for size in shapes[row].tolist():
            volume *= size
        if volume > limits.INT64_MAX:
            raise InvalidArgumentError(f"a tensor has {volume} elements, 2**63 or more", field="shapes")


def encode_table(table: TensorTable) -> Encoded:
    """Returns the canonical encoding of ``table``."""
    writer = ByteWriter()
    writer.raw(magic(_KIND, _VERSION))
    writer.varint(table.entry_count)
    writer.names(table.fqns)
    for column in (table.kinds, table.dtypes, table.layouts, table.memory_formats, table.ndims):
        writer.column(column, delta=False)
    write_padded(writer, table.shapes, table.ndims)
    write_key_paths(writer, table.key_paths, table.fqns)
    content = writer.finish()
    return Encoded(digest_of(content), frame(content))


def decode_table(payload: bytes) -> tuple[TensorTable, bytes]:
    """Returns the table in ``payload`` and its digest.

    Raises:
        InvalidArgumentError: The payload is damaged, not canonical, or beyond a limit.
    """
    content = unframe(payload)
    reader = ByteReader(content)
    expect_magic(reader, _KIND, _VERSION)
    count = reader.varint(limits.MAX_ENTRIES, "the number of entries")
    fqns = reader.names(count)
    kinds, dtypes, layouts, memory_formats = (_small(reader, count) for _ in range(4))
    ndims = reader.column(count, delta=False)
    shapes = read_padded(reader, ndims, 1)
    key_paths = read_key_paths(reader, fqns)
    reader.end()
    table = TensorTable(fqns, kinds, dtypes, layouts, memory_formats, ndims, shapes, key_paths)
    return table, digest_of(content)


def _small(reader: ByteReader, count: int) -> UInt8Array:
    column = reader.column(count, delta=False)
    if count and (int(column.min()) < 0 or int(column.max()) > 255):
        raise malformed("a code is not a byte")
    return column.astype(np.uint8)


def read_padded(reader: ByteReader, ndims: Int64Array, fill: int) -> Int64Array:
    """Reads one plain column a dimension into a matrix padded with ``fill``; checks ``ndims`` first."""
    count = len(ndims)
    widest = int(ndims.max(initial=0))
    if count and (int(ndims.min()) < 0 or widest > limits.MAX_NDIM or count * widest > limits.MAX_CELLS):
        raise malformed("impossible dimensions")
    matrix = np.full((count, max(widest, 1)), fill, dtype=np.int64)
    alike_count = int(ndims.min()) if count else 0
    for dim in range(widest):
        if dim < alike_count:  # picking rows lets go of the interpreter's lock, and getting it back takes longer
            matrix[:, dim] = reader.column(count, delta=False)
        else:
            rows = ndims > dim
            matrix[rows, dim] = reader.column(int(rows.sum()), delta=False)
    return matrix


def write_padded(writer: ByteWriter, matrix: Int64Array, ndims: Int64Array) -> None:
    """Appends what ``read_padded`` reads: a plain column a dimension, of the rows that have it."""
    if not len(ndims):
        return
    alike_count = int(ndims.min())
    for dim in range(int(ndims.max())):
        writer.column(matrix[:, dim] if dim < alike_count else matrix[ndims > dim, dim], delta=False)


def write_key_paths(writer: ByteWriter, key_paths: KeyPaths | None, fqns: tuple[str, ...]) -> None:
    """Appends planner_data; its keys cost nothing where they are ``fqns`` in the same order."""
    if key_paths is None:
        writer.byte(_NO_PATHS)
        return
    keys = tuple(key for key, _ in key_paths)
    if keys == fqns:
        writer.byte(_PATHS_OF_FQNS)
    else:
        writer.byte(_PATHS_OF_KEYS)
        writer.varint(len(keys))
        writer.names(keys)
    segments = [segment for _, path in key_paths for segment in path]
    writer.column(np.fromiter((len(path) for _, path in key_paths), np.int64, len(keys)), delta=False)
    writer.bits(np.fromiter((isinstance(segment, int) for segment in segments), np.bool_, len(segments)))
    writer.names([segment for segment in segments if isinstance(segment, str)])
    writer.column(np.array([s for s in segments if isinstance(s, int)], dtype=np.int64), delta=False)


def read_key_paths(reader: ByteReader, fqns: tuple[str, ...]) -> KeyPaths | None:
    """Reads what ``write_key_paths`` appended."""
    form = reader.byte()
    if form == _NO_PATHS:
        return None
    if form not in (_PATHS_OF_FQNS, _PATHS_OF_KEYS):
        raise malformed("unknown form of key paths")
    keys = fqns
    if form == _PATHS_OF_KEYS:
        keys = reader.names(reader.varint(limits.MAX_ENTRIES, "the number of keys"))
        if keys == fqns:
            raise not_canonical("keys repeat the fqns")
    if len(set(keys)) != len(keys):
        raise malformed("a key has two paths")
    lengths = reader.column(len(keys), delta=False)
    if len(keys) and (int(lengths.min()) < 0 or int(lengths.max()) > limits.MAX_ENTRIES):
        raise malformed("impossible length of a key path")
    total = int(lengths.sum())
    if total > 8 * limits.MAX_ENTRIES:
        raise malformed("key paths are too long")
    is_index = reader.bits(total)
    index_count = int(is_index.sum())
    names = iter(reader.names(total - index_count))
    indices = iter(reader.column(index_count, delta=False).tolist())
    segments: list[str | int] = [next(indices) if flag else next(names) for flag in is_index.tolist()]
    ends = np.cumsum(lengths).tolist()
    return tuple(
        (key, tuple(segments[end - length : end]))
        for key, length, end in zip(keys, lengths.tolist(), ends, strict=True)
    )


def key_paths_of(mappings: dict[str, KeyPath]) -> KeyPaths:
    """Returns DCP's planner_data as key paths, in its order."""
    return tuple(mappings.items())


def printable(fqn: str, limit_chars: int = 200) -> str:
    """Returns ``fqn`` for a message: escaped where it would not print, and not endless."""
    # Cut first: a name may be millions of characters long, and escaped it is longer still.
    text = encode_name(fqn[: limit_chars + 1]).decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    whole = len(text) <= limit_chars and len(fqn) <= limit_chars
    return text if whole else text[:limit_chars] + f"... ({len(fqn)} characters)"
