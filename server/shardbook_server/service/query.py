"""Which chunks of a committed checkpoint meet the boxes that a loader wants, and where their bytes are.

Entries are decoded a page at a time and kept, bounded by their bytes, so that a query costs what it finds. They are
kept by the digest of the checkpoint's structure, which says what they hold: all checkpoints of a run share them, and no
row that a database handed out anew after a failover can be taken for another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from shardbook.core import limits
from shardbook.core.blocks import decode_blocks
from shardbook.core.checkpoint import RankFiles
from shardbook.core.chunk_index import ChunkIndex
from shardbook.core.columns import Int64Array, frame
from shardbook.core.digest import digest_of
from shardbook.core.extents import decode_segment
from shardbook.core.found import encode_part, part_content
from shardbook.core.head import decode_head
from shardbook.core.names import CheckpointName
from shardbook.core.places import encode_places
from shardbook.core.query import Hits, find, place, place_apart, sliced
from shardbook.core.ragged import bounds_of
from shardbook.core.texts import decode_name
from shardbook.core.wanted import Wanted, decode_wanted
from shardbook.errors import InternalError, InvalidArgumentError, UnavailableError
from shardbook_server.service import present
from shardbook_server.service.admission import MemoryBudget, SingleFlight
from shardbook_server.service.lru import BoundedCache
from shardbook_server.service.views import CheckpointInfo, QueryView
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import structures as structure_rows
from shardbook_server.storage.database import Connection, Database

#: Chunks of the entries that are decoded together, about.
PAGE_CHUNKS: Final = 1 << 19
#: Pairs of box and chunk on one page of an answer, about; one tensor stays together.
PART_CHUNKS: Final = 1 << 17
#: What decoding takes for each chunk, bytes, and in all at a time.
_BYTES_PER_CHUNK: Final = 200
_DECODING_BYTES: Final = 256 << 20
#: What extents of ranks take that are kept decoded, bytes, and beside their payloads.
_SEGMENT_BYTES: Final = 32 << 20
_PAIR_BYTES: Final = 16
_NAME_BYTES: Final = 250
_TOKEN_CHARS: Final = 40
_NO_FILES: Final = RankFiles((), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Contents:
    """What a checkpoint structure holds, without chunks.

    Attributes:
        digest: Of the structure.
        entries: Number of each entry by fqn, in state-dict order.
        ids: (T,) rows of the entries.
        digests: Of the entries.
        bounds: Numbers of the entries at which pages begin, and T.
        chunk_counts: (P,) chunks of each page.
        rank_files: File names by rank.
    """

    digest: bytes
    entries: Mapping[str, int]
    ids: Int64Array
    digests: tuple[bytes, ...]
    bounds: Int64Array
    chunk_counts: Int64Array
    rank_files: RankFiles

    @property
    def nbytes(self) -> int:
        """Memory, about."""
        files = sum(len(file.name) + 100 for files in self.rank_files.distinct for file in files)
        names = sum(map(len, self.entries)) + _NAME_BYTES * len(self.entries)
        return names + files + self.ids.nbytes + self.rank_files.index.nbytes


class QueryService:
    """Answers queries for chunks. Thread-safe; whatever several threads lack at once is decoded once."""

    def __init__(self, database: Database, *, cache_bytes: int, page_chunks: int = PAGE_CHUNKS) -> None:
        """Starts with empty caches.

        Args:
            database: Where checkpoints are.
            cache_bytes: Most bytes of decoded entries that are kept.
            page_chunks: Chunks that are decoded together, about.
        """
        self._database = database
        self._page_chunks = page_chunks
        self._contents: BoundedCache[bytes, Contents] = BoundedCache(cache_bytes)
        self._pages: BoundedCache[tuple[bytes, int], ChunkIndex] = BoundedCache(cache_bytes)
        self._segments: BoundedCache[tuple[str, int], Sequence[tuple[bytes, bytes]]] = BoundedCache(_SEGMENT_BYTES)
        self._flight = SingleFlight()
        self._memory = MemoryBudget(_DECODING_BYTES)

    def query_chunks(
        self,
        name: str,
        wanted: bytes,
        *,
        include_head: bool = False,
        page_token: str = "",
        apart: bool = False,
        held_found_digest: bytes = b"",
    ) -> QueryView:
        """Returns the chunks that meet the wanted boxes, as many as one page holds.

        An entry that the checkpoint lacks is on no page. Every step reads in transactions of its own.

        Args:
            name: The checkpoint.
            wanted: Payload of ``shardbook.core.wanted``.
            include_head: Answer the head of the checkpoint, too, on the first page.
            page_token: Where to go on; from the page before, with everything else as it was.
            apart: Answer what the structure says and what the extents say apart.
            held_found_digest: Leave out the former where this is its digest.

        Raises:
            NotFoundError: ``name`` means no checkpoint.
            FailedPreconditionError: It means one that is not committed.
            InvalidArgumentError: ``name`` is none, the question is damaged or beyond a limit, or a box does not fit
                its tensor, which the field then names.
        """
        parsed = CheckpointName.parse(name, "name")
        at = _read_token(page_token)
        question = decode_wanted(wanted)
        with self._database.read() as connection:
            row, info = present.committed_info(connection, parsed)
            if row.structure_id is None:
                raise InternalError("a committed checkpoint has no structure")
            is_asked = include_head and not page_token
            head = structure_rows.read_head(connection, row.structure_id) if is_asked else b""
        found, end, rank_files = self._find(info, row.structure_id, question, at)
        view = QueryView(info, b"", end, b"" if page_token else row.metadata_header, head)
        if not found:
            return replace(view, found_digest=digest_of(b"") if apart else b"")

        def read(ranks: Int64Array) -> list[tuple[bytes, bytes]]:
            return self._registrations(info, ranks)

        if not apart:
            return replace(view, found=encode_part(place(found, rank_files, info.location.prefix, read)))
        shared, places = place_apart(found, rank_files, read)
        content = part_content(shared)
        digest = digest_of(content)
        payload = b"" if digest == held_found_digest else frame(content)
        return replace(view, found=payload, found_digest=digest, places=encode_places(places))

    def _find(
        self, info: CheckpointInfo, structure_id: int, question: Wanted, start: tuple[int, int]
    ) -> tuple[list[Hits], str, RankFiles]:
        """Returns what is found from a place on, as much as one page of an answer holds, and the token of the next."""
        if not question.fqns:
            # Asked for what the name means alone, as every reader does that has the rest in its cache.
            return [], "", _NO_FILES
        contents = self._contents_of(info, structure_id)
        entry = np.array(list(map(contents.entries.get, question.fqns, itertools.repeat(-1))), dtype=np.int64)
        page = np.where(entry < 0, -1, np.searchsorted(contents.bounds, entry, side="right") - 1)
        held: list[Hits] = []
        held_count = 0
        for number in sorted({number for number in page.tolist() if number >= start[0]}):
            tensor = np.flatnonzero(page == number)
            index = self._page(contents, number)
            slices = sliced(find(index, question, tensor, entry[tensor] - contents.bounds[number]), PART_CHUNKS)
            for at in range(start[1] if number == start[0] else 0, len(slices)):
                if held and held_count + len(slices[at].row) > PART_CHUNKS:
                    return held, f"{number}.{at}", contents.rank_files
                held.append(slices[at])
                held_count += len(slices[at].row)
        return held, "", contents.rank_files

    def _registrations(self, info: CheckpointInfo, ranks: Int64Array) -> list[tuple[bytes, bytes]]:
        """Returns the (extents, volatile) payloads of ranks; reads the segments that hold them and no others."""
        first_ranks = ranks // limits.SEGMENT_RANKS * limits.SEGMENT_RANKS
        segments: dict[int, Sequence[tuple[bytes, bytes]]] = {}
        absent = []
        for first in sorted(set(first_ranks.tolist())):
            held = self._segments.get((info.name, first))
            if held is None:
                absent.append(first)
            else:
                segments[first] = held
        if absent:
            with self._database.read() as connection:
                payloads = registration_rows.find_segments(connection, info.checkpoint_id, absent)
            for first in absent:
                if first not in payloads:
                    raise _gone(f"the extents of {info.ref}")
                pairs = segments[first] = decode_segment(payloads[first])
                size_bytes = sum(len(one) + len(other) for one, other in set(pairs))
                self._segments.put((info.name, first), pairs, size_bytes + _PAIR_BYTES * len(pairs))
        return [segments[first][rank - first] for first, rank in zip(first_ranks.tolist(), ranks.tolist(), strict=True)]

    def _contents_of(self, info: CheckpointInfo, structure_id: int) -> Contents:
        digest = info.structure_digest
        contents = self._contents.get(digest)
        if contents is not None:
            return contents
        with self._flight.alone(digest):
            contents = self._contents.get(digest)
            if contents is None:
                with self._database.read() as connection:
                    if present.checkpoint_info(connection, info.checkpoint_id).structure_digest != digest:
                        raise _gone(info.ref)
                    contents = self._read_contents(connection, structure_id, digest)
                self._contents.put(digest, contents, contents.nbytes)
        return contents

    def _read_contents(self, connection: Connection, structure_id: int, digest: bytes) -> Contents:
        ids = structure_rows.read_tensor_ids(connection, structure_id)
        names = structure_rows.read_names(connection, ids.tolist())
        if len(names) < len(ids):
            raise _gone("the structure")
        rank_files = decode_head(structure_rows.read_head(connection, structure_id)).rank_files
        counts = [name.chunk_count for name in names]
        bounds = np.array(bounds_of(counts, self._page_chunks), dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Contents(
            digest=digest,
            entries={decode_name(name.fqn): at for at, name in enumerate(names)},
            ids=ids,
            digests=tuple(name.digest for name in names),
            bounds=bounds,
            chunk_counts=np.diff(ends[bounds]),
            rank_files=rank_files,
        )

    def _page(self, contents: Contents, number: int) -> ChunkIndex:
        """Returns a page of entries, decoded; several threads that lack it decode it once."""
        key = (contents.digest, number)
        page = self._pages.get(key)
        if page is not None:
            return page
        with self._flight.alone(key):
            page = self._pages.get(key)
            if page is None:
                with self._memory.hold(int(contents.chunk_counts[number]) * _BYTES_PER_CHUNK):
                    page = self._read_page(contents, number)
                self._pages.put(key, page, page.nbytes)
        return page

    def _read_page(self, contents: Contents, number: int) -> ChunkIndex:
        first, end = contents.bounds[number : number + 2].tolist()
        with self._database.read() as connection:
            stored = structure_rows.read_addressed_blocks(connection, contents.ids[first:end].tolist())
        if tuple(digest for digest, _ in stored) != contents.digests[first:end]:
            # Dropped, or the rows are others since a failover: what is known of the structure is of no use any more.
            self._contents.clear()
            raise _gone("the structure")
        return ChunkIndex.of(decode_blocks([payload for _, payload in stored], contents.rank_files))


def _read_token(token: str) -> tuple[int, int]:
    """Returns page of entries and slice of it at which a page of an answer begins."""
    page, _, at = (token or "0.0").partition(".")
    # Nothing is to be won by making one up, so it is not signed.
    if not (page.isascii() and page.isdigit() and at.isascii() and at.isdigit() and len(token) < _TOKEN_CHARS):
        raise InvalidArgumentError("this is no page token of QueryChunks", field="page_token")
    return int(page), int(at)


def _gone(what: str) -> UnavailableError:
    return UnavailableError(
        f"{what} is not stored as it was a moment ago; try again", reason="DATABASE_CONFLICT", retry_delay_s=0.5
    )
