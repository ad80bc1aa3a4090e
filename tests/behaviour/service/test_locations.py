"""Locations of checkpoints: who moves what, when, and who sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardbook.core import limits
from shardbook.core.wanted import Wanted, encode_wanted
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from shardbook_server.service.locations import Move
from shardbook_server.service.services import Services
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import tables
from shardbook_server.storage.database import Database
from shardbook_server.storage.events import EventKind
from tests.behaviour.service.saves import Job, whole


def at(one: CheckpointInfo) -> list[str]:
    """Where a checkpoint is."""
    return [one.location.location, *one.other_locations]


def to(one: CheckpointInfo, location: str, *, keep: bool = False) -> Move:
    """A move of it."""
    return Move(one.name, one.location.location, location, keep)


def moved_events(database: Database) -> list[int]:
    """Checkpoints that events call moved."""
    with database.read() as connection:
        stored = event_rows.read_after(connection, 0, 100)
    return [one.event.checkpoint_id for one in stored if one.event.kind is EventKind.MOVED]


def row_count(database: Database) -> int:
    """Rows of further locations."""
    with database.read() as connection:
        return len(connection.execute(tables.locations.select()).all())


def test_a_move_is_seen_by_everyone_who_asks(job: Job, database: Database) -> None:
    """Listings, one checkpoint, loaders' questions and metadata; and it is an event."""
    one, other = job.save(1), job.save(2)
    before = at(other)
    answer = job.services.locations.move([to(one, "archive:step-1")])
    assert [["archive:step-1"]] == list(map(at, answer))
    catalog, ref = job.services.catalog, "llm/8b@1"
    listed = catalog.list_checkpoints("projects/llm/runs/8b/parts/default").items
    assert [before, ["archive:step-1"]] == list(map(at, listed))
    views = [
        catalog.get_checkpoint(ref),
        job.services.queries.query_chunks(one.name, _question()).checkpoint,
        next(job.services.metadata.get_metadata(one.name)).checkpoint,  # type: ignore[union-attr]
    ]
    assert [["archive:step-1"]] * 3 == list(map(at, views))
    assert [one.checkpoint_id] == moved_events(database)
    assert 0 == row_count(database)


def _question() -> bytes:
    return encode_wanted(Wanted.all_of(()))


def test_locations_are_added_in_order(job: Job, database: Database) -> None:
    """Behind the others; a move without ``keep`` makes one the only one, also one that it had."""
    one = job.save(1)
    first = one.location.location
    for location in ("z:1", "archive:1", "s3://bucket/1"):
        job.services.locations.move([to(one, location, keep=True)])
    assert [first, "z:1", "archive:1", "s3://bucket/1"] == at(job.services.catalog.get_checkpoint("llm/8b@1"))
    assert 3 == row_count(database)
    job.services.locations.move([to(one, "archive:1")])
    assert ["archive:1"] == at(job.services.catalog.get_checkpoint("llm/8b@1"))
    assert 0 == row_count(database)


@pytest.mark.parametrize("keep", [True, False])
def test_the_same_again_changes_nothing(job: Job, database: Database, keep: bool) -> None:
    """A client whose answer was lost may say it again: one effect, one event."""
    one = job.save(1)
    first = job.services.locations.move([to(one, "archive:1", keep=keep)])
    assert first == job.services.locations.move([to(one, "archive:1", keep=keep)])
    assert 1 == len(moved_events(database))


def test_who_looked_at_another_place_moves_nothing(job: Job, database: Database) -> None:
    """All of a call or none: what the second says of the first place of its checkpoint is out of date."""
    one, other = job.save(1), job.save(2)
    job.services.locations.move([to(other, "elsewhere:2")])
    with pytest.raises(FailedPreconditionError) as caught:
        job.services.locations.move([to(one, "archive:1"), to(other, "archive:2")])
    assert ("LOCATION_CHANGED", "moves[1].from_location") == (caught.value.reason, caught.value.violations[0].field)
    assert at(one) == at(job.services.catalog.get_checkpoint("llm/8b@1"))
    assert [other.checkpoint_id] == moved_events(database)


def test_what_is_being_saved_is_not_touched(job: Job) -> None:
    """It goes where it goes, and is committed there while the run is moved."""
    one = job.save(1)
    job.register(2, whole(job.model))
    opened = replace(to(one, "archive:2"), name=f"projects/llm/runs/8b/parts/default/checkpoints/2.s{one.session}.a1")
    with pytest.raises(FailedPreconditionError) as caught:
        job.services.locations.move([opened])
    assert ("NOT_COMMITTED", "moves[0].name") == (caught.value.reason, caught.value.violations[0].field)
    job.services.locations.move([to(one, "archive:1")])
    committed = job.commit(2)
    assert CheckpointState.COMMITTED is committed.state
    assert [job.location(2).location] == at(committed)
    # Ranks whose answers were lost say again where they wrote, and are answered as ever.
    job.register(1, whole(job.model))
    assert ["archive:1"] == at(job.commit(1)) == at(job.record(1))


def test_a_superseded_one_is_moved_by_its_own_name(job: Job, services: Services) -> None:
    """A move names attempts, not steps."""
    one = job.save(1)
    with pytest.raises(InvalidArgumentError):
        Move("projects/llm/runs/8b/parts/default/checkpoints/1", one.location.location, "archive:1")
    with pytest.raises(NotFoundError):
        services.locations.move([Move(one.name.replace("1.s", "9.s"), "x", "archive:1")])


def test_limits(job: Job) -> None:
    """Of locations, of a call, and each once."""
    one = job.save(1)
    for number in range(limits.MAX_LOCATIONS - 1):
        job.services.locations.move([to(one, f"archive:{number}", keep=True)])
    with pytest.raises(ResourceExhaustedError, match="limit is 8"):
        job.services.locations.move([to(one, "archive:more", keep=True)])
    with pytest.raises(InvalidArgumentError):
        job.services.locations.move([to(one, "a:1"), to(one, "b:1")])
    with pytest.raises(InvalidArgumentError):
        job.services.locations.move([to(one, "a:1")] * (limits.MAX_MOVES + 1))
    assert [] == job.services.locations.move([])


@pytest.mark.parametrize("location", ["", "s3://me:secret@bucket/x", "archive:../x", "https://h/x?sig=secret"])
def test_bad_places(job: Job, location: str) -> None:
    """As for a save."""
    one = job.save(1)
    with pytest.raises(InvalidArgumentError) as caught:
        to(one, location)
    assert "to_location" == caught.value.violations[0].field
    assert "secret" not in caught.value.message


def test_who_deletes_files_is_told_who_shares_any_of_the_places(job: Job, services: Services) -> None:
    """Whether it is their first one or not."""
    one, other, third = job.save(1), job.save(2), job.save(3)
    services.locations.move([to(one, "archive:x", keep=True), to(other, "archive:x", keep=True)])
    services.locations.move([to(third, "archive:x")])
    services.deletions.delete(one.name, files=True)
    _, sharing = services.deletions.record_files(one.name, [], done=False)
    assert sorted([other.name, third.name]) == sorted(sharing)
