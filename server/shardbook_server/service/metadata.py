"""What committed checkpoints hold, for loaders and for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from shardbook.core.blocks import decode_blocks
from shardbook.core.dtype import dtype_name
from shardbook.core.extents import decode_segment
from shardbook.core.head import decode_head
from shardbook.core.locate import locate
from shardbook.core.names import CheckpointName
from shardbook.core.table import EntryKind
from shardbook.errors import InternalError
from shardbook_server.service import present
from shardbook_server.service.pages import Tokens, page_count
from shardbook_server.service.views import (
    BlockView,
    CheckpointInfo,
    HeaderView,
    MetadataView,
    Page,
    SegmentView,
    TensorView,
)
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import structures as structure_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.structures import TensorRow

#: What one item of a stream aims at, bytes, and how many rows are read for it at most.
_ITEM_BYTES: Final = 1 << 20
_ROWS: Final = 256
_SEGMENTS: Final = 16


class MetadataService:
    """Reads committed checkpoints. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps nothing but the key of the page tokens."""
        self._database = database
        self._tokens = Tokens(database)

    def get_metadata(
        self, name: str, fqn_prefix: bytes = b"", held_structure_digest: bytes = b"", *, show_deleted: bool = False
    ) -> Iterator[MetadataView]:
        """Yields the header, then extent segments by rank, then blocks in state-dict order.

        Blocks come in items of about 1 MiB; a single entry may be larger. Every step reads in a transaction of its
        own; none is open across a yield. Each ``next`` blocks on the database.

        Args:
            name: The checkpoint.
            fqn_prefix: Only entries whose fqn starts with this.
            held_structure_digest: A checkpoint of this structure is answered without head and blocks.
            show_deleted: That of a deleted checkpoint too, until it is purged.

        Raises:
            NotFoundError: ``name`` means no checkpoint; or one that is deleted, unless ``show_deleted``, or purged.
            FailedPreconditionError: It means one that is not committed.
            InvalidArgumentError: ``name`` is none.
        """
        parsed = CheckpointName.parse(name, "name")
        with self._database.read() as connection:
            row, info = present.committed_info(connection, parsed, show_deleted=show_deleted)
            head, ids = b"", []
            if info.structure_digest != held_structure_digest:
                structure_id = _structure_id(row.structure_id)
                head = structure_rows.read_head(connection, structure_id)
                ids = structure_rows.read_tensor_ids(connection, structure_id).tolist()
                if fqn_prefix:
                    ids = structure_rows.filter_tensors(connection, ids, fqn_prefix)
        yield HeaderView(info, head, row.metadata_header)
        yield from self._segments(info)
        yield from self._blocks(ids)

    def _segments(self, info: CheckpointInfo) -> Iterator[SegmentView]:
        first_rank = 0
        while True:
            with self._database.read() as connection:
                some = registration_rows.read_segments(
                    connection, info.checkpoint_id, first_rank=first_rank, limit=_SEGMENTS
                )
            for first, payload in some:
                yield SegmentView(first, payload)
            if len(some) < _SEGMENTS:
                return
            first_rank = some[-1][0] + 1

    def _blocks(self, ids: Sequence[int]) -> Iterator[BlockView]:
        held: list[bytes] = []
        size_bytes = 0
        for at in range(0, len(ids), _ROWS):
            with self._database.read() as connection:
                blocks = structure_rows.read_blocks(connection, ids[at : at + _ROWS])
            for block in blocks:
                if held and size_bytes + len(block) > _ITEM_BYTES:
                    yield BlockView(tuple(held))
                    held, size_bytes = [], 0
                held.append(block)
                size_bytes += len(block)
        if held:
            yield BlockView(tuple(held))

    def list_tensors(
        self, parent: str, *, page_size: int = 0, page_token: str = "", fqn_prefix: bytes = b""
    ) -> Page[TensorView]:
        """Returns one page of entries in state-dict order, with the number of entries in all.

        Raises:
            NotFoundError: ``parent`` means no checkpoint.
            FailedPreconditionError: It means one that is not committed.
            InvalidArgumentError: A page size or token is not valid.
        """
        parsed = CheckpointName.parse(parent, "parent")
        count = page_count(page_size)
        listing = ("tensors", str(parsed), fqn_prefix.hex())
        position = self._tokens.read(listing, page_token)
        first = 0 if position is None else int(position[1])
        with self._database.read() as connection:
            if position is None:
                row = present.resolve_committed(connection, parsed)
            else:
                # The token names the attempt: `latest` may mean another one by now.
                row = present.committed_by_id(connection, int(position[0]))
            structure_id = _structure_id(row.structure_id)
            ids = structure_rows.read_tensor_ids(connection, structure_id).tolist()
            if fqn_prefix:
                ids = structure_rows.filter_tensors(connection, ids, fqn_prefix)
            tensors = structure_rows.read_tensors(connection, ids[first : first + count])
            sizes = _sizes(connection, row.id, structure_id, tensors, explicit=row.explicit)
        token = self._tokens.make(listing, (row.id, first + count)) if first + count < len(ids) else ""
        views = (_view(tensor, size) for tensor, size in zip(tensors, sizes, strict=True))
        return Page(tuple(views), token, len(ids))


def _sizes(
    connection: Connection, checkpoint_id: int, structure_id: int, tensors: Sequence[TensorRow], *, explicit: bool
) -> list[int]:
    """Returns the bytes of entries. Those of tensors follow from the structure, unless lengths were given."""
    sizes = [tensor.fixed_bytes for tensor in tensors]
    asked = [at for at, tensor in enumerate(tensors) if explicit or tensor.kind == EntryKind.BYTES]
    if asked:
        head = decode_head(structure_rows.read_head(connection, structure_id))
        blocks = structure_rows.read_blocks(connection, [tensors[at].id for at in asked])
        structure = decode_blocks(blocks, head.rank_files)
        pairs = [
            pair
            for _, payload in registration_rows.read_segments(
                connection, checkpoint_id, limit=len(head.rank_files.index)
            )
            for pair in decode_segment(payload)
        ]
        ends = np.concatenate([[0], np.cumsum(locate(structure, pairs).length)])
        bounds = structure.firsts
        measured = (ends[bounds[1:]] - ends[bounds[:-1]]).tolist()
        for at, size_bytes in zip(asked, measured, strict=True):
            sizes[at] = size_bytes
    return sizes


def _view(tensor: TensorRow, size_bytes: int) -> TensorView:
    return TensorView(
        tensor.fqn,
        dtype_name(tensor.dtype),
        tuple(json.loads(tensor.shape)),
        tensor.chunk_count,
        size_bytes,
        tensor.kind != EntryKind.BYTES,
    )


def _structure_id(structure_id: int | None) -> int:
    if structure_id is None:
        raise InternalError("a committed checkpoint has no structure")
    return structure_id
