"""What a save costs once its structure is known: digests and extents, no geometry and no structure read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from shardbook.core.structure import BlobKind, encode_structure
from shardbook_server.service import decisions, folding
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.types import BlobRef
from shardbook_server.service.views import CheckpointInfo, PlanState
from shardbook_server.storage import blobs as blob_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.tables import rank_structures, save_plans, structure_tensors
from tests.behaviour.service.saves import Job, Model, RankBlobs, blobs_of, fine, whole


@contextmanager
def _nothing_new() -> Iterator[None]:
    """Within the block nothing is decided, assembled, or read of a structure."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("that costs more than a steady save may")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions, "decide", refuse)
        patch.setattr(folding, "Assembly", refuse)
        patch.setattr(blob_rows, "read_payloads", refuse)
        patch.setattr(blob_rows, "insert_blobs", _only_nothing)
        yield


def _only_nothing(_: object, __: int, news: Sequence[object], ___: int) -> None:
    assert not list(news)


def _by_digest(job: Job, services: Services, step: int, bytes_length: int = 900) -> CheckpointInfo:
    """A save whose ranks send digests and extents alone."""
    planned = fine(services.plans.plan_batch([job.plan_entry(step, blobs) for blobs in whole(job.model)]))
    answers = [services.plans.decide(planned[0].checkpoint_id, rank) for rank in range(job.model.world_size)]
    assert {PlanState.DECIDED} == {answer.state for answer in answers}
    kept = [blobs_of(job.model, rank, answer.drop, bytes_length) for rank, answer in enumerate(answers)]
    registered = fine(services.registrations.register_batch([job.entry(step, blobs) for blobs in kept]))
    assert [()] * job.model.world_size == [answer.unknown for answer in registered]
    return services.commits.commit(job.key(step))


def _first_save(job: Job) -> CheckpointInfo:
    drops = job.decide(1)
    job.register(1, [blobs_of(job.model, rank, drop) for rank, drop in enumerate(drops)])
    return job.commit(1)


def _content(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (rank_structures, structure_tensors, save_plans)
        }


def test_a_known_structure_costs_digests_alone(job: Job, database: Database) -> None:
    """Rule: one PlanSave digest and one RegisterShards a rank, one commit; also after a restart of the server."""
    first = _first_save(job)
    before = _content(database)
    with _nothing_new():
        again = _by_digest(job, job.services, 2)
        restarted = _by_digest(job, build_services(database), 3)
    assert [first.structure_digest] * 2 == [again.structure_digest, restarted.structure_digest]
    assert before == _content(database)


def test_a_bytes_entry_that_grows_changes_no_structure(job: Job, database: Database) -> None:
    """Rule: lengths of bytes entries are extents: a longer one costs its length, not a structure."""
    first = _first_save(job)
    with _nothing_new():
        grown = _by_digest(job, job.services, 2, bytes_length=901)
    assert (first.structure_digest, first.size_bytes + 1) == (grown.structure_digest, grown.size_bytes)


def test_another_job_of_the_project_begins_where_this_one_is(job: Job, database: Database) -> None:
    """Rule: structures and decisions are the project's: a job of the same shape never had a cold save."""
    first = _first_save(job)
    cousin = Job(build_services(database), job.model, run="projects/llm/runs/cousin")
    cousin.start()
    with _nothing_new():
        assert first.structure_digest == _by_digest(cousin, cousin.services, 1).structure_digest


def test_of_a_rank_that_changes_only_its_own_structure_travels(database: Database, job: Job) -> None:
    """Rule: the other ranks' structures stay known, and only the tensors it shares are stored anew."""
    wide = Job(job.services, Model(8, sharded=6), run="projects/llm/runs/wide")
    wide.start()
    wide.register(1, whole(wide.model))
    wide.commit(1)
    before = _content(database)
    # Rank 5 writes its boxes in another order: other bytes of the structure, the same chunks.
    ranks = whole(wide.model)
    changed = _reordered(wide.model, 5)
    ranks[5] = changed
    asked = fine(wide.services.registrations.register_batch([wide.entry(2, blobs) for blobs in ranks]))
    assert {5: (BlobRef(BlobKind.STRUCTURE, changed.structure.digest),)} == {
        rank: answer.unknown for rank, answer in enumerate(asked) if answer.unknown
    }
    wide.register(2, [changed])
    wide.commit(2)
    after = _content(database)
    assert 1 == after["rank_structures"] - before["rank_structures"]
    # The sharded tensors, whose fifth chunk lies elsewhere now; not the one and the bytes that rank 0 writes.
    assert 6 == after["structure_tensors"] - before["structure_tensors"]


def _reordered(model: Model, rank: int) -> RankBlobs:
    structure = model.structure(rank)
    turned = replace(structure, order=structure.order[::-1].copy())
    blobs = blobs_of(model, rank)
    return replace(blobs, structure=encode_structure(turned, blobs.plan.digest))
