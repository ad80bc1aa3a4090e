"""QueryChunks at the service: what it finds, what it reads of the database, what it keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import event

from shardbook.core.box import Box
from shardbook.core.extents import encode_volatile
from shardbook.core.found import FoundChunks, decode_part, merge
from shardbook.core.head import decode_head
from shardbook.core.wanted import Wanted, encode_wanted
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from shardbook_server.service import query
from shardbook_server.service.query import QueryService
from shardbook_server.service.services import Services
from shardbook_server.service.views import QueryView
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, blobs_of, fine, whole


def parts(service: QueryService, name: str, wanted: Wanted) -> list[QueryView]:
    """All pages of an answer."""
    pages = [service.query_chunks(name, encode_wanted(wanted))]
    while token := pages[-1].next_page_token:
        pages.append(service.query_chunks(name, encode_wanted(wanted), page_token=token))
    return pages


def ask(service: QueryService, name: str, wanted: Wanted) -> FoundChunks:
    """The whole answer as one."""
    return merge(wanted, [decode_part(view.found) for view in parts(service, name, wanted) if view.found])


def rows(fqn: str, first: int, end: int) -> Wanted:
    """Some rows of a tensor."""
    return Wanted.boxes_of({fqn: [Box((first, 0), (end - first, 4))]})


@pytest.fixture
def reads(database: Database) -> Iterator[list[str]]:
    """Statements made meanwhile, with their parameters."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        seen.append(f"{statement} {parameters}")

    event.listen(database.backend.readers, "before_cursor_execute", note)
    yield seen
    event.remove(database.backend.readers, "before_cursor_execute", note)


def test_chunks_come_with_their_places(job: Job) -> None:
    """The rows that two ranks wrote, in one question with an entry that is no tensor and one that is not there."""
    info = job.save(1)
    wanted = Wanted.boxes_of({"extra": [], "gone": [], "model.w1": [Box((1, 0), (2, 4))]})
    (view,) = parts(job.services.queries, "llm/8b@1", wanted)
    assert job.services.catalog.get_attempt(info.checkpoint_id) == view.checkpoint
    found = merge(wanted, [decode_part(view.found)])
    assert ([True, False, True], [1, 0, 2]) == (found.found.tolist(), found.chunk_counts.tolist())
    assert [0, 2, 2] == found.tensor.tolist()
    assert [-1, 0, 0] == found.box.tolist()
    assert [[0, 0], [2, 0]] == found.offsets[1:].tolist()
    prefix = info.location.prefix
    assert [f"{prefix}/__{rank}_0.distcp" for rank in (0, 0, 1)] == [found.paths[at] for at in found.file.tolist()]
    assert ([6112, 1532, 1532], [900, 1532, 1532]) == (found.start.tolist(), found.length.tolist())


@pytest.mark.parametrize("name", ["@1", "@latest", "@1.s1", "@1.s1.a1"])
def test_a_name_means_the_same_to_a_question_as_to_the_catalogue(job: Job, reads: list[str], name: str) -> None:
    """What loaders ask by is found by one statement, and answered as by the catalogue; so are the other names."""
    job.save(1)
    ask(job.services.queries, f"llm/8b{name}", Wanted.all_of(()))
    reads.clear()
    (view,) = parts(job.services.queries, f"llm/8b{name}", Wanted.all_of(()))
    statements = [one for one in reads if one.startswith("SELECT") and "checkpoints" in one]
    expected, found = job.services.catalog.get_checkpoint(f"llm/8b{name}"), view.checkpoint
    assert (expected.name, expected.ref, expected.state) == (found.name, found.ref, found.state)
    assert (expected.location, expected.live) == (found.location, found.live)
    assert (expected.structure_digest, expected.commit_time_us) == (found.structure_digest, found.commit_time_us)
    if name in ("@1", "@latest"):
        assert 1 == len(statements)


@pytest.mark.parametrize("name", ["llm/8b@2", "llm/8b@latest", "llm/other@latest", "llm/8b:part@1"])
def test_a_name_of_nothing_committed_is_told_as_one(job: Job, name: str) -> None:
    """An attempt that is open is no checkpoint yet, whatever names it."""
    job.register(2, whole(job.model)[:1])
    with pytest.raises(NotFoundError):
        parts(job.services.queries, name, Wanted.all_of(()))


def test_nothing_is_found_of_nothing(job: Job) -> None:
    """Names that are not there are no error, and neither is a question about nothing."""
    job.save(1)
    for fqns in ((), ("gone",)):
        assert not ask(job.services.queries, "llm/8b@1", Wanted.all_of(fqns)).found.any()


def test_properties_of_what_is_wanted_whole(services: Services) -> None:
    """Those of the rank that owns an entry's first chunk; extents of boxes alone say nothing of them."""
    job = Job(services, Model(2))
    job.start()
    flags = np.array([True, False, True, False, False])
    ranks = whole(job.model)
    for rank, blobs in enumerate(ranks):
        volatile = encode_volatile(flags if rank == 0 else ~flags, np.zeros(5, np.bool_))
        entry = job.entry(1, blobs, job.check(blobs))
        registration = replace(entry.registration.registration, volatile_properties=volatile)
        fine(
            services.registrations.register_batch(
                [replace(entry, registration=replace(entry.registration, registration=registration))]
            )
        )
    job.commit(1)
    found = ask(services.queries, "llm/8b@1", Wanted.all_of(["model.w0", "model.w1", "model.w2"]))
    assert [True, False, True] == found.requires_grad.tolist()
    mixed = ask(services.queries, "llm/8b@1", rows("model.w0", 2, 4))
    assert [False] == mixed.requires_grad.tolist()


