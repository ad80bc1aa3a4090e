"""Plans of an attempt's ranks, and which rank writes what more than one could write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardbook.errors import ShardbookError
from shardbook_server.service.blobs import BlobService, CheckedBlobs
from shardbook_server.service.types import PlanSubmission
from shardbook_server.service.views import PlanAnswer
from shardbook_server.storage.database import Database


@dataclass(frozen=True)
class PlanEntry:
    """One PlanSave call in a batch: the submission and its uploads, checked."""

    submission: PlanSubmission
    blobs: CheckedBlobs = CheckedBlobs()


class PlanService:
    """Takes plans and decides what is dropped. Thread-safe."""

    def __init__(self, database: Database, blobs: BlobService, *, lease_ttl_s: float) -> None: ...

    def plan_batch(self, entries: Sequence[PlanEntry]) -> list[PlanAnswer | ShardbookError]:
        """Submits plans in one transaction; one verdict an entry, in order.

        Answers DECIDED only when the decision is at hand; else WAITING, also when every rank is in (then call
        ``decide``). Submitting the same plan again is the way to ask again.

        Verdicts: SessionUnknownError, SessionFencedError, CheckpointClosedError, AlreadyExistsError (the rank
        planned otherwise before), InvalidArgumentError (location, prefix or world size differ from the first call's).

        Raises:
            ShardbookError: The whole batch failed (the database cannot be written); nothing was stored.
        """
        raise NotImplementedError

    def decide(self, checkpoint_id: int, rank: int) -> PlanAnswer:
        """Returns DECIDED for one rank once every rank of the attempt is in, else WAITING.

        Computed once per set of plans, whoever asks first; others wait for it. CPU work the first time, a look-up
        afterwards.

        Raises:
            CheckpointClosedError: The attempt is closed.
            InvalidArgumentError: The ranks disagree on ``save_to_lowest_rank``.
        """
        raise NotImplementedError
