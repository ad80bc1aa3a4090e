"""What a call on an attempt goes through between its message and its answer: check uploads, batch, wait, decide.

Belongs to the event loop's thread; every service call goes through the bridge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from shardbook.errors import RanksMissingError, RunBusyError, ShardbookError
from shardbook_server.observer import SILENT, Observer
from shardbook_server.rpc.batcher import Batcher, BatchLimits
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.limits import LEASE_LOOK_S, RECENT_COUNT, RECENT_S
from shardbook_server.rpc.uploads import Uploads
from shardbook_server.rpc.waits import Waits
from shardbook_server.service.blobs import CheckedBlobs
from shardbook_server.service.describing import Description
from shardbook_server.service.lru import BoundedCache
from shardbook_server.service.plans import PlanEntry
from shardbook_server.service.registration import RegistrationEntry
from shardbook_server.service.services import Services
from shardbook_server.service.types import (
    AttemptKey,
    BlobUpload,
    FailureReport,
    OnLive,
    PlanSubmission,
    RecordRequest,
    Registration,
    SessionStart,
)
from shardbook_server.service.views import (
    AttemptCounts,
    CheckpointInfo,
    CheckpointState,
    PlanAnswer,
    PlanState,
    Progress,
    RecordAnswer,
    RegistrationAnswer,
    SessionInfo,
)

Reached = Callable[[AttemptCounts], bool]


def is_closed(counts: AttemptCounts) -> bool:
    """True once the attempt is committed, failed or expired."""
    return counts.state != CheckpointState.OPEN


def is_registered(counts: AttemptCounts) -> bool:
    """True once every rank has registered, or the attempt is closed."""
    return is_closed(counts) or counts.registered_count >= counts.registration_count


def is_planned(counts: AttemptCounts) -> bool:
    """True once every rank has planned, or the attempt is closed."""
    return is_closed(counts) or counts.planned_count >= counts.world_size


#: What GetCheckpointProgress can wait for, by number of ``Until``.
REACHED: Final[dict[int, Reached]] = {0: lambda _: True, 1: is_registered, 2: is_closed}


def _each(
    decide: Callable[[int, int, int], PlanAnswer], asks: Sequence[tuple[int, int, int]]
) -> Sequence[PlanAnswer | ShardbookError]:
    """Returns a verdict for each; in a thread."""
    verdicts: list[PlanAnswer | ShardbookError] = []
    for ask in asks:
        try:
            verdicts.append(decide(*ask))
        except ShardbookError as error:
            verdicts.append(error)
    return verdicts


class Attempts:
    """Calls on attempts, in the form that the event loop needs.

    Args:
        services: All services.
        bridge: The way to them.
        waits: The poller.
        limits: Sizes of the batches and of the queues before them.
        in_flight: Batches of each kind in the database at a time.
        observer: Told of batches, and of commits that were given up.
    """

    def __init__(
        self,
        services: Services,
        bridge: Bridge,
        waits: Waits,
        limits: BatchLimits,
        *,
        in_flight: int = 1,
        observer: Observer = SILENT,
    ) -> None:
        self._services = services
        self._bridge = bridge
        self._waits = waits
        self._observer = observer
        self._plans = Batcher("plans", self._write_plans, limits, in_flight=in_flight, observer=observer)
        self._registrations = Batcher(
            "registrations", self._write_registrations, limits, in_flight=in_flight, observer=observer
        )
        self._decisions = Batcher("decisions", self._decide_many, limits, observer=observer)
        #: What waiting calls are shown of attempts, and until when.
        self._views: BoundedCache[AttemptKey, tuple[float, Progress]] = BoundedCache(RECENT_COUNT)
        #: Registrations that came through this process, by attempt.
        self._registered: BoundedCache[int, int] = BoundedCache(RECENT_COUNT)
        self._uploads = Uploads(services.blobs, bridge, limits, observer=observer)

    def queues(self) -> Mapping[str, tuple[int, float]]:
        """Returns depth and age of the oldest entry, seconds, of each queue. May be asked from any thread."""
        batchers: dict[str, Batcher[Any, Any]] = {
            "plans": self._plans,
            "registrations": self._registrations,
            "uploads": self._uploads.checks,
            "decisions": self._decisions,
        }
        return {kind: (batcher.queued_count, batcher.oldest_age_s) for kind, batcher in batchers.items()}

    async def start_session(self, request: SessionStart, wait_s: float) -> SessionInfo:
        """Starts a session; with WAIT, tries again when the other job's lease has ended.

        Raises:
            RunBusyError: The lease is alive, still after the wait.
        """
        began_s = time.monotonic()
        end_s = began_s + wait_s
        while True:
            # It grows older while it waits here.
            aged = replace(request, age_us=request.age_us + round((time.monotonic() - began_s) * 1e6))
            try:
                return await self._bridge.write("session", self._services.sessions.start, aged)
            except RunBusyError:
                if request.on_live != OnLive.WAIT or not await self._lease_ends(request, end_s):
                    raise

    async def plan(
        self, submission: PlanSubmission, uploads: Sequence[BlobUpload], size_bytes: int, wait_s: float
    ) -> PlanAnswer:
        """Submits a rank's plan and waits for the other ranks'."""

        def write(blobs: CheckedBlobs) -> Awaitable[PlanAnswer]:
            return self._plans.submit(PlanEntry(submission, blobs), size_bytes)

        answer = await self._uploads.write(submission.key.part_name.run.project, uploads, write)
        if answer.state != PlanState.WAITING:
            return answer
        if answer.planned_count < submission.key.world_size:
            counts = await self._waits.until(answer.checkpoint_id, is_planned, wait_s)
            if counts is None or not is_planned(counts):
                return replace(answer, planned_count=counts.planned_count if counts else answer.planned_count)
        # The first to ask computes for all and may take long; then each rank's own part is in memory, or else is looked
        # up in the database, many at a time.
        plans, ask = self._services.plans, (answer.checkpoint_id, submission.rank, answer.opened_us)
        decided = plans.held(*ask)
        if decided is None:
            await self._bridge.heavy("decide", (answer.checkpoint_id, answer.opened_us), plans.decide, *ask)
            decided = plans.held(*ask)
        return await self._decisions.submit(ask, 0) if decided is None else decided

    async def register(
        self, registration: Registration, uploads: Sequence[BlobUpload], size_bytes: int
    ) -> RegistrationAnswer:
        """Registers what a rank wrote; durable once it returns without ``unknown``."""

        def write(blobs: CheckedBlobs) -> Awaitable[RegistrationAnswer]:
            return self._registrations.submit(RegistrationEntry(registration, blobs), size_bytes)

        return await self._uploads.write(registration.key.part_name.run.project, uploads, write)

    async def await_close(self, checkpoint_id: int, wait_s: float) -> CheckpointInfo | None:
        """Waits for an attempt to be closed, for a rank that has nothing else to do; None when it is not in time.

        Never fails: whatever keeps it from waiting, the registration before it is durable and has to be answered.
        """
        if not checkpoint_id or wait_s <= 0:
            return None
        try:
            counts = await self._waits.until(checkpoint_id, is_closed, wait_s)
            return None if counts is None or not is_closed(counts) else await self._closed(checkpoint_id)
        except ShardbookError:
            return None

    async def _closed(self, checkpoint_id: int) -> CheckpointInfo:
        """Returns a closed attempt: read once for all who waited for it."""
        return await self._bridge.read_shared(checkpoint_id, self._services.catalog.get_attempt, checkpoint_id)

    async def report_failure(self, report: FailureReport) -> CheckpointState:
        """Fails the attempt; whoever waits for it learns of it with the poller's next look."""
        return await self._bridge.write("failure", self._services.registrations.report_failure, report)

    async def progress(
        self, key: AttemptKey, reached: Reached, wait_s: float
    ) -> tuple[Progress, CheckpointInfo | None]:
        """Returns how far an attempt has come, at the latest when the wait is over; and the checkpoint once closed."""
        if wait_s <= 0 or reached is REACHED[0]:
            # Nothing to wait for: then what this very moment says, as after a write of the caller's own.
            view = await self._bridge.read(self._services.progress.progress, key)
        else:
            view = await self._wait_for_progress(key, reached, time.monotonic() + wait_s)
        if not is_closed(view.counts):
            return view, None
        return view, await self._closed(view.checkpoint_id)

    async def _wait_for_progress(self, key: AttemptKey, reached: Reached, end_s: float) -> Progress:
        view = await self._recent(key)
        while not reached(view.counts) and (left_s := end_s - time.monotonic()) > 0:
            counts = await self._waits.until(view.checkpoint_id, reached, left_s)
            if counts is not None and reached(counts):
                view = await self._look_up(key)
            else:
                view = await self._recent(key)
        return view

    async def _recent(self, key: AttemptKey) -> Progress:
        """Returns progress as it is, or was a moment ago: it names missing ranks, which costs more the more there are.

        For calls that wait: every rank of a world asks, and all get the same answer.
        """
        held = self._views.get(key)
        if held is not None and time.monotonic() < held[0]:
            return held[1]
        return await self._look_up(key)

    async def _look_up(self, key: AttemptKey) -> Progress:
        asked_s = time.monotonic()
        view = await self._bridge.read_shared(key, self._services.progress.progress, key)
        # So that looking takes a twentieth of a thread at most, however large the world is.
        self._views.put(key, (asked_s + max(RECENT_S, 20 * (time.monotonic() - asked_s)), view))
        return view

    async def commit(self, key: AttemptKey, description: Description, wait_s: float) -> CheckpointInfo:
        """Commits an attempt once every rank is there; the first to ask says what it is described as.

        Raises:
            RanksMissingError: Ranks are missing, still after the wait.
        """
        end_s = time.monotonic() + wait_s
        closed = False
        while True:
            try:
                checkpoint = await self._bridge.heavy("commit", key, self._services.commits.commit, key, description)
            except RanksMissingError:
                left_s = end_s - time.monotonic()
                # An expired attempt can still be committed, but nobody may be there to complete it.
                if closed or left_s <= 0:
                    self._observer.commit_ended("ranks_missing")
                    raise
                view = await self._bridge.read(self._services.progress.progress, key)
                counts = await self._waits.until(view.checkpoint_id, is_registered, left_s)
                closed = counts is not None and is_closed(counts)
            else:
                self._waits.changed([checkpoint.checkpoint_id])
                return checkpoint

    async def abort(self, key: AttemptKey, reason: str) -> CheckpointInfo:
        """Gives an attempt up."""
        checkpoint = await self._bridge.write("abort", self._services.commits.abort, key, reason)
        self._waits.changed([checkpoint.checkpoint_id])
        return checkpoint

    async def record(self, request: RecordRequest, uploads: Sequence[BlobUpload]) -> RecordAnswer:
        """Records an attempt, or a part of one; the last call assembles it."""
        blobs = await self._uploads.check(request.key.part_name.run.project, uploads)
        if not request.complete:
            return await self._bridge.write("record", self._services.records.record, request, blobs)
        # A key of its own: two such calls may say different things, so they never share an answer.
        return await self._bridge.heavy("record", object(), self._services.records.record, request, blobs)

    async def close(self) -> None:
        """Writes what is queued; refuses what comes."""
        await asyncio.gather(self._uploads.close(), self._decisions.close())
        await asyncio.gather(self._plans.close(), self._registrations.close())

    async def _decide_many(self, asks: Sequence[tuple[int, int, int]]) -> Sequence[PlanAnswer | ShardbookError]:
        return await self._bridge.look(_each, self._services.plans.decide, asks)

    async def _lease_ends(self, request: SessionStart, end_s: float) -> bool:
        """Waits for another job's lease to end; False when the time is up first."""
        while (left_s := end_s - time.monotonic()) > 0:
            busy_s = await self._bridge.read(self._services.sessions.lease_remaining_s, request)
            if busy_s <= 0:
                return True
            # A lease can end before its time: its job released it.
            await self._waits.pause(min(busy_s, left_s, LEASE_LOOK_S))
        return False

    async def _write_plans(self, entries: Sequence[PlanEntry]) -> Sequence[PlanAnswer | ShardbookError]:
        answers = await self._bridge.write_own("plan", self._services.plans.plan_batch, entries)
        # A look costs more the larger the world; of plans it brings nothing until all of them are in.
        self._waits.changed(
            answer.checkpoint_id
            for entry, answer in zip(entries, answers, strict=True)
            if isinstance(answer, PlanAnswer) and answer.planned_count >= entry.submission.key.world_size
        )
        return answers

    async def _write_registrations(
        self, entries: Sequence[RegistrationEntry]
    ) -> Sequence[RegistrationAnswer | ShardbookError]:
        answers = await self._bridge.write_own("register", self._services.registrations.register_batch, entries)
        self._waits.changed(
            answer.checkpoint_id
            for entry, answer in zip(entries, answers, strict=True)
            if isinstance(answer, RegistrationAnswer) and self._may_be_complete(entry, answer)
        )
        return answers

    def _may_be_complete(self, entry: RegistrationEntry, answer: RegistrationAnswer) -> bool:
        """Counts a registration; True once as many came through this process as there are ranks.

        Through several replicas, or with ranks that register twice, it is only a guess: the poller looks all the same.
        """
        count = 1 + (self._registered.get(answer.checkpoint_id) or 0)
        self._registered.put(answer.checkpoint_id, count)
        return count >= entry.registration.key.world_size
