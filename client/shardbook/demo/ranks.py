"""What four ranks do that save: everything but torch. The steps are those of ``shardbook.dcp.save``."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shardbook.catalog import Checkpoint
from shardbook.client import Client
from shardbook.core import directory as files
from shardbook.core.dtype import dtype_code
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.manifest import AttemptIdentity, RegistrationRecord, StoredBlob
from shardbook.core.names import RunName, prefix_of
from shardbook.core.structure import BlobKind, FileName, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import EntryKind, TensorTable, encode_table
from shardbook.demo.archive import saved_tensor
from shardbook.recording import attempt_key, blob_source, message_of, registration_of
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptLocation, Description

WORLD_SIZE: Final = 4
#: Shapes by name; each rank has as many rows as any other.
SHAPES: Final = {"model.embed.weight": (64, 16), "model.head.weight": (16, 64)}
_FLOAT32: Final = dtype_code("float32")
_COMMIT_S: Final = 20.0


def expected(name: str, step: int) -> npt.NDArray[np.float32]:
    """Returns the values of a tensor at a step."""
    rows, columns = SHAPES[name]
    return (np.arange(rows * columns, dtype=np.float32) / np.float32(step)).reshape(rows, columns)


class DemoJob:
    """A training job of four ranks, which are threads here. For one thread.

    Args:
        run: Short form of its run.
        root: Directory that its checkpoints are in.
        client: The server.
    """

    def __init__(self, run: str, root: Path, client: Client) -> None:
        self._run, self._root, self._client = run, root, client
        self._incarnation = uuid.uuid4().bytes
        self._session = 0

    def start(self) -> int:
        """Starts the session, the job's only collective; returns its number."""
        answer = self._client.start_session(
            pb.StartSessionRequest(
                run=str(RunName.parse(self._run)),
                incarnation=self._incarnation,
                job_id="demo",
                on_live=pb.ON_LIVE_TAKEOVER,
                host="node-0",
                user="demo",
            )
        )
        self._session = answer.session
        return self._session

    def save(self, step: int, *, labels: dict[str, str], metrics: dict[str, float]) -> Checkpoint:
        """Saves by all ranks at once, without one knowing of another, and commits."""
        who = self._identity(step)
        with ThreadPoolExecutor(WORLD_SIZE) as ranks:
            list(ranks.map(lambda rank: self._save_rank(who, rank), range(WORLD_SIZE)))
        description = Description(labels=labels, metrics=metrics)
        request = pb.CommitCheckpointRequest(key=attempt_key(who), description=description)
        return Checkpoint.of(self._client.commit_when_complete(request, timeout_s=_COMMIT_S).checkpoint)

    def save_in_part(self, step: int, *, without: int) -> None:
        """Saves by all ranks but one, which has planned and then says nothing more."""
        who = self._identity(step)
        for rank in range(WORLD_SIZE):
            self._plan(self._record(who, rank, {}))
        for rank in range(WORLD_SIZE):
            if rank != without:
                self._save_rank(who, rank)

    def save_alone(self, step: int) -> Path:
        """Saves without the server: data and a record of every rank; returns the directory."""
        who = self._identity(step)
        for rank in range(WORLD_SIZE):
            record = self._record(who, rank, self._written(who, rank))
            _put(self._directory(step) / files.record_path(who.prefix, rank), record.to_bytes())
        return self._directory(step)

    # ------------------------------------------------------------------ one rank

    def _save_rank(self, who: AttemptIdentity, rank: int) -> None:
        began_s = time.monotonic()
        record = self._record(who, rank, self._written(who, rank))
        written_s = time.monotonic()
        _put(self._directory(who.step) / files.record_path(who.prefix, rank), record.to_bytes())
        took_ms = [1, round((written_s - began_s) * 1e3), round((time.monotonic() - written_s) * 1e3)]
        registration = registration_of(record, took_ms)
        request = pb.RegisterShardsRequest(
            key=attempt_key(who), location=self._location(who), registration=registration, host=record.host
        )
        self._client.register_shards(request, blob_source(record.blobs))

    def _written(self, who: AttemptIdentity, rank: int) -> dict[str, int]:
        """Writes the rank's file; returns the lengths of what is in it, by name."""
        items = {name: saved_tensor(values) for name, values in _shards(rank, who.step).items()}
        _put(self._directory(who.step) / who.prefix / f"__{rank}_0.distcp", b"".join(items.values()))
        return {name: len(content) for name, content in items.items()}

    def _plan(self, record: RegistrationRecord) -> None:
        held = {blob.kind: blob for blob in record.blobs}
        wanted = (BlobKind.TABLE, BlobKind.PLAN)
        self._client.plan_save(
            pb.PlanSaveRequest(
                key=attempt_key(record.identity),
                location=self._location(record.identity),
                rank=record.rank,
                plan_digest=held[BlobKind.PLAN].digest,
                blobs=[message_of(held[kind]) for kind in wanted],
                host=record.host,
            )
        )

    def _record(self, who: AttemptIdentity, rank: int, lengths: dict[str, int]) -> RegistrationRecord:
        """What a rank says of its share; without lengths, of what it is going to write."""
        count = len(SHAPES)
        shapes = np.array(list(SHAPES.values()), np.int64)
        table = TensorTable(
            fqns=tuple(SHAPES),
            kinds=np.full(count, EntryKind.SHARD, np.uint8),
            dtypes=np.full(count, _FLOAT32, np.uint8),
            layouts=np.zeros(count, np.uint8),
            memory_formats=np.zeros(count, np.uint8),
            ndims=np.full(count, 2, np.int64),
            shapes=shapes,
            key_paths=None,
        )
        sizes = shapes // np.array([WORLD_SIZE, 1], np.int64)
        offsets = sizes * np.array([rank, 0], np.int64)
        plan = RankPlan(table, np.arange(count), offsets, sizes)
        structure = RankStructure(
            plan,
            kept=np.arange(count),
            files=(FileName(True, "0.distcp"),),
            file_items=np.array([count]),
            order=np.arange(count),
            lengths=np.array([lengths.get(name, 0) for name in SHAPES], np.int64),
        )
        encoded_table = encode_table(table)
        encoded_plan = encode_plan(plan, encoded_table.digest)
        encoded = encode_structure(structure, encoded_plan.digest)
        blobs = {BlobKind.TABLE: encoded_table, BlobKind.PLAN: encoded_plan, BlobKind.STRUCTURE: encoded}
        return RegistrationRecord(
            identity=who,
            rank=rank,
            structure_digest=encoded.digest,
            extents=encode_extents(Extents(variable_lengths=np.zeros(0, np.int64))),
            volatile=b"",
            blobs=tuple(StoredBlob(kind, one.digest, one.payload) for kind, one in blobs.items()),
            host=f"node-{rank // 2}",
        )

    # ------------------------------------------------------------------ names

    def _identity(self, step: int) -> AttemptIdentity:
        return AttemptIdentity(
            run=self._run,
            step=step,
            session=self._session,
            incarnation=self._incarnation,
            attempt=1,
            world_size=WORLD_SIZE,
            prefix=prefix_of(self._incarnation, 1),
            write_time_s=time.time(),
        )

    def _directory(self, step: int) -> Path:
        return self._root / f"step-{step}"

    def _location(self, who: AttemptIdentity) -> AttemptLocation:
        return AttemptLocation(location=str(self._directory(who.step)), prefix=who.prefix)


def _shards(rank: int, step: int) -> dict[str, npt.NDArray[np.float32]]:
    """A rank's rows of every tensor."""
    return {name: np.split(expected(name, step), WORLD_SIZE)[rank] for name in SHAPES}


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


__all__ = ["SHAPES", "WORLD_SIZE", "DemoJob", "expected"]