def test_only_owners_segments_are_read(services: Services, reads: list[str]) -> None:
    """Of 600 ranks' extents, those of 256; and nothing at all but the checkpoint's name when it is asked again."""
    job = Job(services, Model(600, sharded=1), run="projects/llm/runs/wide")
    job.start()
    job.register(1, [blobs_of(job.model, rank) for rank in range(600)])
    job.commit(1)
    reads.clear()
    wanted = rows("model.w0", 2 * 300, 2 * 302)
    found = ask(services.queries, "llm/wide@1", wanted)
    again = ask(services.queries, "llm/wide@1", wanted)
    assert ["__300_0.distcp", "__301_0.distcp"] == [path.rpartition("/")[2] for path in found.paths]
    assert found.start.tolist() == again.start.tolist()
    (segments,) = [statement for statement in reads if "extent_segments" in statement]
    assert re.findall(r"\b(0|256|512)\b", segments) == ["256"]
    assert 1 == sum("payload" in statement and "structure_tensors" in statement for statement in reads)


def test_checkpoints_of_one_structure_share_what_is_decoded(job: Job, reads: list[str]) -> None:
    """A run saves the same structure thousands of times; each has extents of its own."""
    job.save(1)
    job.register(2, whole(job.model, bytes_length=77))
    job.commit(2)
    ask(job.services.queries, "llm/8b@1", Wanted.all_of(["extra"]))
    reads.clear()
    assert [77] == ask(job.services.queries, "llm/8b@2", Wanted.all_of(["extra"])).length.tolist()
    assert not [statement for statement in reads if "structure_tensors" in statement]


def test_pages_and_parts_make_one_answer(database: Database, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """However entries are decoded together, and however an answer is cut."""
    job.model = Model(2, sharded=7)
    job.save(1)
    fqns = [f"model.w{number}" for number in (6, 0, 3, 5, 1)]
    expected = ask(job.services.queries, "llm/8b@1", Wanted.all_of(fqns))
    monkeypatch.setattr(query, "PART_CHUNKS", 3)
    service = QueryService(database, cache_bytes=1 << 20, page_chunks=3)
    assert 1 < len(parts(service, "llm/8b@1", Wanted.all_of(fqns)))
    actual = ask(service, "llm/8b@1", Wanted.all_of(fqns))
    for name in ("found", "tensor", "box", "index", "offsets", "sizes", "start", "length", "shapes"):
        assert getattr(expected, name).tolist() == getattr(actual, name).tolist(), name
    assert [expected.paths[at] for at in expected.file] == [actual.paths[at] for at in actual.file]


def test_a_cache_that_is_too_small_costs_time_alone(database: Database, job: Job) -> None:
    """Nothing is kept, and the answer is the same."""
    job.save(1)
    service = QueryService(database, cache_bytes=0)
    for _ in range(2):
        assert [0, 1532] == ask(service, "llm/8b@1", Wanted.all_of(["model.w0", "model.w1"])).start[::2].tolist()


def test_a_page_token_that_is_none(job: Job) -> None:
    """Refused by its field; one that was made up finds nothing that may not be found."""
    job.save(1)
    wanted = encode_wanted(Wanted.all_of(["model.w0"]))
    for token in ("x", "1", "1.x", "-1.0", "1.2.3", "9" * 5000 + ".0", "\u00b2.0"):
        with pytest.raises(InvalidArgumentError) as caught:
            job.services.queries.query_chunks("llm/8b@1", wanted, page_token=token)
        assert ["page_token"] == [violation.field for violation in caught.value.violations]
    assert b"" == job.services.queries.query_chunks("llm/8b@1", wanted, page_token="7.7").found


def test_rows_that_are_others_are_never_taken_for_what_they_were(database: Database, job: Job) -> None:
    """After a failover that lost commits, the same row ids may hold something else: said, and asked anew."""
    job.save(1)
    service = QueryService(database, cache_bytes=1 << 20, page_chunks=1)
    ask(service, "llm/8b@1", Wanted.all_of(["model.w0"]))
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE structure_tensors SET digest = payload WHERE fqn_text = 'model.w1'")
    with pytest.raises(UnavailableError) as caught:
        ask(service, "llm/8b@1", Wanted.all_of(["model.w1"]))
    assert "DATABASE_CONFLICT" == caught.value.reason
    ask(service, "llm/8b@1", Wanted.all_of(["model.w1"]))


def test_the_head_is_answered_when_it_is_asked_for(job: Job) -> None:
    """Key paths of all entries, for planners that look at them."""
    job.save(1)
    wanted = encode_wanted(Wanted.all_of([]))
    assert b"" == job.services.queries.query_chunks("llm/8b@1", wanted).head
    head = job.services.queries.query_chunks("llm/8b@1", wanted, include_head=True).head
    assert 2 == len(decode_head(head).rank_files.index)


def test_what_cannot_be_asked(job: Job) -> None:
    """Names as everywhere; a box that does not fit is named."""
    job.register(1, whole(job.model))
    wanted = Wanted.all_of(["model.w0"])
    with pytest.raises(FailedPreconditionError):
        ask(job.services.queries, "llm/8b@1.s1.a1", wanted)
    with pytest.raises(NotFoundError):
        ask(job.services.queries, "llm/8b@1", wanted)
    job.commit(1)
    for bad, field in (
        (rows("model.w0", 0, 5), "wanted.boxes[0]"),
        (Wanted.boxes_of({"extra": [], "model.norm": [Box((0, 0), (1, 1))]}), "wanted.boxes[0]"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            ask(job.services.queries, "llm/8b@1", bad)
        assert [field] == [violation.field for violation in caught.value.violations]
