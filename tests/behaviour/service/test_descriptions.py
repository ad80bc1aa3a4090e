"""What is said of checkpoints: at the commit, and afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook_server.service.describing import Changes, Description, Writer
from shardbook_server.service.registration import RegistrationEntry
from shardbook_server.service.services import Services
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointInfo, RankView
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, fine, whole

SAID = Description(
    labels={"stage": "pretrain", "team": "red"},
    metrics={"val_loss": 1.5, "tokens": 1e12},
    note='{"why": "\\u00e9"}',
    writer=Writer("node7", "grace", "", "0.2.0", "2.10.0", "abc123"),
)


def commit(job: Job, step: int, description: Description = SAID, **said: Any) -> CheckpointInfo:
    """Registers every rank and commits with something to say."""
    job.register(step, whole(job.model))
    return job.services.commits.commit(job.key(step), replace(description, **said))


def update(
    services: Services, name: str, *paths: str, labels: Mapping[str, str] = {}, metrics: Any = None, note: str = ""
) -> CheckpointInfo:
    """Changes what is said."""
    return services.descriptions.update(name, Changes(labels, metrics or {}, note, paths))


def test_what_the_coordinator_says_is_kept_with_the_commit(job: Job) -> None:
    """In one transaction, and told to whoever asks for the checkpoint; the session fills in what is left out."""
    committed = commit(job, 1)
    found = job.services.catalog.get_checkpoint("llm/8b@latest")
    assert committed == found
    assert (SAID.labels, SAID.metrics, ("latest",)) == (found.labels, found.metrics, found.aliases)
    assert {"why": "é"} == json.loads(found.note)
    assert replace(SAID.writer, job_id="slurm-1") == found.writer
    # The first word counts.
    again = job.services.commits.commit(job.key(1), Description(labels={"stage": "other"}))
    assert found == again


def test_listings_leave_out_what_is_long(job: Job) -> None:
    """Labels, metrics and aliases are there; notes, writers and times for those who ask for one."""
    commit(job, 1)
    commit(job, 2, labels={})
    newest, oldest = job.services.catalog.list_checkpoints("projects/llm/runs/8b/parts/-").items
    assert (SAID.labels, SAID.metrics, ()) == (oldest.labels, oldest.metrics, oldest.aliases)
    assert ({}, ("latest",)) == (newest.labels, newest.aliases)
    assert ("", Writer(), None) == (oldest.note, oldest.writer, oldest.timing)


def test_a_recorded_attempt_is_described_too(services: Services) -> None:
    """Sync and import pass on what the directory says."""
    recorded = Job(services, Model(2)).record(5, description=SAID)
    assert (SAID.labels, SAID.metrics, SAID.writer) == (recorded.labels, recorded.metrics, recorded.writer)


def test_an_older_coordinator_says_nothing(job: Job) -> None:
    """Who wrote it is known by the session all the same."""
    saved = job.save(1)
    assert ({}, {}, "") == (saved.labels, saved.metrics, saved.note)
    assert Writer("node0", "ada", "slurm-1") == saved.writer


def test_ranks_say_what_they_took(job: Job) -> None:
    """Slowest and median by phase, the slowest by host; bytes by rank."""
    job.plan(1, whole(job.model))
    for rank, phase_ms in enumerate([(100, 2000, 7), (300, 1000, 9)]):
        entry = job.entry(1, whole(job.model)[rank], job.check(whole(job.model)[rank]))
        registration = replace(entry.registration.registration, phase_ms=phase_ms)
        told = RegistrationEntry(replace(entry.registration, registration=registration), entry.blobs)
        fine(job.services.registrations.register_batch([told]))
    timing = job.commit(1).timing
    assert timing is not None
    assert [("plan", 300, 1, "node1", 200), ("write", 2000, 0, "node0", 1500), ("register", 9, 1, "node1", 8)] == [
        (one.phase, one.slowest_ms, one.slowest_rank, one.slowest_host, one.median_ms) for one in timing.phases
    ]
    page = job.services.catalog.list_ranks("llm/8b@1")
    sizes = [one.size_bytes for one in page.items]
    assert (RankView(0, sizes[0], 100, 2000, 7), RankView(1, sizes[1], 300, 1000, 9)) == page.items
    assert (max(sizes), 2) == (timing.largest_rank_bytes, page.total_size)
    assert job.services.catalog.get_checkpoint("llm/8b@1").size_bytes == sum(sizes)


def test_ranks_of_an_older_release_take_no_time(job: Job) -> None:
    """No phases are told, only bytes."""
    timing = job.save(1).timing
    assert timing is not None
    assert () == timing.phases
    assert timing.largest_rank_bytes > 0
    assert [0, 0] == [one.write_ms for one in job.services.catalog.list_ranks("llm/8b@1").items]


def test_registering_again_is_not_judged_by_the_time_it_took(job: Job) -> None:
    """A retry measures other times, and is the same registration."""
    blobs = whole(job.model)[0]
    entry = job.entry(1, blobs, job.check(blobs))
    for phase_ms in ((1, 2, 3), (4, 5, 6), ()):
        registration = replace(entry.registration.registration, phase_ms=phase_ms)
        told = RegistrationEntry(replace(entry.registration, registration=registration), entry.blobs)
        assert not fine(job.services.registrations.register_batch([told]))[0].unknown


def test_ranks_are_listed_page_by_page(services: Services) -> None:
    """Of the checkpoint that an alias meant when the first page was asked for."""
    job = Job(services, Model(5))
    job.start()
    job.save(1)
    first = services.catalog.list_ranks("llm/8b@latest", page_size=3)
    job.save(2)
    second = services.catalog.list_ranks("llm/8b@latest", page_size=3, page_token=first.next_page_token)
    assert [0, 1, 2, 3, 4] == [one.rank for one in (*first.items, *second.items)]
    assert ("", 5) == (second.next_page_token, second.total_size)


def test_a_mask_says_what_changes(job: Job) -> None:
    """One label, one metric, all of them, or the note; the rest stays, and the same again changes nothing."""
    commit(job, 1)
    for _ in range(2):
        one = update(
            job.services,
            "llm/8b@1",
            "labels.team",
            "metrics.mmlu",
            labels={"team": "blue", "x": "y"},
            metrics={"mmlu": 0.5},
        )
        assert {"stage": "pretrain", "team": "blue"} == one.labels
        assert {"val_loss": 1.5, "tokens": 1e12, "mmlu": 0.5} == one.metrics
    removed = update(job.services, "llm/8b@1", "labels.stage", "metrics.tokens", "labels.never")
    assert ({"team": "blue"}, {"val_loss": 1.5, "mmlu": 0.5}) == (removed.labels, removed.metrics)
    replaced = update(job.services, "llm/8b@1", "labels", "metrics", labels={"only": "this"})
    assert ({"only": "this"}, {}) == (replaced.labels, replaced.metrics)
    noted = update(job.services, "llm/8b@1", "note", note=" [1,\n 2] ")
    assert ("[1,2]", {"only": "this"}) == (noted.note, noted.labels)
    assert "" == update(job.services, "llm/8b@1", "note").note
    assert update(job.services, "llm/8b@1", "note") == job.services.catalog.get_checkpoint("llm/8b@1")


def test_a_commit_of_an_older_server_takes_a_note(job: Job, database: Database) -> None:
    """It left no row for what is said."""
    job.save(1)
    with database.write() as connection:
        connection.exec_driver_sql("DELETE FROM descriptions")
    assert '"late"' == update(job.services, "llm/8b@1", "note", note='"late"').note


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"paths": ()}, "update_mask"),
        ({"paths": ("step",)}, "update_mask"),
        ({"paths": ("note.x",)}, "update_mask"),
        ({"paths": ("labels.",)}, "update_mask"),
        ({"paths": ("labels.\x00",)}, "update_mask"),
        ({"labels": {"a b": "x"}}, "checkpoint.labels"),
        ({"labels": {"a": "x\x00"}}, "checkpoint.labels.a"),
        ({"labels": {"a": "\u202e"}}, "checkpoint.labels.a"),
        ({"labels": {"a": "x" * 257}}, "checkpoint.labels.a"),
        ({"labels": {str(n): "x" for n in range(65)}}, "checkpoint.labels"),
        ({"labels": {"x" * 64: "x"}}, "checkpoint.labels"),
        ({"metrics": {"": 1.0}}, "checkpoint.metrics"),
        ({"metrics": {"loss": math.nan}}, "checkpoint.metrics.loss"),
        ({"metrics": {"loss": -math.inf}}, "checkpoint.metrics.loss"),
        ({"note": "{"}, "checkpoint.note"),
        ({"note": "NaN"}, "checkpoint.note"),
        ({"note": "1e999"}, "checkpoint.note"),
        ({"note": "[" * 50_000}, "checkpoint.note"),
        ({"note": '"' + "x" * 70_000 + '"'}, "checkpoint.note"),
    ],
)
def test_what_cannot_be_said(changes: dict[str, Any], field: str) -> None:
    """INVALID_ARGUMENT with the field, before anything is looked up."""
    with pytest.raises(InvalidArgumentError) as caught:
        Changes(**{"labels": {}, "metrics": {}, "note": "", "paths": ("labels",)} | changes)
    assert [field] == [violation.field for violation in caught.value.violations]


def test_there_are_never_too_many(job: Job) -> None:
    """Also when they come one by one; nothing of the call is kept then."""
    commit(job, 1, labels={f"l{n}": "x" for n in range(64)})
    with pytest.raises(InvalidArgumentError) as caught:
        update(job.services, "llm/8b@1", "labels.more", "metrics.m", labels={"more": "x"}, metrics={"m": 1.0})
    assert "LIMIT_EXCEEDED" == caught.value.reason
    assert SAID.metrics == job.services.catalog.get_checkpoint("llm/8b@1").metrics


def test_only_what_exists_is_described(job: Job) -> None:
    """NOT_FOUND otherwise; an attempt that failed may be labelled."""
    job.register(1, whole(job.model)[:1])
    job.services.commits.abort(job.key(1), "out of memory")
    assert {"why": "oom"} == update(job.services, "llm/8b@1.s1.a1", "labels.why", labels={"why": "oom"}).labels
    for name in ("llm/8b@2", "llm/none@1", "llm/8b@none"):
        with pytest.raises(NotFoundError):
            update(job.services, name, "labels")


def test_what_was_said_of_an_open_attempt_stays(job: Job) -> None:
    """The commit adds to it; its own word counts where both say something."""
    job.register(1, whole(job.model))
    name = "llm/8b@1.s1.a1"
    update(job.services, name, "labels", "note", labels={"a": "early", "b": "early"}, note='"early"')
    committed = job.services.commits.commit(job.key(1), Description(labels={"b": "late"}))
    assert ({"a": "early", "b": "late"}, '"early"') == (committed.labels, committed.note)
    assert "slurm-1" == committed.writer.job_id
    job.register(2, whole(job.model))
    update(job.services, "llm/8b@2.s1.a1", "note", note='"early"')
    assert '"late"' == job.services.commits.commit(job.key(2), Description(note='"late"')).note


def test_both_zeros_are_one(job: Job) -> None:
    """SQLite keeps no negative one, so neither database does."""
    found = commit(job, 1, metrics={"loss": -0.0}).metrics["loss"]
    assert 1.0 == math.copysign(1.0, found)


def test_a_superseded_checkpoint_keeps_what_was_said(services: Services) -> None:
    """It stays loadable as @step.sN, labels and all."""
    first = Job(services, Model(2))
    first.start()
    commit(first, 1)
    second = Job(services, Model(2))
    second.start(on_live=OnLive.TAKEOVER)
    second.save(1)
    assert SAID.labels == services.catalog.get_checkpoint("llm/8b@1.s1").labels
    assert {} == services.catalog.get_checkpoint("llm/8b@1").labels
