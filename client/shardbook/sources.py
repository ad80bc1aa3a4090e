"""Where a reader's questions about chunks are answered: by the service, or by a directory's own manifest; no torch.

Both answer by the same code of ``shardbook.core.query``, in proportion to what is asked.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from shardbook._answers import Answers
from shardbook._disk_cache import DiskCache
from shardbook._lost import tell_lost
from shardbook.chunks import CheckpointChunks
from shardbook.client import Client
from shardbook.core import limits
from shardbook.core.blocks import decode_blocks
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.chunk_index import ChunkIndex
from shardbook.core.columns import Int64Array
from shardbook.core.extents import decode_segment
from shardbook.core.fold import unfold
from shardbook.core.found import FoundChunks, merge
from shardbook.core.head import Head, MetadataHeader, decode_head, decode_metadata_header, default_header
from shardbook.core.locate import Located
from shardbook.core.manifest import StoredManifest
from shardbook.core.names import CheckpointName
from shardbook.core.query import find, place
from shardbook.core.table import KeyPaths
from shardbook.core.wanted import Wanted
from shardbook.errors import CorruptManifestError, InvalidArgumentError, UnavailableError
from shardbook.stored_metadata import StoredMetadata
from shardbook.stores import Stores


class ChunkSource(Protocol):
    """Answers questions about one checkpoint, which never changes. Thread-safe; picklable."""

    @property
    def location(self) -> str:
        """Path or URL of the checkpoint's directory, on this machine."""
        ...

    @property
    def locations(self) -> tuple[str, ...]:
        """Paths or URLs of all its directories, in the order in which to try them; ``location`` is the first."""
        ...

    @property
    def prefix(self) -> str:
        """Directory of the attempt's files below it; empty for none."""
        ...

    @property
    def header(self) -> MetadataHeader:
        """What belongs to the checkpoint as a whole."""
        ...

    def query(self, wanted: Wanted) -> FoundChunks:
        """Returns the chunks that meet the wanted boxes.

        Raises:
            InvalidArgumentError: A box does not fit its tensor.
            ShardbookError: The question cannot be answered.
        """
        ...

    def fqns(self) -> Sequence[str]:
        """Returns the names of all entries, in state-dict order."""
        ...

    def key_paths(self) -> KeyPaths | None:
        """Returns DCP's planner_data of all entries; None where there is none."""
        ...

    def columns(self) -> tuple[CheckpointStructure, Located]:
        """Returns every entry and chunk, and where they lie: the cost of the whole."""
        ...


@dataclass
class ServiceSource:
    """A checkpoint of the catalogue, as ``ChunkSource``.

    A name such as ``latest`` is looked up by the first question; the others are about the same checkpoint.

    Attributes:
        client: The service.
        name: The checkpoint.
        stores: What its location means here.
        deadline_s: Seconds for each question.
        cache: Where answers are kept; None keeps none.
    """

    client: Client
    name: CheckpointName
    stores: Stores
    deadline_s: float
    cache: DiskCache | None = None
    _first: CheckpointChunks | None = field(default=None, init=False, repr=False)

    @property
    def found_name(self) -> str:
        """Resource name of the checkpoint; asks, unless something has been asked before."""
        return self._known().name

    @property
    def location(self) -> str:
        """Path or URL of the checkpoint's directory; asks, unless something has been asked before."""
        return self.locations[0]

    @property
    def locations(self) -> tuple[str, ...]:
        """Paths or URLs of all its directories that are known here, in the order in which to try them; asks likewise.

        Raises:
            InvalidArgumentError: None of its stores is configured here (``UNKNOWN_STORE``).
        """
        return self.stores.paths_of(self._known().locations)

    @property
    def prefix(self) -> str:
        """Directory of the attempt's files below it."""
        return self._known().prefix

    @property
    def header(self) -> MetadataHeader:
        """What belongs to the checkpoint as a whole."""
        stored = self._known().metadata_header
        return decode_metadata_header(stored) if stored else default_header(self.location, self.prefix)

    def query(self, wanted: Wanted) -> FoundChunks:
        """Returns the chunks that meet the wanted boxes; one call, and a second, small one where part of it is kept."""
        with _with_a_way_around():
            answer = self._answers.chunks(self._pinned, wanted)
        if self._first is None:
            # Without its chunks, which the caller may let go of.
            self._first = replace(answer, found=merge(Wanted.all_of(()), []))
        return answer.found

    def fqns(self) -> Sequence[str]:
        """Returns the names of all entries; a call for each 1,000."""
        with _with_a_way_around():
            return [info.fqn for info in self.client.list_tensors(self._pinned, deadline_s=self.deadline_s)]

    def key_paths(self) -> KeyPaths | None:
        """Returns DCP's planner_data of all entries; one call."""
        nothing = Wanted.all_of(())
        with _with_a_way_around():
            answer = self.client.query_chunks(self._pinned, nothing, include_head=True, deadline_s=self.deadline_s)
        return decode_head(answer.head).key_paths

    def columns(self) -> tuple[CheckpointStructure, Located]:
        """Returns everything; one call, and a second, small one where answers are kept."""
        return self.stored().columns()

    def stored(self) -> StoredMetadata:
        """Returns everything as the service keeps it."""
        with _with_a_way_around():
            return self._answers.everything(self._pinned)

    @property
    def _answers(self) -> Answers:
        return Answers(self.client, self.cache, self.deadline_s)

    def tell_lost(self) -> None:
        """Tells the catalogue that a data file is not there; best effort."""
        tell_lost(self.client, self._pinned, self._known().locations, self.stores)

    @property
    def _pinned(self) -> CheckpointName:
        return self.name if self._first is None else CheckpointName.parse(self._first.name)

    def _known(self) -> CheckpointChunks:
        if self._first is None:
            self.query(Wanted.all_of(()))
        assert self._first is not None  # noqa: S101 - what ``query`` leaves
        return self._first


