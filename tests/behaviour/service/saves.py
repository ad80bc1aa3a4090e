"""Saves as ranks would make them, without torch: plans, structures and the calls of a job."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from shardbook.core.dtype import ITEMSIZES, dtype_code
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.structure import (
    BlobKind,
    FileName,
    RankPlan,
    RankStructure,
    encode_plan,
    encode_structure,
)
from shardbook.core.table import Encoded, EntryKind, TensorTable, encode_table
from shardbook.errors import ShardbookError
from shardbook_server.service.blobs import CheckedBlobs
from shardbook_server.service.plans import PlanEntry
from shardbook_server.service.registration import RegistrationEntry
from shardbook_server.service.services import Services
from shardbook_server.service.types import (
    AttemptKey,
    AttemptLocation,
    BlobUpload,
    OnLive,
    PlanSubmission,
    RecordRequest,
    Registration,
    SessionStart,
    ShardRegistration,
)
from shardbook_server.service.views import CheckpointInfo, PlanAnswer, PlanState, RegistrationAnswer, SessionInfo

T = TypeVar("T")

RUN = "projects/llm/runs/8b"


@dataclass(frozen=True)
class Model:
    """A model sharded by rows, with one replicated tensor and one bytes entry that every rank holds.

    Attributes:
        world_size: Ranks.
        sharded: Sharded tensors.
        rows: Rows of a tensor a rank.
        overlap: Rows by which rank 1's boxes of the first tensor reach into rank 0's.
        hole: Rows that rank 1 leaves out of the first tensor.
    """

    world_size: int
    sharded: int = 3
    rows: int = 2
    overlap: int = 0
    hole: int = 0

    def table(self) -> TensorTable:
        """What each rank's state dict holds by name."""
        count = self.sharded
        return TensorTable(
            fqns=(*(f"model.w{t}" for t in range(count)), "model.norm", "extra"),
            kinds=np.array([EntryKind.SHARD] * count + [EntryKind.TENSOR, EntryKind.BYTES], np.uint8),
            dtypes=np.array([dtype_code("float32")] * (count + 1) + [0], np.uint8),
            layouts=np.zeros(count + 2, np.uint8),
            memory_formats=np.zeros(count + 2, np.uint8),
            ndims=np.array([2] * count + [1, 0], np.int64),
            shapes=np.array([[self.rows * self.world_size, 4]] * count + [[4, 1], [1, 1]], np.int64),
            key_paths=None,
        )

    def plan(self, rank: int) -> RankPlan:
        """A rank's items before deduplication."""
        count = self.sharded
        offsets = np.array([[rank * self.rows, 0]] * count + [[0, 0], [0, 0]], np.int64)
        sizes = np.array([[self.rows, 4]] * count + [[4, 1], [1, 1]], np.int64)
        if rank == 1:
            offsets[0, 0] -= self.overlap
            sizes[0, 0] += self.overlap - self.hole
        return RankPlan(self.table(), np.arange(count + 2), offsets, sizes)

    def structure(self, rank: int, drop: bytes = b"") -> RankStructure:
        """What a rank writes when it drops the items of a decision."""
        plan = self.plan(rank)
        dropped = np.zeros(plan.item_count, np.bool_)
        if drop:
            dropped = np.unpackbits(np.frombuffer(drop, np.uint8))[: plan.item_count].astype(np.bool_)
        kept = np.flatnonzero(~dropped).astype(np.int64)
        raw = plan.sizes[kept].prod(axis=1) * ITEMSIZES[plan.table.dtypes[plan.entry[kept]]]
        lengths = np.where(plan.variable[kept], 0, raw + 1500)
        files = (FileName(ranked=True, name="0.distcp"),) if len(kept) else ()
        file_items = np.array([len(kept)] if files else [], np.int64)
        return RankStructure(plan, kept, files, file_items, np.arange(len(kept)), lengths)


@dataclass(frozen=True)
class RankBlobs:
    """What a rank sends: its three blobs, and extents with a length for its bytes entry if it kept it."""

    rank: int
    table: Encoded
    plan: Encoded
    structure: Encoded
    extents: bytes

    def uploads(self, *kinds: BlobKind) -> list[BlobUpload]:
        """The blobs of some kinds, or all."""
        by_kind = {BlobKind.TABLE: self.table, BlobKind.PLAN: self.plan, BlobKind.STRUCTURE: self.structure}
        return [BlobUpload(kind, by_kind[kind].payload) for kind in kinds or tuple(BlobKind)]

    def registration(self) -> ShardRegistration:
        """What the rank registers."""
        return ShardRegistration(self.rank, self.structure.digest, self.extents)


def blobs_of(model: Model, rank: int, drop: bytes = b"", bytes_length: int = 900) -> RankBlobs:
    """Returns what ``rank`` sends after a decision."""
    structure = model.structure(rank, drop)
    table = encode_table(structure.plan.table)
    plan = encode_plan(structure.plan, table.digest)
    variable = np.full(int(structure.variable.sum()), bytes_length, np.int64)
    return RankBlobs(rank, table, plan, encode_structure(structure, plan.digest), encode_extents(Extents(variable)))


