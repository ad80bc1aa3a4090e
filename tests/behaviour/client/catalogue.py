"""Handlers that keep attempts as the catalogue does, for tests of what a client sends."""

from __future__ import annotations

from typing import Any

import grpc

from shardbook.core.columns import unframe
from shardbook.core.digest import digest_of
from shardbook.core.names import CheckpointId, CheckpointName, PartName, RunName
from shardbook.v1 import catalog_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.client.scripted import refuse


class Catalogue:
    """Attempts by resource name; blobs by digest; registrations while an attempt is incomplete."""

    def __init__(self) -> None:
        self.checkpoints: dict[str, types_pb2.Checkpoint] = {}
        self.blobs: set[tuple[int, bytes]] = set()
        self.staged: dict[str, dict[int, pb.ShardRegistration]] = {}
        self.superseded_steps: set[int] = set()

    def get(self, request: catalog_pb2.GetCheckpointRequest, context: Any) -> catalog_pb2.GetCheckpointResponse:
        """Finds by full name."""
        found = self.checkpoints.get(request.name)
        if found is None:
            refuse(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND", f"{request.name} is not there")
        return catalog_pb2.GetCheckpointResponse(checkpoint=found)

    def record(self, request: pb.RecordCheckpointRequest, context: Any) -> pb.RecordCheckpointResponse:
        """Stages registrations whose structures are known, and commits with the last call."""
        key = request.key
        assert request.recovered
        if key.step in self.superseded_steps:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "STEP_SUPERSEDED", "a later session saved the step")
        self.blobs |= {(blob.kind, digest_of(unframe(blob.payload))) for blob in request.blobs}
        unknown = {registration.structure_digest for registration in request.registrations} - {
            digest for kind, digest in self.blobs if kind == types_pb2.BLOB_KIND_STRUCTURE
        }
        if unknown:
            refs = [types_pb2.BlobRef(kind=types_pb2.BLOB_KIND_STRUCTURE, digest=digest) for digest in sorted(unknown)]
            return pb.RecordCheckpointResponse(unknown=refs)
        run = RunName.parse(key.run)
        name = CheckpointName(
            PartName(run, key.part), CheckpointId.full(key.step, key.session, key.attempt, key.incarnation)
        )
        staged = self.staged.setdefault(str(name), {})
        staged |= {registration.rank: registration for registration in request.registrations}
        if not request.complete:
            return pb.RecordCheckpointResponse()
        assert list(range(request.registration_count)) == sorted(staged)
        checkpoint = types_pb2.Checkpoint(
            name=str(name),
            ref=name.ref,
            step=key.step,
            session=key.session,
            attempt=key.attempt,
            incarnation=key.incarnation,
            world_size=key.world_size,
            state=types_pb2.CHECKPOINT_STATE_COMMITTED,
            live=True,
            recovered=True,
            location=request.location,
        )
        self.checkpoints[str(name)] = checkpoint
        return pb.RecordCheckpointResponse(checkpoint=checkpoint)
