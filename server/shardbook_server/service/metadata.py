"""What committed checkpoints hold, for loaders and for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from shardbook.core import limits
from shardbook.core.blocks import decode_blocks
from shardbook.core.checkpoint import RankFiles
from shardbook.core.dtype import dtype_name
from shardbook.core.extents import decode_segment
from shardbook.core.locate import locate
from shardbook.core.names import CheckpointName
from shardbook.core.table import EntryKind
from shardbook_server.service.pages import check_page_size, read_token, write_token
from shardbook_server.service.present import checkpoint_info, resolve_committed
from shardbook_server.service.views import BlockView, HeaderView, MetadataView, Page, SegmentView, TensorView
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import structures as structure_rows
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.structures import TensorRow

#: Bytes of blocks that one item of a stream aims at.
_BLOCKS_BYTES: Final = 1 << 20
#: Entries and segments read in one transaction.
_READ_ENTRIES: Final = 1000
_READ_SEGMENTS: Final = 8


class MetadataService:
    """Reads committed checkpoints. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get_metadata(self, name: str, fqn_prefix: bytes = b"") -> Iterator[MetadataView]:
        """Yields the header, then extent segments by rank, then blocks in state-dict order.

        Items are at most about 1 MiB. Every step reads in a transaction of its own; none is open across a yield.
        Each ``next`` blocks on the database.

        Raises:
            NotFoundError: Nothing committed has this name.
            InvalidArgumentError: ``name`` is none.
        """
        with self._database.read() as connection:
            row = resolve_committed(connection, CheckpointName.parse(name))
            info = checkpoint_info(connection, row.id)
            structure_id = _structure_id(row)
            head = structure_rows.read_head(connection, structure_id)
            ids = structure_rows.read_tensor_ids(connection, structure_id).tolist()
            if fqn_prefix:
                ids = structure_rows.filter_tensors(connection, ids, fqn_prefix)
        yield HeaderView(info, head, row.metadata_header)
        yield from self._segments(row.id)
        yield from self._blocks(ids)

    def _segments(self, checkpoint_id: int) -> Iterator[SegmentView]:
        first_rank = 0
        while True:
            with self._database.read() as connection:
                found = registration_rows.read_segments(
                    connection, checkpoint_id, first_rank=first_rank, limit=_READ_SEGMENTS
                )
            for first_rank, payload in found:
                yield SegmentView(first_rank, payload)
            if len(found) < _READ_SEGMENTS:
                return
            first_rank += 1

    def _blocks(self, ids: Sequence[int]) -> Iterator[BlockView]:
        for at in range(0, len(ids), _READ_ENTRIES):
            with self._database.read() as connection:
                payloads = structure_rows.read_blocks(connection, ids[at : at + _READ_ENTRIES])
            yield from _grouped(payloads)

    def list_tensors(
        self, parent: str, *, page_size: int = 0, page_token: str = "", fqn_prefix: bytes = b""
    ) -> Page[TensorView]:
        """Returns one page of entries in state-dict order, with the number of entries in all.

        Raises:
            NotFoundError: Nothing committed has this name.
            InvalidArgumentError: A page size or token is not valid.
        """
        size = check_page_size(page_size)
        listing = ("tensors", parent, fqn_prefix.hex())
        with self._database.read() as connection:
            key = event_rows.read_token_key(connection)
            # The token names the checkpoint: `latest` may mean another one by the next page.
            after = read_token(key, listing, page_token)
            wanted = parent if after is None else str(after[0])
            row = resolve_committed(connection, CheckpointName.parse(wanted, "parent"))
            name = checkpoint_info(connection, row.id).name
            ids = structure_rows.read_tensor_ids(connection, _structure_id(row)).tolist()
            if fqn_prefix:
                ids = structure_rows.filter_tensors(connection, ids, fqn_prefix)
            first = 0 if after is None else int(after[1])
            views = _views(connection, row, ids[first : first + size])
        end = first + len(views)
        token = write_token(key, listing, (name, end)) if end < len(ids) else ""
        return Page(tuple(views), token, len(ids))


def _structure_id(row: CheckpointRow) -> int:
    if row.structure_id is None:
        raise RuntimeError(f"checkpoint {row.id} is committed and has no structure")
    return row.structure_id


def _grouped(payloads: Sequence[bytes]) -> Iterator[BlockView]:
    group: list[bytes] = []
    size_bytes = 0
    for payload in payloads:
        if group and size_bytes + len(payload) > _BLOCKS_BYTES:
            yield BlockView(tuple(group))
            group, size_bytes = [], 0
        group.append(payload)
        size_bytes += len(payload)
    if group:
        yield BlockView(tuple(group))


def _views(connection: Connection, row: CheckpointRow, ids: Sequence[int]) -> list[TensorView]:
    tensors = structure_rows.read_tensors(connection, ids)
    sizes = [tensor.fixed_bytes for tensor in tensors]
    if row.explicit or any(tensor.kind == EntryKind.BYTES for tensor in tensors):
        sizes = _located_sizes(connection, row, ids)
    return [_view(tensor, size) for tensor, size in zip(tensors, sizes, strict=True)]


def _located_sizes(connection: Connection, row: CheckpointRow, ids: Sequence[int]) -> list[int]:
    """Bytes of entries whose lengths are not all in the structure: those of this save."""
    structure = decode_blocks(structure_rows.read_blocks(connection, ids), RankFiles((), np.zeros(0, dtype=np.int64)))
    segments = registration_rows.read_segments(connection, row.id, limit=limits.MAX_WORLD_SIZE)
    located = locate(structure, [pair for _, payload in segments for pair in decode_segment(payload)])
    ends = np.concatenate([[0], np.cumsum(located.length)])
    firsts = structure.firsts
    sizes: list[int] = (ends[firsts[1:]] - ends[firsts[:-1]]).tolist()
    return sizes


def _view(tensor: TensorRow, size_bytes: int) -> TensorView:
    is_tensor = tensor.kind != EntryKind.BYTES
    return TensorView(
        fqn=tensor.fqn,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(json.loads(tensor.shape)) if is_tensor else (),
        chunk_count=tensor.chunk_count,
        size_bytes=size_bytes,
        tensor=is_tensor,
    )
