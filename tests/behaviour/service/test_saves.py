"""A save from the first plan to the commit."""

from __future__ import annotations

from tests.behaviour.service.saves import Job, blobs_of, whole


def test_tmp(job: Job) -> None:
    """x."""
    drops = job.decide(10)
    print(drops)
    job.register(10, [blobs_of(job.model, r, d) for r, d in enumerate(drops)])
    info = job.commit(10)
    print(info)
    for v in job.services.metadata.get_metadata(info.ref): print(v)
    print(job.services.metadata.list_tensors(info.name))
    print(job.services.catalog.list_runs("projects/-"))
    print(job.services.catalog.list_checkpoints("projects/llm/runs/8b/parts/-"))
    print(job.save(11))
    assert 0
