"""A complete set of registrations made ready to be committed: assembled when its structure is new, and packed.

Outside any transaction that matters: complete, insert-only registrations cannot change under it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Final

import numpy as np

from shardbook.core import limits
from shardbook.core.assembly import ITEMS_AT_ONCE, Assembly
from shardbook.core.blocks import encode_blocks
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.columns import Int64Array
from shardbook.core.digest import structure_digest
from shardbook.core.extents import encode_segment
from shardbook.core.head import encode_head
from shardbook.core.ragged import part_items
from shardbook.core.table import EntryKind, printable
from shardbook.core.texts import encode_name
from shardbook.errors import InvalidArgumentError, InvalidGeometryError, ShardbookError, UnavailableError
from shardbook_server.service.admission import MemoryBudget, SingleFlight
from shardbook_server.service.blobs import BlobService
from shardbook_server.service.checks import prose
from shardbook_server.service.closing import Folded
from shardbook_server.service.lru import BoundedCache
from shardbook_server.service.timing import RankStats
from shardbook_server.storage import blobs as blob_rows
from shardbook_server.storage import structures as structure_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.registrations import RegistrationRow
from shardbook_server.storage.runs import PartRow
from shardbook_server.storage.structures import NewStructure, NewTensor

#: What an item of a rank takes while a checkpoint is assembled, decoded and placed, and what one of the part that is
#: being judged takes on top, bytes.
_BYTES_PER_ITEM: Final = 112
_BYTES_PER_JUDGED: Final = 192
#: Refusals that are remembered.
_REFUSAL_COUNT: Final = 1024


class Folder:
    """Folds registrations. Thread-safe; the same ranks are assembled once, others wait and then find it done."""

    def __init__(self, database: Database, blobs: BlobService, memory: MemoryBudget) -> None:
        """Remembers nothing yet."""
        self._database = database
        self._blobs = blobs
        self._memory = memory
        self._flight = SingleFlight()
        #: Why ranks do not fit together, which no retry changes.
        self._refusals: BoundedCache[tuple[int, bytes], ShardbookError] = BoundedCache(_REFUSAL_COUNT)

    def fold(self, part: PartRow, rows: Sequence[RegistrationRow]) -> Folded:
        """Returns what ``commit_attempt`` needs; stores the checkpoint structure when it is new.

        Args:
            part: Where the attempt belongs.
            rows: One registration a rank, in rank order, none missing.

        Raises:
            InvalidGeometryError: The chunks do not make whole tensors.
            InvalidArgumentError: The assembled structure is beyond a limit.
        """
        blob_ids = np.fromiter((row.structure_id for row in rows), np.int64, len(rows))
        distinct, index = np.unique(blob_ids, return_inverse=True)
        with self._database.read() as connection:
            blobs = blob_rows.find_by_ids(connection, distinct.tolist())
        digests = [blobs[blob_id].digest for blob_id in distinct.tolist()]
        digest = structure_digest([digests[at] for at in index.tolist()])
        structure_id = self._find(part, digest)
        if structure_id is None:
            items = sum(blobs[blob_id].item_count for blob_id in distinct.tolist())
            with self._flight.alone((part.project_id, digest)):
                structure_id = self._find(part, digest)
                if structure_id is None:
                    judged = part_items(items, ITEMS_AT_ONCE)
                    with self._memory.hold(items * _BYTES_PER_ITEM + judged * _BYTES_PER_JUDGED):
                        structure_id = self._assemble(part, digest, blob_ids, digests, index)
        stats = RankStats.of([row.phases for row in rows], [row.size_bytes for row in rows])
        return Folded(structure_id, _segments(rows), _size_bytes(rows), any(row.explicit for row in rows), stats)

    def _find(self, part: PartRow, digest: bytes) -> int | None:
        with self._database.read() as connection:
            return structure_rows.find_structure(connection, part.project_id, digest)

    def _assemble(
        self, part: PartRow, digest: bytes, blob_ids: Int64Array, digests: Sequence[bytes], index: Int64Array
    ) -> int:
        new = self._assembled(part, digest, blob_ids, digests, index)
        # Content-addressed and of no effect until a commit names it, so it needs no lock of the run. Two replicas
        # that store tensors of one project do so one after the other: in unlike orders they would deadlock.
        # And what its packed lists name is not dropped meanwhile: that is done under the same lock.
        with self._database.write(lock=f"structures/{part.project_id}") as connection:
            now_us = self._database.now_us(connection)
            named = sorted(set(blob_ids.tolist()))
            if len(blob_rows.find_by_ids(connection, named)) < len(named):
                # Staging held them until a moment ago, so the attempt has been closed since.
                raise UnavailableError(
                    "structures of the attempt are not stored any more; try again",
                    reason="DATABASE_CONFLICT",
                    retry_delay_s=0.5,
                )
            blob_rows.touch(connection, named, now_us)
            return structure_rows.insert_structure(connection, part.project_id, new, now_us)

    def _assembled(
        self, part: PartRow, digest: bytes, blob_ids: Int64Array, digests: Sequence[bytes], index: Int64Array
    ) -> NewStructure:
        refusal = self._refusals.get((part.project_id, digest))
        if refusal is not None:
            raise copy.copy(refusal)
        structures = self._blobs.structures(part.name.run.project, digests)
        try:
            return _new_structure(digest, blob_ids, Assembly(structures, index.astype(np.int64)))
        except (InvalidGeometryError, InvalidArgumentError) as error:
            self._refusals.put((part.project_id, digest), copy.copy(error))
            raise


def _new_structure(digest: bytes, blob_ids: Int64Array, assembly: Assembly) -> NewStructure:
    """Packs what is assembled part by part; chunks of one part are in memory at a time."""
    tensors: list[NewTensor] = []
    for part in assembly.parts():
        tensors += _tensors(part)
    head = assembly.head
    bytes_entry_count = sum(new.kind == EntryKind.BYTES for new in tensors)
    return NewStructure(
        digest=digest,
        tensor_count=len(tensors) - bytes_entry_count,
        chunk_count=sum(new.chunk_count for new in tensors if new.kind != EntryKind.BYTES),
        bytes_entry_count=bytes_entry_count,
        warnings=json.dumps([prose(warning, limits.MAX_REASON_CHARS) for warning in head.warnings]),
        rank_structure_ids=blob_ids,
        head=encode_head(head),
        tensors=tensors,
    )


def _segments(rows: Sequence[RegistrationRow]) -> tuple[tuple[int, bytes], ...]:
    """Packs registrations as readers find them.

    Raises:
        InvalidArgumentError: Those of one segment are more than a reader inflates.
    """
    segments = []
    for first in range(0, len(rows), limits.SEGMENT_RANKS):
        pairs = [(row.extents, row.volatile) for row in rows[first : first + limits.SEGMENT_RANKS]]
        if sum(len(extents) + len(volatile) for extents, volatile in set(pairs)) > limits.MAX_INFLATED_BYTES // 2:
            raise InvalidArgumentError(
                f"the extents of ranks {first} to {first + len(pairs) - 1} are more than a reader takes at once",
                reason="LIMIT_EXCEEDED",
                field="extents",
            )
        segments.append((first, encode_segment(pairs)))
    return tuple(segments)


def _size_bytes(rows: Sequence[RegistrationRow]) -> int:
    total = sum(row.size_bytes for row in rows)
    if total > limits.INT64_MAX:
        raise InvalidArgumentError(
            f"the ranks claim {total} bytes together, the limit is 2**63 - 1", reason="LIMIT_EXCEEDED", field="extents"
        )
    return total


def _tensors(structure: CheckpointStructure) -> list[NewTensor]:
    sums = np.concatenate([[0], np.cumsum(structure.length)]).astype(np.int64)
    bounds = structure.firsts
    fixed = (sums[bounds[1:]] - sums[bounds[:-1]]).tolist()
    kinds, dtypes = structure.kinds.tolist(), structure.dtypes.tolist()
    counts, ndims, shapes = structure.chunk_counts.tolist(), structure.ndims.tolist(), structure.shapes.tolist()
    return [
        NewTensor(
            digest=block.digest,
            kind=kinds[row],
            dtype=dtypes[row],
            shape=json.dumps(shapes[row][: ndims[row]], separators=(",", ":")),
            chunk_count=counts[row],
            fixed_bytes=fixed[row],
            fqn=encode_name(structure.fqns[row]),
            fqn_text=printable(structure.fqns[row]),
            payload=block.payload,
        )
        for row, block in enumerate(encode_blocks(structure))
    ]
