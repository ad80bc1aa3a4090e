"""Checkpoint directories with data files in them: several a rank, a rank without any, a rank that compresses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np

from shardbook.core import directory as files
from shardbook.core.extents import NO_CHECKSUM, Extents, encode_extents
from shardbook.core.fold import fold
from shardbook.core.manifest import AttemptIdentity, RegistrationRecord, StoredBlob
from shardbook.core.structure import BlobKind, FileName, RankStructure, encode_plan, encode_structure
from shardbook.core.table import encode_table
from tests.unit.ranks import Item, plan_of, raw, shard

#: Ranks of ``write_checkpoint``: two plain ones, one without anything to save, one whose writer compresses.
WORLD_SIZE = 4
#: Bytes of every data file, below the attempt's prefix.
FILES = {
    "__0_0.distcp": 24 + 10,
    "__0_1.distcp": 16,
    "__1_0.distcp": 24 + 11,
    "__1_1.distcp": 16,
    "__3_0.distcp": 5 + 20 + 7,
    "__3_1.distcp": 9,
}


#: First byte and length of each rank's items, file by file: two in the first, one in the second.
_PLACES = {
    0: ((0, 24), (24, 10), (0, 16)),
    1: ((0, 24), (24, 11), (0, 16)),
    3: ((5, 12), (24, 8), (0, 9)),
}


def content_of(name: str) -> bytes:
    """Content of a data file; no two items are alike."""
    return random.Random(name).randbytes(FILES[name])


def _checksums(rank: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Checksums of a rank's items in file order; of the last one nobody kept any."""
    first, second = content_of(f"__{rank}_0.distcp"), content_of(f"__{rank}_1.distcp")
    places = zip((first, first, second), _PLACES[rank], strict=True)
    sums = [google_crc32c.value(content[start : start + length]) for content, (start, length) in places]
    return np.array([*sums[:2], NO_CHECKSUM], dtype=np.int64)


def _record(who: AttemptIdentity, rank: int, items: Sequence[Item], *, has_sums: bool) -> RegistrationRecord:
    """A rank whose first and third item are in one file, and the second in another."""
    plan = plan_of(items)
    compresses = rank == 3
    lengths = np.array([24, 16, 0], dtype=np.int64) if items and not compresses else np.zeros(len(items), np.int64)
    structure = RankStructure(
        plan,
        np.arange(len(items)),
        (FileName(True, "0.distcp"), FileName(True, "1.distcp")) if items else (),
        np.array([2, 1] if items else [], dtype=np.int64),
        np.array([0, 2, 1] if items else [], dtype=np.int64),
        lengths,
    )
    extents = Extents(variable_lengths=np.array([10 + rank] if items else [], dtype=np.int64))
    if compresses:  # with a gap of 5 bytes before the first item, and 7 between the two of the first file
        extents = Extents(
            lengths=np.array([12, 8, 9]),
            starts=np.array([5, 24, 0]),
            transforms=(("zstd",),),
            transform_index=np.array([1, 0, 1]),
        )
    if items and has_sums:
        extents = replace(extents, checksums=_checksums(rank))
    table = encode_table(plan.table)
    encoded_plan = encode_plan(plan, table.digest)
    encoded = encode_structure(structure, encoded_plan.digest)
    blobs = ((BlobKind.TABLE, table), (BlobKind.PLAN, encoded_plan), (BlobKind.STRUCTURE, encoded))
    return RegistrationRecord(
        identity=who,
        rank=rank,
        structure_digest=encoded.digest,
        extents=encode_extents(extents),
        volatile=b"",
        blobs=tuple(StoredBlob(kind, one.digest, one.payload) for kind, one in blobs),
    )


def records(who: AttemptIdentity, *, has_sums: bool = False) -> list[RegistrationRecord]:
    """What the four ranks left: rows of two matrices, and a note each."""
    items: dict[int, list[Item]] = {2: []}
    for at, rank in enumerate((0, 1, 3)):
        items[rank] = [
            shard("model.w", (9, 2), (3 * at, 0), (3, 2)),
            shard("model.v", (6, 2), (2 * at, 0), (2, 2)),
            raw(f"note.{rank}"),
        ]
    return [_record(who, rank, items[rank], has_sums=has_sums) for rank in range(WORLD_SIZE)]


def write_checkpoint(path: Path, who: AttemptIdentity, *, has_sums: bool = False) -> dict[str, bytes]:
    """Writes a whole checkpoint: data and manifest; returns what is in it by path, for other filesystems.

    Args:
        path: Its directory, which is made.
        who: The attempt, of four ranks.
        has_sums: Whether two of three items have a checksum.
    """
    content = fold(records(replace(who, world_size=WORLD_SIZE), has_sums=has_sums)).manifest.to_bytes()
    made = {f"{who.prefix}/{name}": content_of(name) for name in FILES}
    made |= {files.manifest_path(who.prefix): content, files.MANIFEST: content}
    for name, data in made.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return made