def whole(model: Model, bytes_length: int = 900) -> list[RankBlobs]:
    """Returns what ranks send that could not plan: all of them write everything."""
    return [blobs_of(model, rank, bytes_length=bytes_length) for rank in range(model.world_size)]


@dataclass
class Job:
    """A training job: its identity, and the calls its ranks make."""

    services: Services
    model: Model
    run: str = RUN
    part: str = ""
    incarnation: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    session: int = 0
    job_id: str = ""

    def start(
        self, job_id: str = "", on_live: OnLive = OnLive.FAIL, resumed_from: str = "", **more: Any
    ) -> SessionInfo:
        """Starts the job's session; it keeps the id that it was given first."""
        self.job_id = self.job_id or job_id
        request = SessionStart(
            self.run, self.part, self.incarnation, self.job_id, on_live, resumed_from, host="node0", user="ada", **more
        )
        info = self.services.sessions.start(request)
        self.session = info.session
        return info

    def key(self, step: int, attempt: int = 1) -> AttemptKey:
        """Names an attempt of the job."""
        return AttemptKey(self.run, self.part, step, self.session, self.incarnation, attempt, self.model.world_size)

    def location(self, step: int, attempt: int = 1) -> AttemptLocation:
        """Where an attempt's files are."""
        return AttemptLocation(f"lustre:llm/step-{step}", f"{self.incarnation.hex()[:12]}-a{attempt}")

    def plan_entry(self, step: int, blobs: RankBlobs, checked: CheckedBlobs | None = None) -> PlanEntry:
        """One rank's PlanSave."""
        submission = PlanSubmission(
            self.key(step), self.location(step), blobs.rank, blobs.plan.digest, host=f"node{blobs.rank}"
        )
        return PlanEntry(submission, checked or CheckedBlobs())

    def entry(
        self, step: int, blobs: RankBlobs, checked: CheckedBlobs | None = None, attempt: int = 1
    ) -> RegistrationEntry:
        """One rank's RegisterShards."""
        registration = Registration(self.key(step, attempt), self.location(step, attempt), blobs.registration())
        return RegistrationEntry(registration, checked or CheckedBlobs())

    def check(self, blobs: RankBlobs, *kinds: BlobKind) -> CheckedBlobs:
        """Uploads a rank's blobs as the edge does before a batch."""
        return self.services.blobs.check(self.run.split("/")[1], blobs.uploads(*kinds))

    def plan(self, step: int, ranks: Iterable[RankBlobs]) -> list[PlanAnswer]:
        """Plans of ranks, with their tables and plans; raises the first refusal."""
        entries = [self.plan_entry(step, blobs, self.check(blobs, BlobKind.TABLE, BlobKind.PLAN)) for blobs in ranks]
        return fine(self.services.plans.plan_batch(entries))

    def decide(self, step: int) -> list[bytes]:
        """Plans of all ranks, to the decision."""
        answers = self.plan(step, whole(self.model))
        decided = [self.services.plans.decide(answer.checkpoint_id, rank) for rank, answer in enumerate(answers)]
        assert [PlanState.DECIDED] * self.model.world_size == [answer.state for answer in decided]
        return [answer.drop for answer in decided]

    def register(self, step: int, ranks: Iterable[RankBlobs], attempt: int = 1) -> list[RegistrationAnswer]:
        """Registrations of ranks, with all their blobs; raises the first refusal."""
        entries = [self.entry(step, blobs, self.check(blobs), attempt) for blobs in ranks]
        return fine(self.services.registrations.register_batch(entries))

    def commit(self, step: int, attempt: int = 1) -> CheckpointInfo:
        """Commits an attempt."""
        return self.services.commits.commit(self.key(step, attempt))

    def save(self, step: int, attempt: int = 1) -> CheckpointInfo:
        """A save in which every rank writes everything it holds, to the commit."""
        self.register(step, whole(self.model), attempt)
        return self.commit(step, attempt)

    def record_request(self, step: int, ranks: Sequence[RankBlobs], **changes: Any) -> RecordRequest:
        """A RecordCheckpoint call with all of ``ranks``, as sync makes it."""
        request = RecordRequest(
            self.key(step),
            self.location(step),
            tuple(blobs.registration() for blobs in ranks),
            self.model.world_size,
            complete=True,
            recovered=True,
        )
        return replace(request, **changes)

    def record(self, step: int, **changes: Any) -> CheckpointInfo:
        """Records a whole attempt, as sync does."""
        ranks = whole(self.model)
        checked = self.services.blobs.check(
            self.run.split("/")[1], [upload for blobs in ranks for upload in blobs.uploads()]
        )
        answer = self.services.records.record(self.record_request(step, ranks, **changes), checked)
        assert answer.checkpoint is not None
        return answer.checkpoint


def fine(verdicts: Iterable[T | ShardbookError]) -> list[T]:
    """Returns the answers of a batch; raises the first refusal."""
    answers: list[T] = []
    for verdict in verdicts:
        if isinstance(verdict, ShardbookError):
            raise verdict
        answers.append(verdict)
    return answers
