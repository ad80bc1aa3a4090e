"""Checkpoint directories as saves leave them: records, manifests and nothing else, without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shardbook.core import directory as files
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.fold import fold
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord, StoredBlob
from shardbook.core.names import prefix_of
from shardbook.core.structure import BlobKind, FileName, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import EntryKind, TensorTable, encode_table

ROWS = 2
COLUMNS = 3


def identity(
    step: int = 1500,
    *,
    run: str = "llm/8b",
    session: int = 0,
    incarnation: bytes = bytes(range(1, 17)),
    attempt: int = 1,
    world_size: int = 4,
    write_time_s: float = 1_700_000_000.0,
) -> AttemptIdentity:
    """Returns the identity of an attempt with the prefix that it must have."""
    return AttemptIdentity(
        run=run,
        step=step,
        session=session,
        incarnation=incarnation,
        attempt=attempt,
        world_size=world_size,
        prefix=prefix_of(incarnation, attempt),
        write_time_s=write_time_s,
    )


def record(who: AttemptIdentity, rank: int, *, first_row: int | None = None) -> RegistrationRecord:
    """Returns the record of a rank that wrote its rows of one float32 matrix; other rows when told so."""
    table = TensorTable(
        fqns=("model.w",),
        kinds=np.array([EntryKind.SHARD], np.uint8),
        dtypes=np.ones(1, np.uint8),
        layouts=np.zeros(1, np.uint8),
        memory_formats=np.zeros(1, np.uint8),
        ndims=np.full(1, 2, np.int64),
        shapes=np.array([[ROWS * who.world_size, COLUMNS]], np.int64),
        key_paths=None,
    )
    row = ROWS * rank if first_row is None else first_row
    plan = RankPlan(table, np.zeros(1, np.int64), np.array([[row, 0]]), np.array([[ROWS, COLUMNS]]))
    structure = RankStructure(
        plan,
        kept=np.zeros(1, np.int64),
        files=(FileName(True, "0.distcp"),),
        file_items=np.ones(1, np.int64),
        order=np.zeros(1, np.int64),
        lengths=np.full(1, 4 * ROWS * COLUMNS, np.int64),
    )
    encoded_table = encode_table(table)
    encoded_plan = encode_plan(plan, encoded_table.digest)
    encoded = encode_structure(structure, encoded_plan.digest)
    return RegistrationRecord(
        identity=who,
        rank=rank,
        structure_digest=encoded.digest,
        extents=encode_extents(Extents(variable_lengths=np.zeros(0, np.int64))),
        volatile=b"",
        blobs=(
            StoredBlob(BlobKind.TABLE, encoded_table.digest, encoded_table.payload),
            StoredBlob(BlobKind.PLAN, encoded_plan.digest, encoded_plan.payload),
            StoredBlob(BlobKind.STRUCTURE, encoded.digest, encoded.payload),
        ),
        host=f"node-{rank}",
    )


def manifest(who: AttemptIdentity) -> Manifest:
    """Returns the manifest of a whole attempt."""
    return fold([record(who, rank) for rank in range(who.world_size)]).manifest


@dataclass(frozen=True)
class CheckpointDirectory:
    """A checkpoint directory under construction."""

    path: Path

    def add_records(self, who: AttemptIdentity, *, without: tuple[int, ...] = ()) -> CheckpointDirectory:
        """Leaves the records of all ranks but some."""
        for rank in range(who.world_size):
            if rank not in without:
                self._put(files.record_path(who.prefix, rank), record(who, rank).to_bytes())
        return self

    def add_record(self, one: RegistrationRecord) -> CheckpointDirectory:
        """Leaves one record."""
        self._put(files.record_path(one.identity.prefix, one.rank), one.to_bytes())
        return self

    def add_altered(self, who: AttemptIdentity, **changed: object) -> CheckpointDirectory:
        """Leaves a record whose identity says something that no identity of ours would."""
        whole = record(who, 0)
        altered = object.__new__(AttemptIdentity)
        for name, value in {**vars(who), **changed}.items():
            object.__setattr__(altered, name, value)
        self._put(files.record_path(who.prefix, 0), replace(whole, identity=altered).to_bytes())
        return self

    def add_manifest(self, who: AttemptIdentity) -> CheckpointDirectory:
        """Leaves a manifest, as after a commit."""
        content = manifest(who).to_bytes()
        self._put(files.manifest_path(who.prefix), content)
        self._put(files.MANIFEST, content)
        return self

    def _put(self, path: str, content: bytes) -> None:
        target = self.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
