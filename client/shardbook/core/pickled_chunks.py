"""The bulk of a pickled ``Metadata``: entries, chunks, and where they lie, block by block.

A block is some thousand consecutive chunks. Both dicts are filled at once, so that a key of ``storage_data`` takes its
name and its offset from the entry that was just written, and nothing has to be kept from block to block::

    shapes, and sizes of chunks            into the memo
    entries that begin here                into state_dict_metadata, with their chunks
    paths of files that are new            into the memo
    keys and extents of the same chunks    into storage_data

Programs of chunks, keys and extents are rows of equal width; no Python object stands for a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.extents import HINT_NONE, HINT_POSITION
from shardbook.core.locate import Located
from shardbook.core.pickle_rows import (
    APPENDS,
    BUILD,
    DICT,
    LIST,
    MARK,
    MEMOIZE,
    NEW,
    NONE,
    POP,
    REDUCE,
    SETITEMS,
    TUPLE1,
    IntColumn,
    Memo,
    framed,
    get,
    integers,
    memoized,
    rows,
    text,
    tuple_of,
)
from shardbook.core.table import EntryKind

#: What a block holds at most: its rows fit a processor's cache, and one block is all that is in memory.
BLOCK_CHUNKS: Final = 8192
BLOCK_ENTRIES: Final = 4096

_Scalar = TypeVar("_Scalar", bound=np.generic)
#: Whole opcodes.
Piece = bytes | bytearray | memoryview
#: Rows of an array: a slice where they follow each other, for then nothing is copied.
_Rows = slice | Int64Array


@dataclass(frozen=True, eq=False)
class _Block:
    """Consecutive chunks, and the entries that they belong to. The first entry may have begun in an earlier block.

    Attributes:
        begin: First entry, E entries in all.
        entry: First entry that begins here.
        end: Past the last entry.
        low: First chunk, C chunks in all.
        high: Past the last chunk.
        counts: (E,) chunks of each entry here.
        firsts: (E,) the first of them, counted from ``low``.
        is_bytes: (E,) the entry is no tensor.
    """

    begin: int
    entry: int
    end: int
    low: int
    high: int
    counts: Int64Array
    firsts: Int64Array
    is_bytes: BoolArray

    @property
    def is_continued(self) -> bool:
        """True when the first entry has begun in an earlier block."""
        return self.begin < self.entry

    @property
    def chunks(self) -> slice:
        """Its rows among all chunks."""
        return slice(self.low, self.high)

    def each_chunk(self, of_entries: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
        """(C,) the value of each chunk's entry."""
        return np.repeat(of_entries, self.counts)


def _cut(structure: CheckpointStructure, firsts: Int64Array) -> Iterator[_Block]:
    total = len(structure.owner)
    entry = low = 0
    while entry < structure.entry_count or low < total:
        begin = entry - 1 if low < firsts[entry] else entry
        end = min(entry + BLOCK_ENTRIES, int(np.searchsorted(firsts[:-1], low + BLOCK_CHUNKS)))
        high = min(low + BLOCK_CHUNKS, int(firsts[end]))
        edges = np.clip(firsts[begin : end + 1], low, high)
        is_bytes: BoolArray = structure.kinds[begin:end] == EntryKind.BYTES
        yield _Block(begin, entry, end, low, high, np.diff(edges), edges[:-1] - low, is_bytes)
        entry, low = end, high


@dataclass(frozen=True, eq=False)
class _Alike:
    """Tensors of a block that have the same number of dimensions.

    Attributes:
        ndim: Dimensions.
        new: Those that begin here, counted from ``_Block.begin``.
        chunks: Their chunks, counted from ``_Block.low``.
    """

    ndim: int
    new: Int64Array
    chunks: _Rows


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What is in the memo before the first block, and what is made of it.

    Attributes:
        push: What pushes classes and attributes by name, and the dicts.
        properties: What pushes each distinct set of properties.
        which_properties: (T,) which of them an entry has.
        transforms: What pushes each of ``Located.transforms``.
    """

    push: Mapping[str, bytes]
    properties: Sequence[bytes]
    which_properties: Int64Array
    transforms: Sequence[bytes]


class _Pieces:
    """Rows of the chunks of a block, handed out entry by entry."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[memoryview, int]] = {}
        self._at: dict[int, int] = {}

    def add(self, ndim: int, content: bytearray, count: int) -> None:
        self._rows[ndim] = memoryview(content), len(content) // max(count, 1)
        self._at[ndim] = 0

    def take(self, ndim: int, count: int) -> memoryview:
        content, width = self._rows[ndim]
        begin = self._at[ndim]
        end = self._at[ndim] = begin + count * width
        return content[begin:end]