@contextmanager
def _with_a_way_around() -> Iterator[None]:
    try:
        yield
    except UnavailableError as error:
        raise UnavailableError(
            f"{error.message} A checkpoint's directory can be loaded without a server: dcp.load(state, '/its/path')",
            reason=error.reason,
            metadata=error.metadata,
        ) from error


@dataclass
class ManifestSource:
    """An attempt of a checkpoint directory, as ``ChunkSource``. Blocks are decoded when they are asked for, and kept.

    Attributes:
        manifest: What the directory holds of it.
        location: Path or URL of the directory.
    """

    manifest: StoredManifest
    location: str
    _head: Head | None = field(default=None, init=False, repr=False)
    _rows: dict[str, int] | None = field(default=None, init=False, repr=False)
    _pages: list[ChunkIndex] = field(default_factory=list, init=False, repr=False)
    _page: Int64Array | None = field(default=None, init=False, repr=False)
    _entry: Int64Array | None = field(default=None, init=False, repr=False)
    _segments: dict[int, Sequence[tuple[bytes, bytes]]] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        return ManifestSource, (self.manifest, self.location)

    @property
    def locations(self) -> tuple[str, ...]:
        """The directory alone."""
        return (self.location,)

    @property
    def prefix(self) -> str:
        """Directory of the attempt's files below it."""
        return self.manifest.identity.prefix

    @property
    def header(self) -> MetadataHeader:
        """What belongs to the checkpoint as a whole."""
        stored = self.manifest.metadata_header
        return decode_metadata_header(stored) if stored else default_header(self.location, self.prefix)

    def query(self, wanted: Wanted) -> FoundChunks:
        """Returns the chunks that meet the wanted boxes.

        Raises:
            InvalidArgumentError: A box does not fit its tensor.
            CorruptManifestError: What is needed of the manifest is damaged.
            OSError: The storage failed.
        """
        with self._lock:
            return self._query(wanted)

    def _query(self, wanted: Wanted) -> FoundChunks:
        with _guarded():
            rows = self._look_up(wanted.fqns)
            page, entry = self._decoded(rows)
        hits = []
        for number in np.unique(page[rows >= 0]).tolist():
            tensor = np.flatnonzero((rows >= 0) & (page == number))
            hits.append(find(self._pages[number], wanted, tensor, entry[tensor]))
        if not hits:
            return merge(wanted, [])
        with _guarded():
            return merge(wanted, [place(hits, self._whole_head().rank_files, self.prefix, self._registrations)])

    def fqns(self) -> Sequence[str]:
        """Returns the names of all entries."""
        return self.manifest.fqns

    def key_paths(self) -> KeyPaths | None:
        """Returns DCP's planner_data of all entries."""
        with self._lock, _guarded():
            return self._whole_head().key_paths

    def columns(self) -> tuple[CheckpointStructure, Located]:
        """Returns everything."""
        folded = unfold(self.manifest.whole())
        return folded.structure, folded.located

    def _look_up(self, fqns: Sequence[str]) -> Int64Array:
        """(T,) block of each name; -1 where there is none."""
        if self._rows is None:
            self._rows = {fqn: row for row, fqn in enumerate(self.manifest.fqns)}
            self._page = np.full(len(self._rows), -1, dtype=np.int64)
            self._entry = np.zeros(len(self._rows), dtype=np.int64)
        return np.array(list(map(self._rows.get, fqns, itertools.repeat(-1))), dtype=np.int64)

    def _decoded(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(T,) page and entry of blocks, decoding those that nobody has asked for before."""
        assert self._page is not None  # noqa: S101 - made with the names
        assert self._entry is not None  # noqa: S101
        known = np.unique(rows[rows >= 0])
        absent = known[self._page[known] < 0]
        if len(absent):
            blocks = self.manifest.read_blocks(absent.tolist())
            structure = decode_blocks(blocks, self._whole_head().rank_files)
            if structure.fqns != tuple(self.manifest.fqns[row] for row in absent.tolist()):
                raise CorruptManifestError("a manifest names other entries than it holds")
            self._page[absent], self._entry[absent] = len(self._pages), np.arange(len(absent))
            self._pages.append(ChunkIndex.of(structure))
        return self._page[rows], self._entry[rows]

    def _registrations(self, ranks: Int64Array) -> list[tuple[bytes, bytes]]:
        numbers = ranks // limits.SEGMENT_RANKS
        absent = [number for number in np.unique(numbers).tolist() if number not in self._segments]
        for number, payload in zip(absent, self.manifest.read_segments(absent), strict=True):
            self._segments[number] = decode_segment(payload)
        places = zip(numbers.tolist(), (ranks % limits.SEGMENT_RANKS).tolist(), strict=True)
        try:
            return [self._segments[number][at] for number, at in places]
        except IndexError as error:
            raise CorruptManifestError("a manifest lacks the extents of a rank") from error

    def _whole_head(self) -> Head:
        if self._head is None:
            self._head = decode_head(self.manifest.head)
        return self._head


@contextmanager
def _guarded() -> Iterator[None]:
    """Raises what a damaged payload is refused with as what it is here: a damaged file."""
    try:
        yield
    except InvalidArgumentError as error:
        raise CorruptManifestError(f"a manifest is damaged: {error}") from error
