"""Answers that readers keep on disk: how often a real server is asked, for how much, and that every answer is right."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardbook import Client
from shardbook._answers import Answers
from shardbook._disk_cache import DiskCache
from shardbook._transport import Rpc, StreamRpc, Transport
from shardbook.chunks import CheckpointChunks
from shardbook.config import ClientConfig
from shardbook.core.box import Box
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.names import CheckpointName
from shardbook.core.wanted import Wanted, decode_wanted
from shardbook.errors import NotFoundError, ShardbookError, UnavailableError
from shardbook.v1 import metadata_pb2
from shardbook_server.app import Server, running_server
from shardbook_server.rpc import convert
from tests.behaviour.rpc.api import Api, Job, Payload, api_of, payload, row, settings_in

#: More than any answer takes here that only says what a name means.
_SMALL_BYTES = 450


@dataclass
class Sent:
    """What was asked over the wire, and what came."""

    requests: list[Any] = field(default_factory=list)
    responses: list[Any] = field(default_factory=list)

    @property
    def questions(self) -> list[Any]:
        """Requests that were about more than the meaning of a name."""
        return [
            one for one in self.requests if not isinstance(one, metadata_pb2.QueryChunksRequest) or not _is_name(one)
        ]

    @property
    def response_bytes(self) -> int:
        """Of all answers."""
        return sum(one.ByteSize() for one in self.responses)

    def clear(self) -> None:
        """Forgets it."""
        self.requests.clear()
        self.responses.clear()


def _is_name(request: metadata_pb2.QueryChunksRequest) -> bool:
    return not decode_wanted(request.wanted).fqns


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Calls of this process; they reach the server all the same."""
    seen = Sent()
    call, collect = Transport.call, Transport.collect

    def note_call(self: Transport, rpc: Rpc[Any, Any], request: Any, **options: Any) -> Any:
        seen.requests.append(type(request).FromString(request.SerializeToString()))
        response = call(self, rpc, request, **options)
        seen.responses.append(response)
        return response

    def note_stream(self: Transport, rpc: StreamRpc[Any, Any], request: Any, **options: Any) -> Any:
        seen.requests.append(request)
        messages = collect(self, rpc, request, **options)
        seen.responses.extend(messages)
        return messages

    monkeypatch.setattr(Transport, "call", note_call)
    monkeypatch.setattr(Transport, "collect", note_stream)
    return seen


@pytest.fixture
def kept(server: Server, tmp_path: Path) -> Answers:
    """Answers of the module's server, kept in a directory of the test's own."""
    return Answers(Client(server.address), DiskCache(str(tmp_path / "cache"), 1 << 20), 30.0)


#: 60 tensors in rows of two ranks.
WORLD = [payload([row(f"layer.{number}.weight", rank, 2) for number in range(60)]) for rank in range(2)]


def world(shift: int) -> list[Payload]:
    """The same structure with extents of its own."""
    explicit = Extents(lengths=np.full(60, 64), starts=np.arange(60) * 64 + shift)
    return [replace(what, extents=encode_extents(explicit)) for what in WORLD]


def wanted(first: int = 0) -> Wanted:
    """Some rows of every tensor, which both ranks hold, and a name that is not there."""
    boxes = {f"layer.{number}.weight": [Box((3, 0), (2, 3))] for number in range(first, 60)}
    return Wanted.boxes_of({**boxes, "gone": []})


def named(run: str, what: object) -> CheckpointName:
    """A ref of the run."""
    return CheckpointName.parse(f"{run.removeprefix('projects/').replace('/runs', '')}@{what}")


def described(chunks: CheckpointChunks) -> list[object]:
    """All that an answer says."""
    columns = [value for name, value in vars(chunks.found).items() if name != "wanted"]
    plain = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns]
    return [*plain, chunks.location, chunks.prefix, chunks.metadata_header, chunks.name]


def asked(server: Server, name: CheckpointName, question: Wanted) -> list[object]:
    """What the server itself says."""
    return described(Client(server.address).query_chunks(name, question))


def test_a_second_load_takes_one_small_call(api: Api, kept: Answers, server: Server, run: str, sent: Sent) -> None:
    """The first is one call, as without a cache; the second, by another process too, asks what the name means."""
    Job.start(api, run).save(world=WORLD)
    name = named(run, "latest")
    expected = asked(server, name, wanted())
    sent.clear()
    assert expected == described(kept.chunks(name, wanted()))
    assert 1 == len(sent.requests)
    full_bytes = sent.response_bytes
    sent.clear()
    assert expected == described(replace(kept, client=Client(server.address)).chunks(name, wanted()))
    assert (1, []) == (len(sent.requests), sent.questions)
    assert sent.response_bytes < min(_SMALL_BYTES, full_bytes)


