"""Whole attempts from one process, and metadata as loaders read it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

from shardbook.v1 import metadata_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.app import Server
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, payload, row, wait_until

COMMITTED = types_pb2.CHECKPOINT_STATE_COMMITTED


# ------------------------------------------------------------------ records


def test_an_attempt_is_recorded_from_one_process_in_parts(api: Api, run: str) -> None:
    """Rule: blobs that are lacking are asked for, parts are staged, and the last call commits; again is the same."""
    job = replace(Job.start(api, run), world_size=3)
    world = job.rows()

    def record(ranks: list[int], *, complete: bool) -> pb.RecordCheckpointResponse:
        request = pb.RecordCheckpointRequest(
            key=job.key(), location=job.location(), registration_count=3, complete=complete
        )
        for rank in ranks:
            what = world[rank]
            request.registrations.add(rank=rank, structure_digest=what.structure_digest, extents=what.extents)
        response = api.registration.RecordCheckpoint(request, timeout=DEADLINE_S)
        if response.unknown:
            assert not response.HasField("checkpoint")
            for rank in ranks:
                request.blobs.extend(world[rank].blobs.values())
            response = api.registration.RecordCheckpoint(request, timeout=DEADLINE_S)
        return response

    assert pb.RecordCheckpointResponse() == record([0, 1], complete=False)
    answer = record([2], complete=True)
    assert (COMMITTED, True, 3) == (answer.checkpoint.state, answer.checkpoint.live, answer.checkpoint.chunk_count)
    assert answer == record([2], complete=True)
    assert answer.checkpoint == job.commit()


def test_an_offline_attempt_is_recorded_as_history(api: Api, run: str) -> None:
    """Rule: session 0 with `recovered`; `latest` stays where the numbered sessions left it."""
    job = Job.start(api, run)
    latest = job.save(5)
    offline = Job(api, run)
    request = pb.RecordCheckpointRequest(
        key=offline.key(9), location=offline.location(9), registration_count=2, complete=True, recovered=True
    )
    for rank, what in enumerate(offline.rows()):
        request.registrations.add(rank=rank, structure_digest=what.structure_digest, extents=what.extents)
    checkpoint = api.registration.RecordCheckpoint(request, timeout=DEADLINE_S).checkpoint
    assert (COMMITTED, 0, True) == (checkpoint.state, checkpoint.session, checkpoint.recovered)
    assert checkpoint.name.endswith(f"9.s0.a1.{offline.incarnation.hex()[:12]}")
    assert latest.name == job.start_session().latest


# ------------------------------------------------------------------ streams


def test_metadata_is_streamed_in_pieces_of_about_a_mebibyte(server: Server, api: Api, run: str) -> None:
    """Rule: header, extents, blocks; no message beyond 2 MiB, and no transaction open while the client reads."""
    job = replace(Job.start(api, run), world_size=1)
    # Names that do not compress away: 2 MiB of them.
    shards = [row(os.urandom(2000).hex(), 0, 1) for _ in range(1000)]
    what = payload(shards)
    job.save(1, [what])
    request = metadata_pb2.GetMetadataRequest(name=f"{run}/parts/default/checkpoints/1")
    kinds, sizes = [], []
    for message in api.metadata.GetMetadata(request, timeout=DEADLINE_S):
        # Flow control holds the server at a yield while nobody reads on.
        wait_until(lambda: server.database.checked_out() == 0)
        kinds.append(message.WhichOneof("content"))
        sizes.append(message.ByteSize())
    assert ["header", "extents"] == kinds[:2]
    assert {"block"} == set(kinds[2:])
    assert len(kinds) > 3
    assert max(sizes) < 2 << 20


def test_a_client_that_stops_reading_a_stream_leaves_nothing_open(server: Server, api: Api, run: str) -> None:
    """Rule: a cancelled stream ends on the server too."""
    job = Job.start(api, run)
    job.save(1)
    request = metadata_pb2.GetMetadataRequest(name=f"{run}/parts/default/checkpoints/1")
    for _ in range(5):
        stream = api.metadata.GetMetadata(request, timeout=DEADLINE_S)
        next(stream)
        stream.cancel()
    wait_until(lambda: server.database.checked_out() == 0)
    assert threading.active_count() < 50
