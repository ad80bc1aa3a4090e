"""QueryChunks over the wire, by stubs and by the client."""

from __future__ import annotations

import numpy as np
import pytest

from shardbook import Client
from shardbook.core import limits
from shardbook.core.box import Box
from shardbook.core.columns import frame
from shardbook.core.wanted import Wanted, encode_wanted
from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook.v1 import metadata_pb2
from shardbook_server.app import Server
from tests.behaviour.rpc.api import Api, Job, fields, payload, refusal, row


@pytest.fixture
def client(server: Server) -> Client:
    """A client of the module's server."""
    return Client(server.address)


def test_the_client_asks_for_boxes_of_many_tensors(api: Api, client: Client, run: str) -> None:
    """Rows that two ranks hold, a name that is not there, and the checkpoint that the alias meant."""
    job = Job.start(api, run)
    saved = job.save()
    ref = run.removeprefix("projects/").replace("/runs", "")
    wanted = Wanted.boxes_of({"gone": [], "w": [Box((3, 0), (2, 3)), Box((0, 1), (1, 1))]})
    chunks = client.query_chunks(f"{ref}@latest", wanted)
    assert (saved.name, "/ckpt/step-1", saved.location.prefix) == (chunks.name, chunks.location, chunks.prefix)
    found = chunks.found
    assert ([False, True], [1, 1, 1], [0, 0, 1]) == (found.found.tolist(), found.tensor.tolist(), found.box.tolist())
    assert ((8, 3), [[0, 0], [4, 0], [0, 0]]) == (found.shape_of(1), found.offsets.tolist())
    assert [f"{chunks.prefix}/__{rank}_0.distcp" for rank in (0, 1, 0)] == [found.paths[at] for at in found.file]
    again = client.query_chunks(chunks.name, wanted)
    assert found.start.tolist() == again.found.start.tolist()


def test_a_large_answer_comes_in_pages(api: Api, client: Client, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put together, it is one."""
    from shardbook_server.service import query

    monkeypatch.setattr(query, "PART_CHUNKS", 1)
    job = Job.start(api, run)
    name = job.save(world=[payload([row("a", rank, 2), row("b", rank, 2)]) for rank in range(2)]).name
    wanted = Wanted.all_of(["b", "gone", "a"])
    first = api.metadata.QueryChunks(metadata_pb2.QueryChunksRequest(name=name, wanted=encode_wanted(wanted)))
    assert first.next_page_token
    found = client.query_chunks(name, wanted).found
    assert ([0, 0, 2, 2], [0, 1, 0, 1]) == (found.tensor.tolist(), found.index.tolist())
    assert [64, 64, 0, 0] == found.start.tolist()


def test_refusals_name_the_field(api: Api, client: Client, run: str) -> None:
    """Damaged, too large, misfitting, and about nothing."""
    name = Job.start(api, run).save().name

    def ask(wanted: bytes) -> list[str]:
        request = metadata_pb2.QueryChunksRequest(name=name, wanted=wanted)
        error = refusal(lambda: api.metadata.QueryChunks(request))
        assert "INVALID_ARGUMENT" == error.status
        return fields(error)

    good = encode_wanted(Wanted.all_of(["w"]))
    for damaged in (b"", b"\x01garbage", good[:-1], good + b"\0", frame(b"SBWQ\x02")):
        assert ["wanted"] == ask(damaged)
    assert ["wanted"] == ask(bytes(limits.MAX_QUERY_BYTES + 1))
    assert ["wanted.boxes[1]"] == ask(encode_wanted(Wanted.boxes_of({"w": [Box((0, 0), (1, 1)), Box((8, 0), (1, 3))]})))
    with pytest.raises(InvalidArgumentError):
        client.query_chunks(name, Wanted.boxes_of({"w": [Box((0,), (1,))]}))
    with pytest.raises(NotFoundError):
        client.query_chunks(f"{run.split('/')[1]}/none@1", Wanted.all_of(["w"]))


def test_counts_that_do_not_fit(api: Api, run: str) -> None:
    """Boxes that belong to no tensor, of any number: refused before anything is looked up."""
    name = Job.start(api, run).save().name
    wanted = Wanted.boxes_of({"w": [Box((0, 0), (1, 1))]})
    for count in (0, 2, 2**62, -1):
        object.__setattr__(wanted, "box_counts", np.array([count]))
        object.__setattr__(wanted, "tensor_of_box", np.zeros(1, np.int64))
        request = metadata_pb2.QueryChunksRequest(name=name, wanted=encode_wanted(wanted))
        error = refusal(lambda request=request: api.metadata.QueryChunks(request))
        assert ("INVALID_ARGUMENT", ["wanted.box_counts"]) == (error.status, fields(error))
