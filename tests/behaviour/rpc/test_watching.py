"""WatchCheckpoints over the wire: every event once and in order, from any cursor, until the server ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from shardbook.core.names import CheckpointName
from shardbook.v1 import catalog_pb2, registration_pb2, retention_pb2
from shardbook.v1 import events_pb2 as pb
from shardbook_server.app import Server, running_server
from shardbook_server.rpc.feed import PAGE
from shardbook_server.service import present
from shardbook_server.storage import events as rows
from shardbook_server.storage import runs
from shardbook_server.storage.events import Event, EventKind
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, api_of, error_of, fields, settings_in, wait_until

ALL = "projects/-/runs/-/parts/-"
COMMITTED, MOVED = pb.Event.KIND_COMMITTED, pb.Event.KIND_ALIAS_MOVED


@contextmanager
def watching(api: Api, parent: str = ALL, **request: Any) -> Iterator[Iterator[pb.WatchCheckpointsResponse]]:
    """A stream, ended with the block."""
    call = api.catalog.WatchCheckpoints(pb.WatchCheckpointsRequest(parent=parent, **request), timeout=DEADLINE_S)
    try:
        yield iter(call)
    finally:
        call.cancel()


def take(stream: Iterator[pb.WatchCheckpointsResponse], count: int) -> list[pb.Event]:
    """The next events of a stream."""
    taken: list[pb.Event] = []
    while len(taken) < count:
        taken.extend(next(stream).events)
    assert count == len(taken)
    return taken


def refused(api: Api, **request: Any) -> Any:
    """The error that a stream ends with."""
    with pytest.raises(grpc.RpcError) as caught, watching(api, **request) as stream:
        for _ in stream:
            pass
    return error_of(caught.value)


def told(events: Sequence[pb.Event]) -> list[tuple[int, str, str]]:
    """Kind, step or nothing, alias."""
    return [(event.kind, event.checkpoint.ref.partition("@")[2], event.alias) for event in events]


def test_what_happens_is_told_as_it_happens(api: Api, run: str) -> None:
    """From now on; the first answer says that everything so far has been told. Events come with their checkpoint."""
    job = Job.start(api, run)
    job.save(1)
    with watching(api, f"{run}/parts/-") as stream:
        first = next(stream)
        assert (0, True) == (len(first.events), bool(first.cursor))
        job.save(2)
        committed, moved = take(stream, 2)
    assert [(COMMITTED, "2", ""), (MOVED, "2", "latest")] == told([committed, moved])
    assert (f"{run}/parts/default", "/ckpt/step-2") == (committed.part, committed.checkpoint.location.location)
    assert ["latest"] == list(committed.checkpoint.aliases)
    with watching(api, f"{run}/parts/-", cursor=committed.cursor) as stream:
        assert [moved] == take(stream, 1)
    with watching(api, f"{run}/parts/-", cursor="start", kinds=[COMMITTED]) as stream:
        assert ["1", "2"] == [one.checkpoint.ref.partition("@")[2] for one in take(stream, 2)]


def test_failures_and_aliases_are_told_to_who_asks(api: Api, run: str) -> None:
    """By kind, by place, and by what holds of the checkpoint; an alias that is gone has no checkpoint to hold of."""
    job = Job.start(api, run)
    job.save(1)
    part = f"{run}/parts/default"
    api.catalog.SetAlias(
        catalog_pb2.SetAliasRequest(
            alias=catalog_pb2.Alias(name=f"{part}/aliases/best", metric="x", direction="DIRECTION_MIN")
        )
    )
    api.catalog.DeleteAlias(catalog_pb2.DeleteAliasRequest(name=f"{part}/aliases/best"))
    job.register(0, job.rows()[0], 2)
    api.registration.AbortCheckpoint(registration_pb2.AbortCheckpointRequest(key=job.key(2)))
    request = {"parent": f"{run}/parts/-", "cursor": "start"}
    project, name = run.split("/")[1::2]
    with watching(api, **request) as stream:
        kinds = [one.kind for one in take(stream, 5)]
    assert [COMMITTED, MOVED, MOVED, pb.Event.KIND_ALIAS_DELETED, pb.Event.KIND_FAILED] == kinds
    with watching(api, **request, kinds=[pb.Event.KIND_FAILED, pb.Event.KIND_ALIAS_DELETED]) as stream:
        assert [4, 5] == [kinds.index(one.kind) + 1 for one in take(stream, 2)]
    with watching(api, **request, filter="state = FAILED") as stream:
        assert [pb.Event.KIND_FAILED] == [one.kind for one in take(stream, 1)]
    with watching(api, ALL, cursor="start", filter=f'run = "{name[:-1]}*" AND run = {name} AND part = d*t') as stream:
        assert kinds == [one.kind for one in take(stream, 5)]
    with watching(api, f"projects/{project}/runs/{name}/parts/other", cursor="start") as stream:
        assert not next(stream).events


def test_deletions_and_lost_data_are_told(api: Api, run: str) -> None:
    """With what `latest` means then; a checkpoint that is gone is still named, and none is when none is left."""
    job = Job.start(api, run)
    job.save(1)
    name, catalog = f"{run}/parts/default/checkpoints/1", api.catalog
    with watching(api, f"{run}/parts/-") as stream:
        next(stream)
        catalog.DeleteCheckpoint(retention_pb2.DeleteCheckpointRequest(name=name, force=True))
        gone, moved = take(stream, 2)
        catalog.UndeleteCheckpoint(retention_pb2.UndeleteCheckpointRequest(name=name))
        catalog.ReportMissingData(retention_pb2.ReportMissingDataRequest(name=name, missing=True))
        catalog.ReportMissingData(retention_pb2.ReportMissingDataRequest(name=name, missing=False))
        others = take(stream, 4)
    assert (pb.Event.KIND_DELETED, "/ckpt/step-1") == (gone.kind, gone.checkpoint.location.location)
    assert (MOVED, "latest", False) == (moved.kind, moved.alias, moved.HasField("checkpoint"))
    kinds = [pb.Event.KIND_UNDELETED, MOVED, pb.Event.KIND_DATA_LOST, pb.Event.KIND_DATA_FOUND]
    assert kinds == [one.kind for one in others]
    with watching(api, f"{run}/parts/-", cursor="start", kinds=[pb.Event.KIND_DELETED, kinds[2]]) as stream:
        assert [gone.cursor, others[2].cursor] == [one.cursor for one in take(stream, 2)]


def test_who_is_far_behind_reads_on_from_the_database(api: Api, server: Server, run: str) -> None:
    """More events than are kept in memory or sent at a time; filters leave nothing out of what they let through."""
    job = Job.start(api, run)
    checkpoint = job.save(1)
    part_id, checkpoint_id = _keys(server, checkpoint.name)
    with server.database.read() as connection:
        _, before = rows.read_position(connection)
    count = 12 * PAGE
    with server.database.write() as connection:
        rows.append(connection, [Event(EventKind(1 + at % 4), part_id, checkpoint_id) for at in range(count)], 1)
    with watching(api, f"{run}/parts/-") as live, watching(api, f"{run}/parts/-", cursor="start") as stream:
        next(live)
        taken = take(stream, count + 2)[2:]
        assert list(range(before + 1, before + count + 1)) == [int(one.cursor.partition("-")[2]) for one in taken]
        job.save(2)
        assert told(take(live, 2)) == told(take(stream, 2))
    with watching(api, f"{run}/parts/-", cursor="start", kinds=[pb.Event.KIND_FAILED], filter="step = 1") as stream:
        assert count // 4 == len(take(stream, count // 4))


def _keys(server: Server, name: str) -> tuple[int, int]:
    parsed = CheckpointName.parse(name)
    with server.database.read() as connection:
        return runs.find_parts(connection, [parsed.part])[parsed.part].id, present.resolve(connection, parsed)


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        ({"parent": "projects/x"}, "INVALID_NAME", "parent"),
        ({"filter": "step >> 1"}, "INVALID_FILTER", "filter"),
        ({"kinds": [5]}, "INVALID_ARGUMENT", "kinds[0]"),
        ({"kinds": [1, 99]}, "INVALID_ARGUMENT", "kinds[1]"),
        ({"kinds": [1] * 65}, "LIMIT_EXCEEDED", "kinds"),
        ({"cursor": "yesterday"}, "INVALID_CURSOR", "cursor"),
        ({"cursor": "0123456789abcdef-99999999999999999999"}, "INVALID_CURSOR", "cursor"),
        ({"cursor": "0123456789abcdef-1"}, "EPOCH_CHANGED", "cursor"),
    ],
)
def test_bad_requests_are_refused(api: Api, request_: dict[str, Any], reason: str, field: str) -> None:
    """Typed, with the field."""
    error = refused(api, **request_)
    assert (reason, [field]) == (error.reason, fields(error))


def test_streams_end_at_drain_and_go_on_elsewhere(tmp_path: Path) -> None:
    """UNAVAILABLE with a delay; the cursor is good after a restart, and nothing is lost or told twice."""
    settings = settings_in(tmp_path, watch_heartbeat_s=0.2)
    with running_server(settings) as server, api_of(server.address) as api, ThreadPoolExecutor(1) as pool:
        job = Job.start(api, "projects/test/runs/r")
        with watching(api) as stream:
            cursor = next(stream).cursor
            # Signs of life, while nothing happens.
            assert [(0, cursor)] * 2 == [(len(one.events), one.cursor) for one in (next(stream), next(stream))]
            job.save(1)
            cursor = take(stream, 2)[0].cursor

            def rest() -> Any:
                with pytest.raises(grpc.RpcError) as caught:
                    for _ in stream:
                        pass
                return error_of(caught.value)

            ended = pool.submit(rest)
            wait_until(lambda: server._feed.watcher_count == 1)
            began_s = time.monotonic()
            asyncio.run_coroutine_threadsafe(_drain(server), server._reaper.get_loop()).result(5)  # type: ignore[union-attr]
            error = ended.result(5)
            assert time.monotonic() - began_s < 3
            assert ("UNAVAILABLE", "DRAINING", True) == (error.status, error.reason, bool(error.retry_delay_s))
    with running_server(settings) as server, api_of(server.address) as api, watching(api, cursor=cursor) as stream:
        assert [(MOVED, "1", "latest")] == told(take(stream, 1))
        assert not next(stream).events


async def _drain(server: Server) -> None:
    server._feed.drain()


def test_watchers_have_a_limit_of_their_own(tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED with a delay for one more; others' calls go on, and who leaves makes room."""
    with running_server(settings_in(tmp_path, watcher_limit=2)) as server, api_of(server.address) as api:
        with watching(api) as first, watching(api) as second:
            next(first), next(second)
            error = refused(api)
            assert ("RESOURCE_EXHAUSTED", "WATCHERS_FULL", True) == (
                error.status,
                error.reason,
                bool(error.retry_delay_s),
            )
            Job.start(api, "projects/test/runs/r").save(1)
            assert take(first, 2) == take(second, 2)
        wait_until(lambda: server._feed.watcher_count == 0)
        with watching(api) as third:
            next(third)