def test_the_next_checkpoint_takes_its_extents_alone(
    api: Api, kept: Answers, server: Server, run: str, sent: Sent
) -> None:
    """`latest` moved: what the structure says is on disk, and what comes is where the chunks lie now."""
    job = Job.start(api, run)
    job.save(1, WORLD)
    first = described(kept.chunks(named(run, "latest"), wanted()))
    found_bytes = len(sent.responses[0].found)
    for step in (2, 3):
        job.save(step, world(step))
        expected = asked(server, named(run, "latest"), wanted())
        assert expected != first
        sent.clear()
        assert expected == described(kept.chunks(named(run, "latest"), wanted()))
        assert (2, 1) == (len(sent.requests), len(sent.questions))
        assert b"" == sent.responses[-1].found
        assert 0 < len(sent.responses[-1].places) < found_bytes / 3
    sent.clear()
    assert first == described(kept.chunks(named(run, 1), wanted()))
    assert [] == sent.questions


def test_another_structure_or_question_is_asked_in_full(api: Api, kept: Answers, server: Server, run: str) -> None:
    """And what was kept of the others stays right."""
    job = Job.start(api, run)
    job.save(1, WORLD)
    job.save(2, [payload([row(f"layer.{n}.weight", rank, 2, columns=4) for n in range(50)]) for rank in range(2)])
    job.save(3, world(3))
    names = [named(run, step) for step in (1, 2, 3, 2, 1)]
    for question in (wanted(), wanted(20), Wanted.all_of(["layer.7.weight"]), Wanted.all_of(["gone"])):
        for name in names:
            assert asked(server, name, question) == described(kept.chunks(name, question))


