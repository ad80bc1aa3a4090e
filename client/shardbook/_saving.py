"""The calls of RegistrationService: what ranks and their coordinator say while they save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from shardbook._transport import Rpc, Transport
from shardbook.core.limits import MAX_BLOB_BYTES, MAX_WAIT_S
from shardbook.errors import DeadlineExceededError, InternalError, RanksMissingError, UnavailableError
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptKey, Blob, BlobRef

R = TypeVar("R")
_M = TypeVar("_M", bound=Message)
_Asking = TypeVar("_Asking", pb.PlanSaveRequest, pb.RegisterShardsRequest, pb.GetCheckpointProgressRequest)
_Waiting = pb.PlanSaveRequest | pb.RegisterShardsRequest | pb.GetCheckpointProgressRequest | pb.CommitCheckpointRequest

#: Finds blobs that the server asked for.
BlobSource = Callable[[Sequence[BlobRef]], Iterable[Blob]]

#: Time that the server has for its answer beyond the wait it was asked for, seconds.
_GRACE_S: Final = 10.0
#: Share of the allowed silence that a probe asks the server to wait; the rest is for the answer's way.
_WAIT_SHARE: Final = 0.8
#: While a call waits for other ranks, the server is asked this often whether it lives, seconds: there may be thousands.
_LOOK_EVERY_S: Final = 5.0
#: What such a question asks the server to wait: more than nothing, so that all that ask share one answer, seconds.
_GLANCE_S: Final = 0.001
#: Most looks of all ranks of a world together, per second.
_LOOKS_A_SECOND: Final = 400
#: Rounds of "send me these" before the server is called confused: three levels, and blobs too many for one call.
_MAX_BLOB_ROUNDS: Final = 64

START_SESSION = Rpc("StartSession", lambda on: on.registration.StartSession)
KEEP_ALIVE = Rpc("KeepAlive", lambda on: on.registration.KeepAlive)
PLAN_SAVE = Rpc("PlanSave", lambda on: on.registration.PlanSave)
REGISTER_SHARDS = Rpc("RegisterShards", lambda on: on.registration.RegisterShards)
REPORT_FAILURE = Rpc("ReportFailure", lambda on: on.registration.ReportFailure)
GET_PROGRESS = Rpc("GetCheckpointProgress", lambda on: on.registration.GetCheckpointProgress)
COMMIT = Rpc("CommitCheckpoint", lambda on: on.registration.CommitCheckpoint)
ABORT = Rpc("AbortCheckpoint", lambda on: on.registration.AbortCheckpoint)
RECORD = Rpc("RecordCheckpoint", lambda on: on.registration.RecordCheckpoint)

Progress = pb.GetCheckpointProgressRequest


class SavingCalls:
    """Registration calls of a client. Every one is idempotent: asking again is always safe. Thread-safe.

    ``deadline_s`` bounds one call with its retries. A request's ``wait`` is at most 20 s, so longer waits ask again
    and again: those are the methods with ``timeout_s``.
    """

    _transport: Transport

    def start_session(
        self, request: pb.StartSessionRequest, *, deadline_s: float | None = None
    ) -> pb.StartSessionResponse:
        """Starts a session, or returns the one this incarnation holds.

        Raises:
            RunBusyError: Another job's lease is alive and ``on_live`` does not let this one take over.
        """
        return self._transport.call(START_SESSION, request, deadline_s=self._deadline_s(deadline_s, request.wait))

    def keep_alive(self, request: pb.KeepAliveRequest, *, deadline_s: float | None = None) -> pb.KeepAliveResponse:
        """Renews or ends a session's lease.

        Raises:
            SessionFencedError: A later session holds the run.
        """
        return self._transport.call(KEEP_ALIVE, request, deadline_s=deadline_s)

    def plan_save(self, request: pb.PlanSaveRequest, *, deadline_s: float | None = None) -> pb.PlanSaveResponse:
        """Submits a rank's plan once; see ``plan_until_decided`` for the loop."""
        return self._transport.call(PLAN_SAVE, request, deadline_s=self._deadline_s(deadline_s, request.wait))

    def plan_until_decided(
        self, request: pb.PlanSaveRequest, blobs: BlobSource, *, timeout_s: float
    ) -> pb.PlanSaveResponse:
        """Submits a rank's plan, sends what the server lacks of it, and waits for the other ranks.

        Args:
            request: The plan by digest; its ``wait`` and ``blobs`` are set here.
            blobs: Finds what the server asks for.
            timeout_s: Seconds to wait for the other ranks.

        Returns:
            The decision; or the last WAITING answer when the time is up, and then the rank writes its whole plan.
        """
        asked = _copy(request)
        wait = _Wait(self._transport, timeout_s)
        round_count = 0
        while True:
            answer = wait.ask(PLAN_SAVE, asked)
            del asked.blobs[:]
            if answer.state == pb.PlanSaveResponse.STATE_STRUCTURE_UNKNOWN:
                round_count += 1
                asked.blobs.extend(_one_call_of(blobs, answer.unknown, round_count))
            elif answer.state == pb.PlanSaveResponse.STATE_DECIDED or wait.is_over:
                return answer
            else:
                wait.pause()

    def register_shards(
        self,
        request: pb.RegisterShardsRequest,
        blobs: BlobSource | None = None,
        *,
        deadline_s: float | None = None,
        wait_s: float = 0.0,
    ) -> pb.RegisterShardsResponse:
        """Registers what a rank wrote; durable when the answer's ``unknown`` is empty.

        Args:
            request: The registration.
            blobs: Finds what the server lacks, which is then sent; without it, the caller reads ``unknown``.
            deadline_s: Seconds for each call, retries included; those that wait have their own.
            wait_s: How long the answer may wait for the attempt to be closed, seconds, at most 20; it has the
                ``checkpoint`` then.
        """
        asked = _copy(request)
        wait = _Wait(self._transport, wait_s) if wait_s > 0 else None
        round_count = 0
        while True:
            if wait is None:
                answer = self._transport.call(REGISTER_SHARDS, asked, deadline_s=deadline_s)
            else:
                answer = wait.ask(REGISTER_SHARDS, asked)
            if blobs is None or not answer.unknown:
                return answer
            round_count += 1
            del asked.blobs[:]
            asked.blobs.extend(_one_call_of(blobs, answer.unknown, round_count))

    def report_failure(
        self, request: pb.ReportFailureRequest, *, deadline_s: float | None = None
    ) -> pb.ReportFailureResponse:
        """Says that a rank cannot finish, so that nobody waits for it."""
        return self._transport.call(REPORT_FAILURE, request, deadline_s=deadline_s)

    def get_progress(self, request: Progress, *, deadline_s: float | None = None) -> pb.GetCheckpointProgressResponse:
        """Tells how far an attempt has come."""
        return self._transport.call(GET_PROGRESS, request, deadline_s=self._deadline_s(deadline_s, request.wait))

    def wait_until_closed(self, key: AttemptKey, *, timeout_s: float) -> pb.GetCheckpointProgressResponse:
        """Waits until an attempt is committed, failed or expired.

        Returns:
            The last answer; its ``progress.state`` is OPEN when the time ran out.
        """
        return self._wait_until(key, Progress.UNTIL_CLOSED, timeout_s)

    def wait_until_registered(self, key: AttemptKey, *, timeout_s: float) -> pb.GetCheckpointProgressResponse:
        """Waits until every rank of an attempt is registered, or it is closed.

        Returns:
            The last answer, with the ranks that are missing when the time ran out.
        """
        return self._wait_until(key, Progress.UNTIL_REGISTERED, timeout_s)

    def commit(
        self, request: pb.CommitCheckpointRequest, *, deadline_s: float | None = None
    ) -> pb.CommitCheckpointResponse:
        """Commits an attempt in one call; see ``commit_when_complete`` for the loop.

        Raises:
            RanksMissingError: Not every rank is registered.
            RankFailedError: A rank said that it cannot finish.
            InvalidGeometryError: The chunks do not make whole tensors.
        """
        return self._transport.call(COMMIT, request, deadline_s=self._deadline_s(deadline_s, request.wait))

    def commit_when_complete(
        self, request: pb.CommitCheckpointRequest, *, timeout_s: float
    ) -> pb.CommitCheckpointResponse:
        """Waits for missing ranks, then commits.

        A new structure may take the server long to assemble. It is not taken for dead meanwhile: it is asked for the
        attempt's progress every now and then, and only silence there ends the wait.

        Raises:
            RanksMissingError: Ranks were still missing when the time ran out.
            RankFailedError: A rank said that it cannot finish.
            InvalidGeometryError: The chunks do not make whole tensors.
        """
        progress = Progress(key=request.key)
        wait = _Wait(self._transport, timeout_s)
        asked = _copy(request)
        while True:
            wait_s = wait.begin(asked)
            try:
                return self._transport.call_patiently(
                    COMMIT,
                    asked,
                    limit_s=wait_s + _GRACE_S,
                    is_alive=lambda transport, limit_s: transport.call(GET_PROGRESS, progress, deadline_s=limit_s),
                )
            except RanksMissingError:
                if wait.is_over:
                    raise
            wait.end()
            wait.pause()

    def abort(
        self, request: pb.AbortCheckpointRequest, *, deadline_s: float | None = None
    ) -> pb.AbortCheckpointResponse:
        """Gives up an attempt."""
        return self._transport.call(ABORT, request, deadline_s=deadline_s)

    def record(
        self, request: pb.RecordCheckpointRequest, *, deadline_s: float | None = None
    ) -> pb.RecordCheckpointResponse:
        """Records a whole attempt, or one part of a large one, from one process.

        A long deadline is for the server's work on a new structure: one that is away is given up like for other calls.
        """
        if self._transport.budget is None or not request.complete:
            return self._transport.call(RECORD, request, deadline_s=deadline_s)
        # Its work is no silence that a save would have to pay for.
        progress = Progress(key=request.key)
        return self._transport.call_patiently(
            RECORD,
            request,
            limit_s=self._transport.timeout_s if deadline_s is None else deadline_s,
            is_alive=lambda transport, limit_s: transport.call(GET_PROGRESS, progress, deadline_s=limit_s),
        )

    def _wait_until(self, key: AttemptKey, until: Progress.Until, timeout_s: float) -> pb.GetCheckpointProgressResponse:
        request = Progress(key=key, until=until)
        wait = _Wait(self._transport, timeout_s)
        while True:
            answer = wait.ask(GET_PROGRESS, request)
            progress = answer.progress
            # A checkpoint in the answer means that the attempt is closed.
            done = answer.HasField("checkpoint") or (
                until == Progress.UNTIL_REGISTERED and progress.registered_count >= progress.world_size > 0
            )
            if done or wait.is_over:
                return answer
            wait.pause()

    def _deadline_s(self, deadline_s: float | None, wait: Duration) -> float:
        """Returns the deadline of a call that asks the server to wait: its own, else the usual one on top."""
        return deadline_s if deadline_s is not None else self._transport.timeout_s + wait.ToTimedelta().total_seconds()


