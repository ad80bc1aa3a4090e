"""The limits on requests fit together, and leave room for what an honest rank may have to send."""

from __future__ import annotations

import numpy as np

from shardbook._channel import MAX_REQUEST_BYTES
from shardbook.core import limits
from shardbook.core.dtype import dtype_code
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.structure import FileName, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import EntryKind, TensorTable, encode_table
from shardbook_server.settings import Settings

_CHUNKS = 1_000_000


def test_what_may_be_sent_at_all_is_what_a_server_takes() -> None:
    """The blobs of a call, extents and properties beside them, and a page for the rest."""
    largest = limits.MAX_BLOB_BYTES + 2 * limits.MAX_EXTENTS_BYTES + (64 << 10)
    assert largest <= Settings.model_fields["max_message_bytes"].default <= MAX_REQUEST_BYTES


def test_a_million_irregular_compressed_chunks_of_one_rank_fit() -> None:
    """No two boxes of a size, no order in the file, every length its own: the worst that was thought of."""
    random = np.random.default_rng(0)
    cuts = np.sort(random.choice(8 * _CHUNKS, _CHUNKS - 1, replace=False)) + 1
    starts = np.concatenate([[0], cuts])
    rows = np.diff(np.append(starts, 8 * _CHUNKS + 1))
    table = TensorTable(
        fqns=("w",),
        kinds=np.array([EntryKind.SHARD], np.uint8),
        dtypes=np.array([dtype_code("float32")], np.uint8),
        layouts=np.zeros(1, np.uint8),
        memory_formats=np.zeros(1, np.uint8),
        ndims=np.array([2]),
        shapes=np.array([[8 * _CHUNKS + 1, 64]]),
        key_paths=None,
    )
    offsets = np.stack([starts, np.zeros_like(starts)], axis=1)
    sizes = np.stack([rows, np.full_like(rows, 64)], axis=1)
    plan = RankPlan(table, np.zeros(_CHUNKS, np.int64), offsets, sizes)
    lengths = random.integers(1_000, 100_000, _CHUNKS)
    structure = RankStructure(
        plan,
        kept=np.arange(_CHUNKS),
        files=(FileName(True, "0.distcp"),),
        file_items=np.array([_CHUNKS]),
        order=random.permutation(_CHUNKS),
        lengths=rows * 256 + 1_513,
    )
    encoded = encode_plan(plan, encode_table(table).digest)
    extents = Extents(lengths=lengths, starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    sent = (
        len(encoded.payload),
        len(encode_structure(structure, encoded.digest).payload),
        len(encode_extents(extents)),
    )
    assert max(sent[:2]) <= limits.MAX_BLOB_BYTES
    assert sent[2] <= limits.MAX_EXTENTS_BYTES
    # Why 4 MiB for a request would not do.
    assert sum(sent) > 4 << 20