def test_answers_in_pages(
    api: Api, kept: Answers, server: Server, run: str, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every page that is held is left out; a server that cuts pages otherwise sends what it has."""
    from shardbook_server.service import query

    job = Job.start(api, run)
    job.save(1, WORLD)
    job.save(2, world(2))
    job.save(3, world(3))
    monkeypatch.setattr(query, "PART_CHUNKS", 50)
    assert asked(server, named(run, 1), wanted()) == described(kept.chunks(named(run, 1), wanted()))
    sent.clear()
    second = described(kept.chunks(named(run, 2), wanted()))
    assert {b""} == {one.found for one in sent.responses}
    assert 3 < len(sent.responses)
    assert asked(server, named(run, 2), wanted()) == second
    monkeypatch.setattr(query, "PART_CHUNKS", 70)
    assert asked(server, named(run, 3), wanted()) == described(kept.chunks(named(run, 3), wanted()))
    assert second == described(kept.chunks(named(run, 2), wanted()))


def test_a_damaged_file_costs_a_call(api: Api, kept: Answers, server: Server, run: str, sent: Sent) -> None:
    """Cut, altered, or whole and no answer: asked anew, and right; then kept again."""
    Job.start(api, run).save(world=WORLD)
    name = named(run, 1)
    expected = described(kept.chunks(name, wanted()))
    assert kept.cache is not None
    entries = [path for path in kept.cache.root.glob("*/*") if path.name != "lock"]
    assert 2 == len(entries)
    for path in entries:
        for damage in ("cut", "altered", "of another release"):
            content = path.read_bytes()
            if damage == "of another release":
                kept.cache.put(path.parent.name, path.name, [b"\0SBXX\x09"])
            else:
                path.write_bytes(content[:-3] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
            sent.clear()
            assert expected == described(kept.chunks(name, wanted()))
            assert 1 == len(sent.questions)
            sent.clear()
            assert expected == described(kept.chunks(name, wanted()))
            assert [] == sent.questions


def test_the_cache_opens_nothing_that_the_server_would_not(api: Api, kept: Answers, run: str) -> None:
    """What a name means is asked each time: gone, not committed, and no server at all are told as ever."""
    job = Job.start(api, run)
    job.save(world=WORLD)
    kept.chunks(named(run, 1), wanted())
    for absent in (2, "1.s99"):
        with pytest.raises(NotFoundError):
            kept.chunks(named(run, absent), wanted())
    job.register(0, WORLD[0], step=5)
    with pytest.raises(ShardbookError, match="not COMMITTED"):
        kept.chunks(named(run, f"5.s{job.session}.a1"), wanted())
    nobody = replace(kept, client=Client("127.0.0.1:1", outage_s=0.1), deadline_s=1.0)
    with pytest.raises(UnavailableError):
        nobody.chunks(named(run, 1), wanted())


def test_two_services_with_the_same_names_do_not_mix(tmp_path: Path) -> None:
    """The same run, step, session, incarnation and structure, as after a restore that lost a commit: by the commit."""
    cache, incarnation = DiskCache(str(tmp_path / "cache"), 1 << 20), os.urandom(16)
    run = "projects/test/runs/same"
    answers, expected = [], []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        with running_server(settings_in(tmp_path / str(number))) as server, api_of(server.address) as api:
            job = Job(api, run, incarnation=incarnation)
            job = replace(job, session=job.start_session().session)
            job.save(1, world(100 * number))
            kept = Answers(Client(server.address), cache, 30.0)
            answers.append([described(kept.chunks(named(run, 1), wanted())) for _ in range(2)])
            expected.append([asked(server, named(run, 1), wanted())] * 2)
    assert expected == answers
    assert answers[0] != answers[1]


def test_everything_is_kept_likewise(api: Api, kept: Answers, server: Server, run: str, sent: Sent) -> None:
    """All entries, for planners of others: no stream the second time, and no blocks for the next checkpoint."""
    job = Job.start(api, run)
    for step in (1, 2):
        job.save(step, world(step))
        expected = Client(server.address).get_metadata(named(run, step))
        sent.clear()
        assert expected == kept.everything(named(run, step))
        assert (step == 1) == any(one.HasField("block") for one in sent.responses if hasattr(one, "block"))
        sent.clear()
        assert expected == kept.everything(named(run, step))
        assert (1, []) == (len(sent.requests), sent.questions)


def test_many_who_ask_at_once_share_one_fetch(api: Api, kept: Answers, server: Server, run: str, sent: Sent) -> None:
    """Eight readers that have nothing: one asks, seven ask what the name means. Again at the next checkpoint."""
    job = Job.start(api, run)
    for step in (1, 2):
        job.save(step, world(step))
        expected = asked(server, named(run, "latest"), wanted())
        sent.clear()
        found: list[object] = []
        start = threading.Barrier(8)

        def read(start: threading.Barrier = start, found: list[object] = found) -> None:
            start.wait()
            found.append(described(kept.chunks(named(run, "latest"), wanted())))

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [expected] * 8 == found
        assert 1 == len(sent.questions)


@pytest.mark.parametrize(
    "settings", [{"SHARDBOOK_CACHE": "off"}, {"SHARDBOOK_CACHE": "0"}, {"SHARDBOOK_CACHE_BYTES": "0"}]
)
def test_off_keeps_nothing(
    api: Api, server: Server, run: str, tmp_path: Path, sent: Sent, settings: dict[str, str]
) -> None:
    """One call each time, and no directory."""
    Job.start(api, run).save(world=WORLD)
    directory = tmp_path / "cache"
    environment = {"SHARDBOOK_SERVER": server.address, "SHARDBOOK_CACHE_DIR": str(directory), **settings}
    answers = Answers.of(ClientConfig.from_env(environment), 30.0)
    for _ in range(2):
        answers.chunks(named(run, 1), wanted())
    assert (2, False) == (len(sent.questions), directory.exists())
    on = Answers.of(ClientConfig.from_env({**environment, "SHARDBOOK_CACHE": "", "SHARDBOOK_CACHE_BYTES": ""}), 30.0)
    on.chunks(named(run, 1), wanted())
    assert directory.exists()


def test_a_server_that_cannot_answer_apart_is_asked_as_before(
    api: Api, kept: Answers, server: Server, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one ignores the field. Its answers are right, and not kept."""
    Job.start(api, run).save(world=WORLD)
    as_old = convert.query_payload

    def ignoring(request: metadata_pb2.QueryChunksRequest) -> bytes:
        request.apart, request.held_found_digest = False, b""
        return as_old(request)

    monkeypatch.setattr(convert, "query_payload", ignoring)
    expected = asked(server, named(run, 1), wanted())
    for _ in range(2):
        assert expected == described(kept.chunks(named(run, 1), wanted()))
