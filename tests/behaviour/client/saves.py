"""Saves made through the API alone, by every rank of one small matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from shardbook._saving import BlobSource
from shardbook.catalog import Checkpoint
from shardbook.client import Client
from shardbook.core.manifest import AttemptIdentity, RegistrationRecord
from shardbook.core.names import RunName
from shardbook.recording import attempt_key
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptLocation, Blob
from tests.behaviour.client.directories import identity, record


def start_session(
    client: Client, run: str, incarnation: bytes, on_live: pb.OnLive = pb.ON_LIVE_TAKEOVER
) -> pb.StartSessionResponse:
    """Starts a session; takes over unless told otherwise."""
    return client.start_session(
        pb.StartSessionRequest(
            run=str(RunName.parse(run)), incarnation=incarnation, on_live=on_live, host="node-0", user="ada"
        )
    )


def registration_request(one: RegistrationRecord, location: Path) -> pb.RegisterShardsRequest:
    """What a rank sends of its record."""
    return pb.RegisterShardsRequest(
        key=attempt_key(one.identity),
        location=AttemptLocation(location=str(location), prefix=one.identity.prefix),
        registration=pb.ShardRegistration(
            rank=one.rank,
            structure_digest=one.structure_digest,
            extents=one.extents,
            volatile_properties=one.volatile,
        ),
        host=one.host,
    )


def source_of(one: RegistrationRecord) -> BlobSource:
    """Finds what the server asks for among a record's blobs."""
    held = {(int(blob.kind), blob.digest): blob.payload for blob in one.blobs}
    return lambda refs: [Blob(kind=ref.kind, payload=held[ref.kind, ref.digest]) for ref in refs]


def register(client: Client, who: AttemptIdentity, location: Path, ranks: Iterable[int] | None = None) -> None:
    """Registers all ranks of an attempt, or some."""
    for rank in range(who.world_size) if ranks is None else ranks:
        one = record(who, rank)
        client.register_shards(registration_request(one, location), source_of(one))


def save(client: Client, location: Path, step: int, *, run: str, incarnation: bytes, attempt: int = 1) -> Checkpoint:
    """One whole save by the session of ``incarnation``, which is started when it is not yet."""
    session = start_session(client, run, incarnation).session
    who = replace(identity(step, run=run, incarnation=incarnation, attempt=attempt), session=session)
    register(client, who, location)
    answer = client.commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(who)), timeout_s=20)
    return Checkpoint.of(answer.checkpoint)