class _Wait:
    """Asks the same waiting call again and again until a time is over. Used by one thread."""

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport = transport
        self._end_s = time.monotonic() + timeout_s
        self._began_s = 0.0
        self._wait_s = 0.0
        self._early_count = 0

    @property
    def is_over(self) -> bool:
        """True when the time is up."""
        return time.monotonic() >= self._end_s

    def begin(self, request: _Waiting, limit_s: float = MAX_WAIT_S) -> float:
        """Sets the request's ``wait`` to what is left, at most ``limit_s`` seconds; returns it."""
        self._began_s = time.monotonic()
        self._wait_s = min(limit_s, max(0.0, self._end_s - self._began_s))
        request.wait.FromTimedelta(timedelta(seconds=self._wait_s))
        return self._wait_s

    def end(self) -> None:
        """Notes that the server answered "not yet"."""
        is_early = time.monotonic() - self._began_s < self._wait_s / 2
        self._early_count = self._early_count + 1 if is_early else 0

    def ask(self, rpc: Rpc[_Asking, R], request: _Asking) -> R:
        """Returns the answer to one call that waits as long as it may; sets the request's ``wait``.

        A server that is away is asked again until the time is over, unless a budget says for how long.
        """
        while True:
            try:
                answer = self._ask(rpc, request)
            except (UnavailableError, DeadlineExceededError):
                if self._transport.budget is not None or self.is_over:
                    raise
            else:
                self.end()
                return answer

    def _ask(self, rpc: Rpc[_Asking, R], request: _Asking) -> R:
        budget = self._transport.budget
        if budget is None:
            return self._transport.call(rpc, request, deadline_s=self.begin(request) + _GRACE_S)
        if budget.is_probing:
            wait_s = self.begin(request, min(MAX_WAIT_S, _WAIT_SHARE * budget.remaining_s))
            return self._transport.call(rpc, request, deadline_s=wait_s + _GRACE_S)
        # Waiting for other ranks is not silence: so it is asked whether the server lives, and only that may cost.
        glance = Progress(key=request.key, until=Progress.UNTIL_CLOSED)
        glance.wait.FromTimedelta(timedelta(seconds=_GLANCE_S))
        return self._transport.call_patiently(
            rpc,
            request,
            limit_s=self.begin(request) + _GRACE_S,
            is_alive=lambda transport, limit_s: transport.call(GET_PROGRESS, glance, deadline_s=limit_s),
            look_every_s=_LOOK_EVERY_S,
            least_look_s=request.key.world_size / _LOOKS_A_SECOND,
        )

    def pause(self) -> None:
        """Sleeps when the server answered "not yet" early (it has its own limit of waiters): no busy loop."""
        if self._early_count:
            delay_s = self._transport.backoff.delay_s(self._early_count)
            time.sleep(min(delay_s, max(0.0, self._end_s - time.monotonic())))


def _copy(request: _M) -> _M:
    """Returns a copy of a caller's message: what is filled in on the way is not the caller's business."""
    copy = type(request)()
    copy.CopyFrom(request)
    return copy


def _one_call_of(blobs: BlobSource, unknown: Sequence[BlobRef], round_count: int) -> list[Blob]:
    """Returns what the server asked for, as much as fits one call; tables first, since plans refer to them.

    Raises:
        InternalError: The server asks for ever.
    """
    if round_count > _MAX_BLOB_ROUNDS:
        raise InternalError("the server asks for the same blobs again and again", reason="BLOBS_NOT_ACCEPTED")
    chosen: list[Blob] = []
    size_bytes = 0
    for blob in sorted(blobs(unknown), key=lambda blob: blob.kind):
        size_bytes += len(blob.payload)
        if chosen and size_bytes > MAX_BLOB_BYTES:
            break
        chosen.append(blob)
    return chosen
