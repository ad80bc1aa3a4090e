"""Manifests that are read by range: the same answers, in proportion, and damage where it is read."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest

from shardbook.core.blocks import encode_blocks
from shardbook.core.box import Box
from shardbook.core.container import read_container, write_container
from shardbook.core.extents import Extents, encode_extents, encode_segment
from shardbook.core.head import encode_head
from shardbook.core.manifest import MANIFEST_KIND, RANGES, AttemptIdentity, Manifest
from shardbook.core.names import prefix_of
from shardbook.core.ranged import FIRST_BYTES, RangedManifest
from shardbook.core.wanted import Wanted
from shardbook.errors import CorruptManifestError
from shardbook.sources import ManifestSource
from tests.unit.ranks import Item, assembled, raw, shard

TENSORS = 3000
INCARNATION = bytes(range(16))


@dataclass
class File:
    """A file of which ranges are read."""

    content: bytes
    reads: list[int] = field(default_factory=list)

    def __call__(self, first: int, count: int) -> bytes:
        """Reads."""
        self.reads.append(count)
        return self.content[first : first + count]


def _half(at: int, rank: int) -> Item:
    """A rank's rows of tensor ``at``: two of the first, the rest of the second."""
    rows = (2, 2 + at % 7)[rank]
    return shard(f"layer.{at}.{'x' * (at % 40)}", (4 + at % 7, at), (rank * 2, 0), (rows, at))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Two ranks, thousands of tensors of odd sizes, one entry that is none."""
    items = [[_half(at, rank) for at in range(1, TENSORS)] for rank in range(2)]
    structure = assembled([*items[0], raw("extra")], items[1])
    extents = [(encode_extents(Extents(np.array(lengths, np.int64))), b"") for lengths in ([77], [])]
    return Manifest(
        identity=AttemptIdentity("llm/8b", incarnation=INCARNATION, world_size=2, prefix=prefix_of(INCARNATION, 1)),
        head=encode_head(structure),
        blocks=tuple(block.payload for block in encode_blocks(structure)),
        fqns=structure.fqns,
        segments=(encode_segment(extents),),
        structure_digests=(bytes(32), bytes(32)),
        blobs=(),
    )


def opened(content: bytes) -> tuple[RangedManifest, File]:
    """A manifest that is read by range."""
    file = File(content)
    found = RangedManifest.open(file, len(content))
    assert isinstance(found, RangedManifest)
    return found, file


def test_what_is_read_by_range_is_what_was_written(manifest: Manifest) -> None:
    """Every part; also through a pickle, which carries its content."""
    content = manifest.to_bytes()
    found, _ = opened(content)
    assert (manifest.identity, manifest.head, manifest.fqns) == (found.identity, found.head, found.fqns)
    rows = [5, 1, 2999, 5]
    assert [manifest.blocks[row] for row in rows] == found.read_blocks(rows)
    assert list(manifest.segments) == found.read_segments([0])
    assert content == found.whole().to_bytes() == pickle.loads(pickle.dumps(found)).to_bytes()
    with pytest.raises(CorruptManifestError, match="lacks"):
        found.read_segments([1])


def test_a_question_reads_what_it_is_about(manifest: Manifest) -> None:
    """Names and what stands in front, and of the blocks and extents those that are needed; once."""
    content = manifest.to_bytes()
    found, file = opened(content)
    in_front = sum(file.reads)
    source = ManifestSource(found, "/here")
    name = manifest.fqns[1500]
    wanted = Wanted.boxes_of({name: [Box((1, 0), (2, 1))], "gone": []})
    answer = source.query(wanted)
    whole = ManifestSource(manifest, "/here").query(wanted)
    for one in ("found", "index", "start", "length", "offsets"):
        assert getattr(whole, one).tolist() == getattr(answer, one).tolist()
    assert (2, 0) == (len(answer.tensor), int(answer.found[1]))
    read = sum(file.reads) - in_front
    assert read < 1000 < len(content) // 100
    source.query(wanted)
    assert read == sum(file.reads) - in_front
    assert (source.fqns(), "/here") == (manifest.fqns, pickle.loads(pickle.dumps(source)).location)


def test_neighbours_are_one_read(manifest: Manifest) -> None:
    """A stage of a pipeline costs a request, not one for each of its tensors."""
    found, file = opened(manifest.to_bytes())
    before = len(file.reads)
    found.read_blocks(range(100, 900))
    assert 1 == len(file.reads) - before


@pytest.mark.parametrize("where", ["blocks", "segments", "fqns", "head"])
def test_damage_is_found_where_it_is_read(manifest: Manifest, where: str) -> None:
    """A bit, anywhere in what a question is about."""
    content = bytearray(manifest.to_bytes())
    found, _ = opened(bytes(content))
    section = found.sections[where]
    content[section.offset + section.size_bytes - 1] ^= 1
    with pytest.raises(CorruptManifestError):
        ManifestSource(opened(bytes(content))[0], "").query(Wanted.all_of([manifest.fqns[-1]]))


def test_a_file_that_is_cut_off(manifest: Manifest) -> None:
    """Said, as a damaged one."""
    content = manifest.to_bytes()
    for size_bytes in (3, FIRST_BYTES - 1, FIRST_BYTES + 10, len(content) - 1000):
        with pytest.raises(CorruptManifestError):
            ManifestSource(RangedManifest.open(File(content[:size_bytes]), size_bytes), "").columns()


def test_manifests_of_earlier_releases_are_read_as_a_whole(manifest: Manifest) -> None:
    """They have no checksums of parts."""
    sections = read_container(manifest.to_bytes(), MANIFEST_KIND)
    del sections[RANGES]
    content = write_container(MANIFEST_KIND, sections)
    found = RangedManifest.open(File(content), len(content))
    assert isinstance(found, Manifest)
    assert manifest.blocks == found.blocks
