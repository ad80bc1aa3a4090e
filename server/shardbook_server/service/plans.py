"""Plans of an attempt's ranks, and which rank writes what more than one could write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardbook.core.structure import BlobKind
from shardbook.errors import InvalidArgumentError, NotFoundError, ShardbookError
from shardbook_server.observer import SILENT, Observer
from shardbook_server.service.admission import MemoryBudget
from shardbook_server.service.attempts import Ask, Attempt, closed_error, open_attempts
from shardbook_server.service.batches import Want, WantedBlobs, run_by_run_when_busy
from shardbook_server.service.blobs import NO_BLOBS, BlobService, CheckedBlobs, unknown_refs
from shardbook_server.service.checks import check_rank
from shardbook_server.service.decisions import DecisionKey, DecisionService, Question
from shardbook_server.service.lru import BoundedCache
from shardbook_server.service.types import BlobRef, PlanSubmission
from shardbook_server.service.verdicts import other_content
from shardbook_server.service.views import CheckpointState, PlanAnswer, PlanState
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import plans as plan_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.plans import PlanRow

#: Attempts whose decision is remembered.
_ATTEMPT_COUNT: Final = 4096


@dataclass(frozen=True)
class PlanEntry:
    """One PlanSave call in a batch: the submission and its uploads, checked."""

    submission: PlanSubmission
    blobs: CheckedBlobs = NO_BLOBS

    @property
    def ask(self) -> Ask:
        """The attempt it is about."""
        return self.submission.key, self.submission.location

    @property
    def project(self) -> str:
        """The project it is in."""
        return self.submission.key.part_name.run.project

    @property
    def wanted(self) -> BlobRef:
        """The plan that has to be stored."""
        return BlobRef(BlobKind.PLAN, self.submission.plan_digest)


class PlanService:
    """Takes plans and decides what is dropped. Thread-safe."""

    def __init__(
        self,
        database: Database,
        blobs: BlobService,
        memory: MemoryBudget,
        *,
        lease_ttl_s: float,
        observer: Observer = SILENT,
    ) -> None:
        """Starts with no decision in memory."""
        self._database = database
        self._blobs = blobs
        self._lease_ttl_s = lease_ttl_s
        self._observer = observer
        self._decisions = DecisionService(database, blobs, memory)
        # By key and time of the attempt: a database that lost its last commits hands out the same keys again.
        self._by_attempt: BoundedCache[tuple[int, int], DecisionKey] = BoundedCache(_ATTEMPT_COUNT)
        self._planned_us: BoundedCache[tuple[int, int], int] = BoundedCache(_ATTEMPT_COUNT)

    def plan_batch(self, entries: Sequence[PlanEntry]) -> list[PlanAnswer | ShardbookError]:
        """Submits plans in one transaction; one verdict an entry, in order.

        Answers DECIDED only when the decision is at hand; else WAITING, also when every rank is in (then call
        ``decide``). Submitting the same plan again is the way to ask again. Uploads are stored also when others are
        still lacking.

        Verdicts: SessionUnknownError, SessionFencedError, CheckpointClosedError, AlreadyExistsError (the rank
        planned otherwise before), InvalidArgumentError (location, prefix or world size differ from the first call's).

        Raises:
            ShardbookError: The whole batch failed (the database cannot be written); nothing was stored.
        """
        return run_by_run_when_busy(entries, lambda entry: entry.submission.key.part_name.run, self._plan_batch)

    def _plan_batch(self, entries: Sequence[PlanEntry]) -> list[PlanAnswer | ShardbookError]:
        runs = {entry.submission.key.part_name.run for entry in entries}
        with self._blobs.doubted(), self._database.write(runs, exclusive=False) as connection:
            now_us = self._database.now_us(connection)
            attempts = open_attempts(connection, {entry.ask: None for entry in entries}, now_us, self._lease_ttl_s)
            fine = {at: found for at, entry in enumerate(entries) if isinstance(found := attempts[entry.ask], Attempt)}
            known = self._wanted(connection, entries, fine, now_us)
            stored = self._insert(connection, entries, fine, known)
            counts = plan_rows.count_plans(connection, sorted({attempt.checkpoint.id for attempt in fine.values()}))
        known.remember()
        self._observer.planned(sum(isinstance(row, PlanRow) for row in stored.values()))
        return [self._answer(entry, attempts[entry.ask], stored.get(at), counts) for at, entry in enumerate(entries)]

    def _wanted(
        self, connection: Connection, entries: Sequence[PlanEntry], fine: Mapping[int, Attempt], now_us: int
    ) -> WantedBlobs:
        """Stores the uploads of entries whose session is current, and finds the plans they name."""
        wants = [
            Want(entries[at].project, attempt.part.project_id, (entries[at].wanted,), entries[at].blobs)
            for at, attempt in fine.items()
        ]
        return WantedBlobs(self._blobs, connection, wants, now_us)

    def _insert(
        self,
        connection: Connection,
        entries: Sequence[PlanEntry],
        fine: Mapping[int, Attempt],
        known: WantedBlobs,
    ) -> dict[int, PlanRow | ShardbookError]:
        """Adds the plans of entries whose attempt is open and whose plan is known; returns rows or errors by entry."""
        outcome: dict[int, PlanRow | ShardbookError] = {}
        rows: dict[tuple[int, int], PlanRow] = {}
        for at, attempt in fine.items():
            submission = entries[at].submission
            blob = known.row(entries[at].project, entries[at].wanted)
            if attempt.state is not CheckpointState.OPEN:
                outcome[at] = closed_error(attempt.checkpoint)
            elif blob is not None:
                lowest = int(submission.save_to_lowest_rank)
                row = PlanRow(attempt.checkpoint.id, submission.rank, blob.id, lowest, submission.host)
                outcome[at] = row
                rows.setdefault((row.checkpoint_id, row.rank), row)
        added = plan_rows.insert_plans(connection, list(rows.values()))
        rows |= plan_rows.find_plans(connection, [key for key in rows if key not in added])
        for at, mine in outcome.items():
            if isinstance(mine, PlanRow):
                held = rows[mine.checkpoint_id, mine.rank]
                if (held.plan_id, held.lowest_rank) != (mine.plan_id, mine.lowest_rank):
                    outcome[at] = other_content("planned", mine.rank, "plan_digest")
        return outcome

    def _answer(
        self,
        entry: PlanEntry,
        attempt: Attempt | ShardbookError,
        stored: PlanRow | ShardbookError | None,
        counts: Mapping[int, int],
    ) -> PlanAnswer | ShardbookError:
        if isinstance(attempt, ShardbookError):
            return attempt
        if isinstance(stored, ShardbookError):
            return stored
        if stored is None:
            return PlanAnswer(PlanState.STRUCTURE_UNKNOWN, unknown_refs(entry.wanted, entry.blobs))
        checkpoint_id = attempt.checkpoint.id
        opened_us = attempt.checkpoint.create_time_us
        return self.held(checkpoint_id, stored.rank, opened_us) or PlanAnswer(
            PlanState.WAITING,
            planned_count=counts.get(checkpoint_id, 0),
            checkpoint_id=checkpoint_id,
            opened_us=opened_us,
        )

    def planned_us(self, checkpoint_id: int, opened_us: int) -> int | None:
        """Returns when this server saw that every rank of an attempt had planned; None when it did not see it."""
        return self._planned_us.get((checkpoint_id, opened_us))

    def held(self, checkpoint_id: int, rank: int, opened_us: int) -> PlanAnswer | None:
        """Returns DECIDED where the decision is in memory; never waits. Arguments are those of ``decide``."""
        key = self._by_attempt.get((checkpoint_id, opened_us))
        drop = None if key is None else self._decisions.held(key, rank)
        return None if drop is None else PlanAnswer(PlanState.DECIDED, drop=drop, checkpoint_id=checkpoint_id)

    def decide(self, checkpoint_id: int, rank: int, opened_us: int = 0) -> PlanAnswer:
        """Returns DECIDED for one rank once every rank of the attempt is in, else WAITING.

        Computed once per set of plans, whoever asks first; others wait for it. CPU work the first time, a look-up
        afterwards.

        Args:
            checkpoint_id: As in the answer to the plan.
            rank: Whose part of the decision is wanted.
            opened_us: As in that answer; without it the attempt is read first.

        Raises:
            NotFoundError: There is no such attempt.
            CheckpointClosedError: The attempt is closed.
            InvalidArgumentError: The ranks disagree on ``save_to_lowest_rank``.
        """
        key = self._by_attempt.get((checkpoint_id, opened_us))
        drop = None
        if key is not None:
            check_rank(rank, key.world_size, "rank")
            drop = self._decisions.find(key, rank)
        if drop is None:
            question = self._question(checkpoint_id, opened_us)
            if isinstance(question, int):
                return PlanAnswer(PlanState.WAITING, planned_count=question, checkpoint_id=checkpoint_id)
            check_rank(rank, len(question.digests), "rank")
            drop = self._decisions.decide(question, rank)
        return PlanAnswer(PlanState.DECIDED, drop=drop, checkpoint_id=checkpoint_id)

    def _question(self, checkpoint_id: int, opened_us: int) -> Question | int:
        """Returns what is to be decided for an attempt; or how many ranks are in when that is not all of them."""
        with self._database.read() as connection:
            checkpoint = checkpoint_rows.find_by_ids(connection, [checkpoint_id]).get(checkpoint_id)
            if checkpoint is None or (opened_us and checkpoint.create_time_us != opened_us):
                raise NotFoundError("there is no such attempt")
            plans = plan_rows.read_digests(connection, checkpoint_id)
            part = run_rows.part_by_id(connection, checkpoint.part_id)
            now_us = self._database.now_us(connection)
        if not checkpoint.staged:
            raise closed_error(checkpoint)
        if len(plans) < checkpoint.world_size:
            return len(plans)
        options = {lowest_rank for _, lowest_rank in plans}
        if len(options) > 1:
            raise InvalidArgumentError(
                "some ranks ask for save_to_lowest_rank and some do not", field="save_to_lowest_rank"
            )
        digests = [digest for digest, _ in plans]
        question = Question(part.name.run.project, part.project_id, digests, bool(options.pop()))
        attempt = (checkpoint_id, checkpoint.create_time_us)
        self._by_attempt.put(attempt, question.key)
        self._planned_us.put(attempt, self._planned_us.get(attempt) or now_us)
        return question
