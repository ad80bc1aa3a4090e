"""Committed checkpoints of simulated ranks: in a directory, with ``.metadata`` and manifest, and in a catalogue.

No rank has written a byte of data: planning reads none. The manifest is folded from what each rank registers, as a
coordinator folds it; ``.metadata`` is the exporter's, which unpickles to what DCP would have dumped (proved by the
export's tests) and is the same bytes for whoever reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.layouts import Layout, written
from benchmarks.simulated import rank_plan, rank_structures
from benchmarks.workload import Workload
from shardbook._attempts import TreeFiles
from shardbook._publishing import export_dcp_metadata, publish
from shardbook._trees import open_tree
from shardbook.client import Client
from shardbook.core.directory import DCP_METADATA, MANIFEST
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.fold import fold
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord, StoredBlob
from shardbook.core.names import prefix_of
from shardbook.core.structure import BlobKind, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import Encoded, encode_table
from shardbook.core.wanted import Wanted
from shardbook.recording import record_attempt

#: What ranks save, and load.
Job = Workload | Layout

_RUN: Final = "bench/load"
_INCARNATION: Final = bytes(range(16))
_EXTENTS: Final = encode_extents(Extents())


@dataclass(frozen=True)
class Loadable:
    """A committed checkpoint.

    Attributes:
        directory: Where its manifest and ``.metadata`` are.
        ref: What the catalogue calls it.
        chunk_count: Its chunks.
        metadata_bytes: Size of ``.metadata``.
        manifest_bytes: Size of the manifest.
    """

    directory: Path
    ref: str
    chunk_count: int
    metadata_bytes: int
    manifest_bytes: int


def halved(job: Job) -> Job:
    """Returns the same tensors on half the ranks."""
    if isinstance(job, Layout):
        return replace(job, name=f"{job.name}, halved", shards=job.shards // 2)
    return Workload(job.ranks // 2, job.tensors, job.chunks // 2, job.layout)


@lru_cache(maxsize=8)
def _cached_table(workload: Workload) -> RankPlan:
    return rank_plan(workload, 0)


def plan_of_rank(job: Job, rank: int) -> RankPlan:
    """Returns the boxes of a rank."""
    if isinstance(job, Layout):
        return job.plan(rank)
    first = _cached_table(job)
    return replace(first, offsets=job.offsets(rank))


def question_of(plan: RankPlan, tensors: slice = slice(None)) -> Wanted:
    """Returns what a rank with these boxes asks, or asks of some tensors: one box of each, its shape stated."""
    table = plan.table
    count = len(plan.sizes[tensors])
    return Wanted(
        fqns=table.fqns[tensors],
        ndims=table.ndims[tensors],
        stated=np.ones(count, dtype=np.bool_),
        shapes=table.shapes[tensors],
        whole=np.zeros(count, dtype=np.bool_),
        box_counts=np.ones(count, dtype=np.int64),
        offsets=plan.offsets[tensors],
        sizes=plan.sizes[tensors],
    )


def save(job: Job, directory: Path, step: int) -> tuple[Loadable, Manifest]:
    """Leaves in ``directory`` what a save by ``job`` describes it with."""
    prefix = prefix_of(_INCARNATION, 1)
    identity = AttemptIdentity(
        _RUN, step=step, incarnation=_INCARNATION, attempt=1, world_size=job.ranks, prefix=prefix
    )
    folded = fold(list(_records(job, identity)))
    files = TreeFiles(open_tree(str(directory)), str(directory))
    problems = publish(files, folded, partial(export_dcp_metadata, str(directory)))
    if problems:
        raise RuntimeError(problems[0])
    metadata_bytes, manifest_bytes = ((directory / name).stat().st_size for name in (DCP_METADATA, MANIFEST))
    chunk_count = int(folded.structure.chunk_counts.sum())
    loadable = Loadable(directory, f"{_RUN}@{step}", chunk_count, metadata_bytes, manifest_bytes)
    return loadable, folded.manifest


def record(address: str, loadable: Loadable, manifest: Manifest) -> None:
    """Records a checkpoint in the catalogue, as ``shardbook sync`` does; idempotent."""
    record_attempt(Client(address, timeout_s=120), manifest, str(loadable.directory), recovered=True)


def _records(job: Job, identity: AttemptIdentity) -> Iterator[RegistrationRecord]:
    encoded: dict[int, Encoded] = {}
    for rank, structure in enumerate(_structures(job)):
        table = structure.plan.table
        if id(table) not in encoded:
            encoded[id(table)] = encode_table(table)
        table_blob = encoded[id(table)]
        plan_blob = encode_plan(structure.plan, table_blob.digest)
        own = encode_structure(structure, plan_blob.digest)
        kinds = ((BlobKind.TABLE, table_blob), (BlobKind.PLAN, plan_blob), (BlobKind.STRUCTURE, own))
        blobs = tuple(StoredBlob(kind, blob.digest, blob.payload) for kind, blob in kinds)
        yield RegistrationRecord(identity, rank, own.digest, _EXTENTS, b"", blobs)


def _structures(job: Job) -> Iterator[RankStructure]:
    if isinstance(job, Workload):
        yield from rank_structures(job)
        return
    for rank in range(job.ranks):
        plan = job.plan(rank)
        # What planning decides: the first of the ranks that hold a tensor in common writes it.
        first_of_group = rank % job.tensor_parallel == 0
        cut = job.stage[rank // (job.shards * job.tensor_parallel) % job.stages].cut >= 0
        yield written(plan, np.flatnonzero(cut | first_of_group))
