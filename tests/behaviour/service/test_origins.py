"""What commits tell of where their checkpoints come from: once a session, and never a reason to refuse one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shardbook.core import limits
from shardbook.core.lineage import LineageKind, Origin
from shardbook.errors import InvalidArgumentError
from shardbook_server.service.describing import Description
from shardbook_server.service.lineage import EdgeRequest, LineageDirection
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from shardbook_server.storage import lineage as lineage_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.lineage import LOCK, Ends
from tests.behaviour.service.saves import Job, Model, whole
from tests.databases import opened

RESUMED, TUNED, CONVERTED, _ = LineageKind


def origin(kind: LineageKind, source: str) -> Description:
    """What a commit says."""
    return Description(origins=(Origin(kind, source),))


def save(job: Job, step: int, description: Description, attempt: int = 1) -> CheckpointInfo:
    """A save whose commit says where it comes from."""
    job.register(step, whole(job.model), attempt)
    return job.services.commits.commit(job.key(step, attempt), description)


def above(services: Services, ref: str) -> list[tuple[str, str, str, bool]]:
    """The edges of a checkpoint itself to what it comes from."""
    edges = services.lineage.list(ref, direction=LineageDirection.UP).items
    return [(edge.subject.ref, edge.kind.label, edge.object.ref, edge.told) for edge in edges]


def test_a_commit_says_where_it_comes_from(job: Job, other_job: Callable[[], Job]) -> None:
    """In the transaction that commits it, whatever project its origin is of."""
    base = Job(job.services, Model(1), run="projects/base/runs/7b")
    base.start()
    base.save(9)
    job.save(1)
    tuned = other_job()
    tuned.start(on_live=OnLive.TAKEOVER)
    said = Description(origins=(Origin(TUNED, "base/7b@latest"), Origin(RESUMED, "llm/8b@1"), Origin(TUNED, "hub/x")))
    assert "llm/8b@2" == save(tuned, 2, said).ref
    assert above(job.services, "llm/8b@2") == [
        ("llm/8b@2", "fine_tuned_from", "base/7b@9", True),
        ("llm/8b@2", "resumed_from", "llm/8b@1", True),
        ("llm/8b@2", "fine_tuned_from", "hub/x", True),
    ]
    # The job goes on without saying it again; those checkpoints lead to the one that does.
    tuned.save(3)
    info = job.services.lineage.get("llm/8b@3")
    assert info.session_begin is not None
    assert ((), "llm/8b@2") == (info.ancestors, info.session_begin.ref)
    assert None is job.services.lineage.get("llm/8b@2").session_begin
    assert None is job.services.lineage.get("llm/8b@1").session_begin


def test_an_origin_is_recorded_once_a_session(job: Job, other_job: Callable[[], Job]) -> None:
    """Whichever commits of it say it, and however they come in; the next session says it anew."""
    job.save(1)
    first = save(job, 2, origin(RESUMED, "llm/8b@1"))
    assert first == job.services.commits.commit(job.key(2), origin(RESUMED, "llm/8b@1"))
    save(job, 3, origin(RESUMED, "projects/llm/runs/8b/parts/default/checkpoints/1.s1.a1"))
    job.record(4, description=origin(RESUMED, "llm/8b@1"))
    assert [1, 0, 0] == [len(above(job.services, f"llm/8b@{step}")) for step in (2, 3, 4)]
    # Another origin is another matter, and so is the same one told by a restarted job.
    save(job, 5, origin(TUNED, "llm/8b@1"))
    again = other_job()
    again.start(on_live=OnLive.TAKEOVER)
    save(again, 6, origin(RESUMED, "llm/8b@1"))
    assert [1, 1] == [len(above(job.services, f"llm/8b@{step}")) for step in (5, 6)]


def test_an_attempt_that_never_commits_records_nothing(job: Job) -> None:
    """The next one says it again, and that counts."""
    job.save(1)
    job.register(2, whole(job.model))
    job.services.commits.abort(job.key(2), "given up")
    save(job, 2, origin(RESUMED, "llm/8b@1"), attempt=2)
    (edge,) = job.services.lineage.list("llm/8b@2").items
    assert "llm/8b@2" == edge.subject.ref


def test_an_origin_of_the_same_step_is_the_one_that_was_live(job: Job, other_job: Callable[[], Job]) -> None:
    """A rollback that saves its own step again comes from the attempt that it takes the place of."""
    job.save(1)
    again = other_job()
    again.start(on_live=OnLive.TAKEOVER, resumed_from="llm/8b@1")
    save(again, 1, origin(RESUMED, "llm/8b@1"))
    assert [("llm/8b@1", "resumed_from", "llm/8b@1.s1.a1", True)] == above(job.services, "llm/8b@1")


@pytest.mark.parametrize("source", ["llm/none@5", "llm/8b@77", "llm/8b@best", "llm/8b@5.s1.a1", "a path", "/x/y@z"])
def test_what_the_catalogue_does_not_have_is_kept_by_name(job: Job, source: str) -> None:
    """It is no reason to refuse a save: a name of nothing, an alias of nothing, an attempt that is still open."""
    job.register(5, whole(job.model)[:1])
    assert CheckpointState.COMMITTED is save(job, 2, origin(RESUMED, source)).state
    assert [("llm/8b@2", "resumed_from", source, True)] == above(job.services, "llm/8b@2")
    job.services.lineage.remove(EdgeRequest("llm/8b@2", RESUMED, source))
    assert [] == above(job.services, "llm/8b@2")


@pytest.mark.parametrize("source", ["llm/8b@3", "llm/8b@3.s1", "llm/8b@3.s1.a1"])
def test_a_name_is_linked_once_its_checkpoint_is_committed(job: Job, source: str) -> None:
    """`sync` records in any order: what came first by name leads to the checkpoint that comes later."""
    save(job, 9, origin(RESUMED, source))
    job.save(3)
    (edge,) = job.services.lineage.list("llm/8b@3", direction=LineageDirection.DOWN).items
    assert ("llm/8b@9", "llm/8b@3", True) == (edge.subject.ref, edge.object.ref, edge.told)
    assert CheckpointState.COMMITTED is edge.object.state
    job.save(4)
    assert 1 == len(job.services.lineage.list("llm/8b@9").items)


def test_a_name_is_linked_by_hand_too(database: Database, job: Job) -> None:
    """Where its checkpoint was committed beside the commit that told it: the same edge, with its other end."""
    job.save(1)
    made = job.save(2)
    name = "projects/llm/runs/8b/parts/default/checkpoints/1.s1.a1"
    with database.write(lock=LOCK) as connection:
        ends = Ends(RESUMED, None, made.checkpoint_id, name)
        edge_id = lineage_rows.insert_edge(connection, ends, job.incarnation, 1).id
    linked = job.services.lineage.add(EdgeRequest("llm/8b@2", RESUMED, "llm/8b@1"))
    assert (edge_id, True, "llm/8b@1") == (linked.id, linked.told, linked.object.ref)
    assert (linked,) == job.services.lineage.list("llm/8b@1").items


def test_what_would_close_a_cycle_is_left_out(job: Job) -> None:
    """By its own name, or by a name that was linked too late: the save is committed all the same."""
    assert CheckpointState.COMMITTED is save(job, 1, origin(RESUMED, "llm/8b@1.s1.a1")).state
    save(job, 5, origin(RESUMED, "llm/8b@6.s1.a1"))
    assert CheckpointState.COMMITTED is save(job, 6, origin(TUNED, "llm/8b@5")).state
    assert [("llm/8b@6", "fine_tuned_from", "llm/8b@5", True)] == above(job.services, "llm/8b@6")
    assert [("llm/8b@5", "resumed_from", "llm/8b@6.s1.a1", True)] == above(job.services, "llm/8b@5")


def test_what_an_alias_meant_is_not_guessed_afterwards(job: Job) -> None:
    """A save that is recorded late keeps the name; a step means the same still."""
    job.save(1)
    job.record(2, description=origin(RESUMED, "llm/8b@latest"))
    assert [("llm/8b@2", "resumed_from", "llm/8b@latest", True)] == above(job.services, "llm/8b@2")
    (edge,) = job.services.lineage.list("llm/8b@2").items
    assert "" == edge.object.checkpoint


def test_a_commit_without_origins_waits_for_nobody(database: Database, job: Job) -> None:
    """Lineage that is being written elsewhere does not hold up saves; SQLite's writers follow each other anyway."""
    save(job, 1, origin(RESUMED, "a name"))
    with opened(database.url) as other:
        saving = replace(job, services=build_services(other))
        if database.backend.single_writer:
            assert CheckpointState.COMMITTED is saving.save(2).state
            return
        with database.write(lock=LOCK):
            assert CheckpointState.COMMITTED is saving.save(2).state


def test_origins_are_checked() -> None:
    """What cannot be kept is refused where it comes in, with its field."""
    with pytest.raises(InvalidArgumentError) as caught:
        Description(origins=tuple(Origin(RESUMED, f"n{at}") for at in range(limits.MAX_ORIGINS + 1)))
    assert ("LIMIT_EXCEEDED", "origins") == (caught.value.reason, caught.value.violations[0].field)
    assert 1 == len(Description(origins=(Origin(RESUMED, "n"),) * 40).origins)
