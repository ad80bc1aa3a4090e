"""RegistrationService: what ranks and their coordinator say while they save."""

from __future__ import annotations

from typing import Any

import grpc.aio

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.registration_pb2_grpc import RegistrationServiceServicer
from shardbook.v1.types_pb2 import Checkpoint
from shardbook_server.rpc import convert, convert_status
from shardbook_server.rpc.attempts import REACHED, Attempts
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.limits import wait_s
from shardbook_server.rpc.times import timestamp
from shardbook_server.service.services import Services
from shardbook_server.service.views import CheckpointInfo

Context = grpc.aio.ServicerContext[Any, Any]


class RegistrationHandlers(RegistrationServiceServicer):
    """Handlers of four steps: check, convert, call, convert."""

    def __init__(self, services: Services, bridge: Bridge, attempts: Attempts) -> None:
        self._services = services
        self._bridge = bridge
        self._attempts = attempts
        self._last: tuple[CheckpointInfo, Checkpoint] | None = None

    def _message(self, closed: CheckpointInfo) -> Checkpoint:
        """Returns a checkpoint; the one that a whole world waited for is converted once."""
        if self._last is None or self._last[0] is not closed:
            self._last = closed, convert.checkpoint(closed)
        return self._last[1]

    async def StartSession(self, request: pb.StartSessionRequest, context: Context) -> pb.StartSessionResponse:
        """Starts a session, or returns the one that the incarnation already holds."""
        longest_s = wait_s(request.wait)
        start = convert.session_start(request)
        return convert.session_response(await self._attempts.start_session(start, longest_s))

    async def KeepAlive(self, request: pb.KeepAliveRequest, context: Context) -> pb.KeepAliveResponse:
        """Renews the lease of a session, or ends it."""
        key = convert.session_key(request)
        renew = self._services.sessions.keep_alive
        lease = await self._bridge.write("session", renew, key, release=request.release)
        return pb.KeepAliveResponse(expire_time=timestamp(lease.expire_time_us))

    async def PlanSave(self, request: pb.PlanSaveRequest, context: Context) -> pb.PlanSaveResponse:
        """Submits a rank's plan and answers which of its items another rank writes."""
        longest_s, size_bytes = wait_s(request.wait), request.ByteSize()
        submission, uploads = convert.plan_submission(request), convert.take_uploads(request)
        answer = await self._attempts.plan(submission, uploads, size_bytes, longest_s)
        return convert.plan_response(answer)

    async def RegisterShards(self, request: pb.RegisterShardsRequest, context: Context) -> pb.RegisterShardsResponse:
        """Registers what a rank wrote."""
        size_bytes, longest_s = request.ByteSize(), wait_s(request.wait)
        registration, uploads = convert.registration(request), convert.take_uploads(request)
        answer = await self._attempts.register(registration, uploads, size_bytes)
        closed = await self._attempts.await_close(answer.checkpoint_id, longest_s)
        return pb.RegisterShardsResponse(
            unknown=convert.blob_refs(answer.unknown), checkpoint=self._message(closed) if closed else None
        )

    async def ReportFailure(self, request: pb.ReportFailureRequest, context: Context) -> pb.ReportFailureResponse:
        """Fails an attempt because of one rank."""
        state = await self._attempts.report_failure(convert.failure_report(request))
        return pb.ReportFailureResponse(state=convert.state(state))

    async def GetCheckpointProgress(
        self, request: pb.GetCheckpointProgressRequest, context: Context
    ) -> pb.GetCheckpointProgressResponse:
        """Tells how far an attempt has come; can wait for it to get further."""
        longest_s, reached = wait_s(request.wait), REACHED.get(request.until)
        if reached is None:
            raise InvalidArgumentError(f"{request.until} is no Until", field="until")
        view, checkpoint = await self._attempts.progress(convert.attempt_key(request.key), reached, longest_s)
        return pb.GetCheckpointProgressResponse(
            progress=convert.progress(view), checkpoint=convert.checkpoint(checkpoint) if checkpoint else None
        )

    async def GetRunStatus(self, request: pb.GetRunStatusRequest, context: Context) -> pb.GetRunStatusResponse:
        """Tells where the saves of a run stand."""
        view = await self._bridge.read(self._services.status.run_status, request.run, request.part)
        return convert_status.run_status(view)

    async def CommitCheckpoint(
        self, request: pb.CommitCheckpointRequest, context: Context
    ) -> pb.CommitCheckpointResponse:
        """Assembles, validates and commits an attempt in which every rank is there."""
        longest_s = wait_s(request.wait)
        checkpoint = await self._attempts.commit(
            convert.attempt_key(request.key), convert.description(request.description), longest_s
        )
        return pb.CommitCheckpointResponse(checkpoint=convert.checkpoint(checkpoint))

    async def AbortCheckpoint(self, request: pb.AbortCheckpointRequest, context: Context) -> pb.AbortCheckpointResponse:
        """Gives an attempt up."""
        checkpoint = await self._attempts.abort(convert.attempt_key(request.key), request.reason)
        return pb.AbortCheckpointResponse(checkpoint=convert.checkpoint(checkpoint))

    async def RecordCheckpoint(
        self, request: pb.RecordCheckpointRequest, context: Context
    ) -> pb.RecordCheckpointResponse:
        """Records a whole attempt from one process."""
        record = convert.record_request(request)
        uploads = convert.take_uploads(request, limits.MAX_RECORD_BLOBS)
        answer = await self._attempts.record(record, uploads)
        return pb.RecordCheckpointResponse(
            unknown=convert.blob_refs(answer.unknown),
            checkpoint=convert.checkpoint(answer.checkpoint) if answer.checkpoint else None,
        )
