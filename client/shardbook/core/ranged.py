"""A manifest of which ranges are read when they are needed. No I/O: whoever opens it says how a range is read.

Sections in front say what there is; every block and every segment has a checksum of its own, so that reading some of
them proves as much of them as reading the whole would.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from shardbook.core.columns import Int64Array
from shardbook.core.container import Section, read_index, read_section
from shardbook.core.manifest import MANIFEST_KIND, RANGES, AttemptIdentity, Manifest, unpack_names, unpack_ranges
from shardbook.core.ragged import firsts_of
from shardbook.errors import CorruptManifestError

#: Returns bytes of the file, by first byte and count; fewer where it ends.
ReadRange = Callable[[int, int], bytes]

#: What is read of a file at first: its index, and often all that stands before the blocks.
FIRST_BYTES: Final = 1 << 16
#: Ranges that are nearer to each other are read as one, bytes: a request costs more than that.
_NEAR_BYTES: Final = 1 << 16
_IN_FRONT: Final = ("identity", "head", "metadata_header", "fqns", RANGES)


@dataclass(frozen=True, eq=False)
class RangedManifest:
    """A manifest in a file, as ``StoredManifest``. Thread-safe as reading is; pickled with all of its content.

    Attributes:
        read: Reads a range of the file.
        size_bytes: Of the file.
        sections: Where each section lies.
        front: The sections that say what there is.
    """

    read: ReadRange
    size_bytes: int
    sections: dict[str, Section]
    front: dict[str, bytes]

    @classmethod
    def open(cls, read: ReadRange, size_bytes: int) -> RangedManifest | Manifest:
        """Returns the manifest in a file; all of it at once where it is small, or too old to be read by range.

        Raises:
            CorruptManifestError: It is damaged as far as it was read.
        """
        head = read(0, min(FIRST_BYTES, size_bytes))
        if len(head) == size_bytes:
            return Manifest.from_bytes(head)
        sections = read_index(head, MANIFEST_KIND)
        if RANGES not in sections:
            return Manifest.from_bytes(read(0, size_bytes))
        if not set(_IN_FRONT) | {"segments", "blocks"} <= sections.keys():
            raise CorruptManifestError("a manifest lacks a section")
        end = max(sections[name].offset + sections[name].size_bytes for name in _IN_FRONT)
        if end > len(head):
            head += read(len(head), end - len(head))
        return cls(read, size_bytes, sections, {name: read_section(head, sections[name], name) for name in _IN_FRONT})

    def __reduce__(self) -> tuple[object, ...]:
        return Manifest.from_bytes, (self.read(0, self.size_bytes),)

    @cached_property
    def identity(self) -> AttemptIdentity:
        """The attempt."""
        return AttemptIdentity.from_json(self.front["identity"])

    @property
    def head(self) -> bytes:
        """Payload of ``shardbook.core.head``."""
        return self.front["head"]

    @property
    def metadata_header(self) -> bytes:
        """Likewise; empty for saves by Shardbook."""
        return self.front["metadata_header"]

    @cached_property
    def fqns(self) -> tuple[str, ...]:
        """Names of the entries, in state-dict order."""
        return unpack_names(self.front["fqns"])

    @cached_property
    def _items(self) -> dict[str, tuple[Int64Array, Int64Array]]:
        return unpack_ranges(self.front[RANGES])

    def read_blocks(self, rows: Sequence[int]) -> list[bytes]:
        """Returns the payloads of some entries."""
        return self._read_items("blocks", rows)

    def read_segments(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the extents of some groups of 256 ranks."""
        return self._read_items("segments", numbers)

    def whole(self) -> Manifest:
        """Returns all of it."""
        return Manifest.from_bytes(self.read(0, self.size_bytes))

    def _read_items(self, name: str, numbers: Sequence[int]) -> list[bytes]:
        lengths, checksums = self._items[name]
        section = self.sections[name]
        if numbers and max(numbers) >= len(lengths):
            raise CorruptManifestError(f"a manifest lacks some of its {name}")
        firsts = firsts_of(lengths)
        # The items end where the section does; their lengths stand before them.
        begin = section.offset + section.size_bytes - int(firsts[-1])
        if begin < section.offset:
            raise CorruptManifestError(f"the {name} of a manifest are longer than their section")
        found: dict[int, bytes] = {}
        for group in _near(sorted(set(numbers)), firsts):
            low, high = int(firsts[group[0]]), int(firsts[group[-1] + 1])
            content = self.read(begin + low, high - low)
            for number in group:
                item = content[int(firsts[number]) - low : int(firsts[number + 1]) - low]
                if len(item) != lengths[number] or zlib.crc32(item) != checksums[number]:
                    raise CorruptManifestError(f"item {number} of a manifest's {name} is cut off or altered")
                found[number] = item
        return [found[number] for number in numbers]


def _near(numbers: Sequence[int], firsts: Int64Array) -> list[list[int]]:
    """Returns sorted numbers in groups that are worth one read each."""
    at = np.array(numbers, dtype=np.int64)
    if not len(at):
        return []
    gaps = firsts[at[1:]] - firsts[at[:-1] + 1]
    bounds = [0, *(np.flatnonzero(gaps > _NEAR_BYTES) + 1).tolist(), len(at)]
    return [list(numbers[low:high]) for low, high in itertools.pairwise(bounds)]