class ChunkWriter:
    """Writes entries and chunks of one checkpoint, once.

    Args:
        structure: Entries and chunks.
        located: Where they lie.
        prefix: Directory of the data files; empty when they lie in the checkpoint's own.
        words: What was written before.
        memo: What is in the memo already.

    Attributes:
        fqn_places: (T,) memo indices of the fqns that were written.
    """

    def __init__(
        self, structure: CheckpointStructure, located: Located, prefix: str, words: Vocabulary, memo: Memo
    ) -> None:
        self._structure = structure
        self._located = located
        self._folder = f"{prefix}/" if prefix else ""
        self._words = words
        self._push = words.push
        self._memo = memo
        self._firsts = structure.firsts
        self.fqn_places = np.zeros(structure.entry_count, dtype=np.int64)
        #: Memo index of the list whose chunks go on in the next block.
        self._open_list = 0
        file_counts = np.array([len(files) for files in structure.rank_files.distinct], dtype=np.int64)
        self._first_files = np.concatenate([[0], np.cumsum(file_counts[structure.rank_files.index])]).astype(np.int64)
        #: Memo index of every file's path; -1 until a chunk lies in it.
        self._path_places = np.full(int(self._first_files[-1]), -1, dtype=np.int64)

    def blocks(self, *, with_storage: bool) -> Iterator[bytes]:
        """Yields frames; ``with_storage`` they fill storage_data too."""
        for block in _cut(self._structure, self._firsts):
            parts: list[Piece] = []
            fqns, offsets = self._entries(block, parts)
            if with_storage and block.low < block.high:
                parts.extend(self._storage(block, fqns, offsets))
            yield framed(parts)

    # ------------------------------------------------------------ entries

    def _entries(self, block: _Block, parts: list[Piece]) -> tuple[Int64Array, Int64Array]:
        """Adds entries and their chunks; returns where the chunks' fqns and offsets are in the memo, each (C,)."""
        shapes = np.zeros(len(block.counts), dtype=np.int64)
        pieces = _Pieces()
        for alike in self._alike(block):
            sizes = self._sizes(block, alike, shapes, parts)
            pieces.add(alike.ndim, self._chunks(block, alike, sizes), len(sizes))
        # A name, a list and each chunk's offsets, in the order in which they are written.
        taken = np.where(block.is_bytes, 1, 2 + block.counts)
        if block.is_continued:
            taken[0] = 0 if block.is_bytes[0] else block.counts[0]
        fqns = self._memo.size + np.cumsum(taken) - taken
        offsets = fqns + 2
        self._memo.take(int(taken.sum()))
        if block.is_continued:
            offsets[0], fqns[0] = fqns[0], self.fqn_places[block.begin]
            if not block.is_bytes[0]:
                ndim, count = int(self._structure.ndims[block.begin]), int(block.counts[0])
                parts += (get(self._open_list), MARK, pieces.take(ndim, count), APPENDS, POP)
        if block.entry < block.end:
            self._begin_entries(block, shapes, pieces, parts)
            self._open_list = int(fqns[-1]) + 1
        self.fqn_places[block.begin : block.end] = fqns
        return block.each_chunk(fqns), block.each_chunk(offsets - block.firsts) + np.arange(block.high - block.low)

    def _alike(self, block: _Block) -> Iterator[_Alike]:
        ndims = np.where(block.is_bytes, -1, self._structure.ndims[block.begin : block.end])
        distinct = np.unique(ndims).tolist()
        begins = np.arange(block.begin, block.end) >= block.entry
        for ndim in distinct:
            if ndim >= 0:
                here: BoolArray = ndims == ndim
                chunks = slice(None) if len(distinct) == 1 else _where(block.each_chunk(here))
                yield _Alike(ndim, _where(here & begins), chunks)

    def _sizes(self, block: _Block, alike: _Alike, shapes: Int64Array, parts: list[Piece]) -> Int64Array:
        """Adds shapes and the chunks' sizes, neighbours' equal ones once; returns where the sizes are in the memo.

        Where the shapes are is put into ``shapes`` (E,).
        """
        structure, ndim = self._structure, alike.ndim
        sizes = structure.sizes[block.chunks][alike.chunks, :ndim]
        differs = np.ones(len(sizes), dtype=np.bool_)
        differs[1:] = (sizes[1:] != sizes[:-1]).any(axis=1)
        distinct = np.concatenate([structure.shapes[block.begin + alike.new, :ndim], sizes[differs]])
        first = self._memo.take(len(distinct))
        shapes[alike.new] = first + np.arange(len(alike.new))
        parts.append(rows((*self._size_of(distinct), MEMOIZE + POP), len(distinct)))
        return first + len(alike.new) - 1 + np.cumsum(differs)

    def _size_of(self, matrix: Int64Array) -> tuple[bytes | IntColumn, ...]:
        """Parts of a row that push a ``torch.Size`` of ``matrix`` (N, D)."""
        numbers = [integers(matrix[:, dim]) for dim in range(matrix.shape[1])]
        return self._push["Size"], *tuple_of(numbers), TUPLE1 + REDUCE

    def _chunks(self, block: _Block, alike: _Alike, sizes: Int64Array) -> bytearray:
        """Rows that push the chunks and put their offsets into the memo."""
        push = self._push
        offsets = self._structure.offsets[block.chunks][alike.chunks, : alike.ndim]
        head = push["ChunkStorageMetadata"] + NEW + DICT + MARK + push["offsets"]
        parts = (head, *self._size_of(offsets), MEMOIZE + push["sizes"], memoized(sizes), SETITEMS + BUILD)
        return rows(parts, len(sizes))

    def _begin_entries(self, block: _Block, shapes: Int64Array, pieces: _Pieces, parts: list[Piece]) -> None:
        """Adds the entries that begin here, with the chunks they have here."""
        structure, push = self._structure, self._push
        head = push["TensorStorageMetadata"] + NEW + DICT + MARK + push["properties"]
        heads = [head + properties + push["size"] for properties in self._words.properties]
        of_bytes = MEMOIZE + push["BytesStorageMetadata"] + NEW
        chunk_list = push["chunks"] + LIST + MEMOIZE
        skipped, here = block.entry - block.begin, slice(block.entry, block.end)
        parts += (push["state_dict_metadata dict"], MARK)
        for fqn, is_bytes, ndim, which, count, shape in zip(
            structure.fqns[here],
            block.is_bytes[skipped:].tolist(),
            structure.ndims[here].tolist(),
            self._words.which_properties[here].tolist(),
            block.counts[skipped:].tolist(),
            shapes[skipped:].tolist(),
            strict=True,
        ):
            if is_bytes:
                parts += (text(fqn), of_bytes)
                continue
            parts += (text(fqn), MEMOIZE, heads[which], get(shape), chunk_list)
            if count:
                parts += (MARK, pieces.take(ndim, count), APPENDS)
            parts.append(SETITEMS + BUILD)
        parts += (SETITEMS, POP)

    # ------------------------------------------------------------ storage data

    def _storage(self, block: _Block, fqns: Int64Array, offsets: Int64Array) -> Iterator[Piece]:
        """Yields keys and extents; those whose objects have the same attributes in one go."""
        located, here = self._located, block.chunks
        yield from self._new_paths(block)
        paths = self._path_places[self._files(block)]
        is_bytes = block.each_chunk(block.is_bytes)
        hints, is_none = self._hints(block, is_bytes)
        transforms = located.transform_index[here]
        kinds = is_bytes + 2 * is_none + 4 * transforms
        columns = (fqns, hints, offsets, paths, located.start[here], located.length[here])
        distinct = np.unique(kinds).tolist()
        for kind in distinct:
            at = slice(None) if len(distinct) == 1 else _where(kinds == kind)
            chosen = [column[at] for column in columns]
            content = rows(self._extent(kind, *chosen), len(chosen[0]))
            yield from (self._push["storage_data dict"], MARK, content, SETITEMS, POP)

    def _extent(
        self,
        kind: int,
        fqns: Int64Array,
        hints: Int64Array,
        offsets: Int64Array,
        paths: Int64Array,
        start: Int64Array,
        length: Int64Array,
    ) -> Iterator[bytes | IntColumn]:
        """Yields the parts of a row that pushes a key and its extent, attributes in DCP's order."""
        push, (transforms, rest) = self._push, divmod(kind, 4)
        yield push["MetadataIndex"] + NEW + DICT + MARK + push["fqn"]
        yield memoized(fqns)
        yield push["index"]
        yield NONE if rest & 2 else integers(hints)
        if not rest & 1:
            yield push["offset"]
            yield memoized(offsets)
        yield SETITEMS + BUILD + push["_StorageInfo"] + NEW + DICT + MARK + push["relative_path"]
        yield memoized(paths)
        yield push["offset"]
        yield integers(start)
        yield push["length"]
        yield integers(length)
        if transforms:
            yield push["transform_descriptors"] + self._words.transforms[transforms - 1]
        yield SETITEMS + BUILD

    def _hints(self, block: _Block, is_bytes: BoolArray) -> tuple[Int64Array, BoolArray]:
        """Returns index hints, (C,), and where they are None."""
        codes = self._located.hints[block.chunks]
        position = np.arange(block.low, block.high) - block.each_chunk(self._firsts[block.begin : block.end])
        is_none: BoolArray = (codes == HINT_NONE) | ((codes == HINT_POSITION) & is_bytes)
        return np.where(codes == HINT_POSITION, position, codes - 2), is_none

    def _files(self, block: _Block) -> Int64Array:
        """(C,) number of the file that a chunk lies in, among all ranks' files."""
        return self._first_files[self._structure.owner[block.chunks]] + self._structure.file[block.chunks]

    def _new_paths(self, block: _Block) -> Iterator[bytes]:
        """Puts the paths of files into the memo that no block before this one spoke of."""
        files = self._files(block)
        fresh = np.unique(files[self._path_places[files] < 0])
        ranks = np.searchsorted(self._first_files, fresh, side="right") - 1
        numbers = fresh - self._first_files[ranks]
        for rank, number in zip(ranks.tolist(), numbers.tolist(), strict=True):
            yield text(self._folder + self._structure.rank_files.path(rank, number)) + MEMOIZE + POP
        self._path_places[fresh] = self._memo.take(len(fresh)) + np.arange(len(fresh))


def _where(flags: BoolArray) -> Int64Array:
    return np.flatnonzero(flags).astype(np.int64, copy=False)
