"""Names, pages and streams: what loaders and people ask."""

from __future__ import annotations

from typing import Any

import pytest

from shardbook.catalog import CheckpointState
from shardbook.client import Client
from shardbook.core.names import Ref, RunName
from shardbook.errors import InternalError, InvalidArgumentError
from shardbook.v1 import catalog_pb2, metadata_pb2, types_pb2
from tests.behaviour.client.scripted import scripted_server

NAME = "projects/llm/runs/8b/parts/optim/checkpoints/1500.s3.a1"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("llm/8b@1500", "projects/llm/runs/8b/parts/default/checkpoints/1500"),
        ("llm/8b:optim@1500.s3.a1", NAME),
        ("llm/8b@latest", "projects/llm/runs/8b/parts/default/checkpoints/latest"),
        (NAME, NAME),
        (Ref.parse("llm/8b:optim@1500.s3.a1"), NAME),
    ],
)
def test_checkpoints_are_named_by_ref_or_resource(given: Ref | str, sent: str) -> None:
    """Short or long, text or value: the server gets the resource name."""
    checkpoint = types_pb2.Checkpoint(name=NAME, state=types_pb2.CHECKPOINT_STATE_OPEN)
    answer = catalog_pb2.GetCheckpointResponse(checkpoint=checkpoint)
    with scripted_server(GetCheckpoint=lambda *_: answer) as server:
        found = Client(server.target).get_checkpoint(given)
        assert [sent] == [request.name for request in server.of("GetCheckpoint")]
    assert ("optim", CheckpointState.OPEN, None) == (found.part, found.state, found.commit_time)


def test_what_names_no_checkpoint_is_refused_before_it_is_sent() -> None:
    """A typo costs no round trip."""
    with scripted_server() as server:
        client = Client(server.target)
        with pytest.raises(InvalidArgumentError, match="project/run@step"):
            client.get_checkpoint("llm/8b")
        with pytest.raises(InvalidArgumentError):
            list(client.list_runs("a/b"))
        assert [] == server.requests


def test_state_of_tomorrow_is_unknown() -> None:
    """A state that this release does not know is said to be so, not an error."""
    answer = catalog_pb2.GetCheckpointResponse(checkpoint={"name": NAME, "state": 99})
    with scripted_server(GetCheckpoint=lambda *_: answer) as server:
        assert CheckpointState.UNKNOWN is Client(server.target).get_checkpoint(NAME).state


def test_lists_page_while_they_are_iterated() -> None:
    """A page is fetched when its first row is wanted, not before."""

    def handle(request: catalog_pb2.ListRunsRequest, _: Any) -> catalog_pb2.ListRunsResponse:
        page = int(request.page_token or 0)
        runs = [{"name": f"projects/llm/runs/r{page}{row}"} for row in range(2)]
        return catalog_pb2.ListRunsResponse(runs=runs, next_page_token=str(page + 1) if page < 2 else "")

    with scripted_server(ListRuns=handle) as server:
        runs = Client(server.target).list_runs(page_size=2)
        assert ["llm/r00", "llm/r01"] == [next(runs).ref, next(runs).ref]
        assert 1 == server.count("ListRuns")
        assert ["llm/r10", "llm/r11", "llm/r20", "llm/r21"] == [run.ref for run in runs]
        assert ["", "1", "2"] == [request.page_token for request in server.of("ListRuns")]
        assert {("projects/-", 2)} == {(request.parent, request.page_size) for request in server.of("ListRuns")}


def test_checkpoints_of_one_part_or_all() -> None:
    """`parts/-` for all parts, and every attempt when asked."""
    with scripted_server(ListCheckpoints=lambda *_: catalog_pb2.ListCheckpointsResponse()) as server:
        client = Client(server.target)
        assert [] == list(client.list_checkpoints(RunName("llm", "8b"), part="optim"))
        assert [] == list(client.list_checkpoints("llm/8b", show_all=True))
        assert [("projects/llm/runs/8b/parts/optim", False), ("projects/llm/runs/8b/parts/-", True)] == [
            (request.parent, request.show_all) for request in server.of("ListCheckpoints")
        ]


def test_any_fqn_comes_through() -> None:
    """Names are bytes on the wire: NUL, lone surrogates, empty and long ones are exact, as prefixes too."""
    fqns = ["a\0b", "\ud800", "", "x" * 10_000]
    rows = [metadata_pb2.TensorInfo(fqn=fqn.encode("utf-8", "surrogatepass")) for fqn in fqns]
    with scripted_server(ListTensors=lambda *_: metadata_pb2.ListTensorsResponse(tensors=rows)) as server:
        found = Client(server.target).list_tensors(NAME, "\ud800")
        assert fqns == [tensor.fqn for tensor in found]
        assert b"\xed\xa0\x80" == server.of("ListTensors")[0].fqn_prefix


def test_metadata_is_put_together_from_its_stream() -> None:
    """Header, extents by rank, blocks in order: kept as bytes."""
    messages: list[dict[str, Any]] = [
        {"header": {"checkpoint": {"name": NAME, "step": 7}, "head": b"head", "metadata_header": b"meta"}},
        {"extents": {"first_rank": 0, "payload": b"s0"}},
        {"extents": {"first_rank": 256, "payload": b"s256"}},
        {"block": {"entries": [b"a", b"b"]}},
        {"block": {"entries": [b"c"]}},
    ]
    with scripted_server(
        GetMetadata=lambda *_: (metadata_pb2.GetMetadataResponse(**message) for message in messages)
    ) as server:
        stored = Client(server.target).get_metadata("llm/8b@7", "model.")
        assert b"model." == server.of("GetMetadata")[0].fqn_prefix
    assert (7, b"head", b"meta", ((0, b"s0"), (256, b"s256")), [b"a", b"b", b"c"]) == (
        stored.checkpoint.step,
        stored.head,
        stored.metadata_header,
        stored.segments,
        stored.blocks,
    )


def test_stream_without_a_header_is_the_servers_bug() -> None:
    """A stream that says nothing is no empty checkpoint."""
    with scripted_server(GetMetadata=lambda *_: iter(())) as server, pytest.raises(InternalError) as caught:
        Client(server.target).get_metadata("llm/8b@7")
    assert "MALFORMED_STREAM" == caught.value.reason
