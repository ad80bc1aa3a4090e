"""torch's ``Metadata`` of any kind that Shardbook stores, for properties; and its columns, as the service has them."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shardbook.core.assembly import assemble
from shardbook.core.blocks import decode_blocks, encode_blocks
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.extents import decode_segment, encode_extents, encode_segment, encode_volatile
from shardbook.core.head import MetadataHeader, decode_head, decode_metadata_header, encode_head
from shardbook.core.locate import Located, locate
from shardbook.core.structure import decode_plan, decode_structure, encode_plan, encode_structure
from shardbook.core.table import decode_table, encode_table
from shardbook.dcp import slices

#: Every dtype and layout of this torch, as ``str`` has them.
DTYPES = sorted({str(v) for v in vars(torch).values() if isinstance(v, torch.dtype)})
LAYOUTS = sorted({str(v) for v in vars(torch).values() if isinstance(v, torch.layout)})
_FORMATS = [torch.contiguous_format, torch.channels_last, torch.preserve_format, torch.channels_last_3d]


def stored_columns(metadata: Metadata) -> tuple[CheckpointStructure, Located, MetadataHeader]:
    """Sends ``metadata`` through every stored format, as the service does."""
    sliced = slices.slice_metadata(metadata)
    structures = []
    registrations = []
    for one in sliced.slices:
        table = encode_table(one.structure.plan.table)
        plan = encode_plan(one.structure.plan, table.digest)
        structure = encode_structure(one.structure, plan.digest)
        decoded_table, _ = decode_table(table.payload)
        decoded_plan, _ = decode_plan(plan.payload, _only(table.digest, decoded_table))
        decoded, _ = decode_structure(structure.payload, _only(plan.digest, decoded_plan))
        structures.append(decoded)
        registrations.append((encode_extents(one.extents), encode_volatile(one.requires_grad, one.pin_memory)))
    assembled = assemble(structures, np.arange(len(structures)))
    head = decode_head(encode_head(assembled))
    blocks = decode_blocks([block.payload for block in encode_blocks(assembled)], head.rank_files)
    located = locate(blocks, decode_segment(encode_segment(registrations)))
    object.__setattr__(blocks, "key_paths", head.key_paths)
    return blocks, located, decode_metadata_header(sliced.header)


def _only(digest: bytes, value: Any) -> Any:
    return {digest: value}.__getitem__


_names = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "a\0b", "\ud800 lone", "ü.weight", "x" * 10_000, "a/../b", "\u202e"]),
)
_flags = st.booleans()


@st.composite
def _splits(draw: st.DrawFn, size: int) -> list[int]:
    """Sizes of consecutive pieces of a dimension, empty ones among them."""
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    edges = [0, *cuts, size]
    return [after - before for before, after in pairwise(edges)]


@st.composite
def _chunks(draw: st.DrawFn, shape: tuple[int, ...]) -> list[ChunkStorageMetadata]:
    """A tiling of a tensor, in any order; none twice."""
    if not shape:
        return [ChunkStorageMetadata(torch.Size(), torch.Size())]
    dim = draw(st.integers(0, len(shape) - 1))
    boxes = []
    at = 0
    for size in draw(_splits(shape[dim])):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = at, size
        # An empty piece begins where the next one does: DCP keeps one chunk a place.
        if size or at == shape[dim]:
            boxes.append((tuple(offsets), tuple(sizes)))
        at += size
    distinct = draw(st.permutations(sorted(set(boxes))))
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in distinct]


@st.composite
def _tensors(draw: st.DrawFn) -> TensorStorageMetadata:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    empty = 0 in shape and draw(_flags)
    chunks = [] if empty else draw(_chunks(shape))
    properties = TensorProperties(
        dtype=getattr(torch, draw(st.sampled_from(DTYPES)).removeprefix("torch.")),
        layout=getattr(torch, draw(st.sampled_from(LAYOUTS)).removeprefix("torch.")),
        requires_grad=bool(chunks) and draw(_flags),
        memory_format=draw(st.sampled_from(_FORMATS)),
        pin_memory=bool(chunks) and draw(_flags),
    )
    return TensorStorageMetadata(properties, torch.Size(shape), chunks)


@st.composite
def _infos(draw: st.DrawFn) -> _StorageInfo:
    info = _StorageInfo(
        draw(st.sampled_from(["__0_0.distcp", "__1_0.distcp", "deep/er/__12_3.distcp", "ü ", "a\nb"])),
        draw(st.integers(0, 2**40)),
        draw(st.integers(0, 2**40)),
        draw(st.sampled_from([None, ["stream.zstd/1"], ["b", "a"], []])),
    )
    # What pickle leaves out: attributes that are None.
    return pickle.loads(pickle.dumps(info)) if draw(_flags) else info


@st.composite
def _storage_metas(draw: st.DrawFn) -> StorageMeta:
    texts = st.none() | st.text(max_size=5) | st.just("\ud800")
    meta = StorageMeta(
        checkpoint_id=draw(texts | st.just(Path("/ckpt/step-1500"))),
        save_id=draw(texts),
        load_id=draw(texts),
        modules=draw(st.lists(st.text(max_size=3), max_size=2)),
    )
    if draw(_flags):
        del meta.modules
    return meta


@st.composite
def any_metadata(draw: st.DrawFn) -> Metadata:
    """Metadata with anything that DCP may put into it, and Shardbook stores."""
    fqns = draw(st.lists(_names, max_size=4, unique=True))
    entries: dict[str, Any] = {fqn: draw(st.one_of(_tensors(), st.builds(BytesStorageMetadata))) for fqn in fqns}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for fqn, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            storage[MetadataIndex(fqn, index=draw(st.none() | st.integers(0, 3)))] = draw(_infos())
            continue
        for position, chunk in enumerate(entry.chunks):
            hint = draw(st.sampled_from([position, position, None, 17]))
            storage.setdefault(MetadataIndex(fqn, chunk.offsets, hint), draw(_infos()))
    segments = st.text(max_size=4) | st.integers(-5, 2**40)
    paths = st.dictionaries(_names, st.lists(segments, max_size=3).map(tuple), max_size=3)
    metadata = Metadata(
        entries,
        planner_data=draw(st.none() | paths),
        storage_data=draw(st.sampled_from([storage, storage, None])),
        storage_meta=draw(st.none() | _storage_metas()),
        version=draw(st.none() | st.text(max_size=6)),
    )
    if draw(_flags):
        del metadata.version  # as in files by older releases of torch
    return metadata
