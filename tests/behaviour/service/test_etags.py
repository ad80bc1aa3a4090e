"""Etags: who read something that has been changed since changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.retention import RetentionPolicy
from shardbook.errors import AbortedError
from shardbook_server.service.aliases import AliasRequest, Direction
from shardbook_server.service.describing import Changes, Description
from shardbook_server.service.etags import etag_of
from shardbook_server.service.locations import Move
from shardbook_server.service.services import Services
from shardbook_server.service.views import AliasInfo
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, whole

PART = "projects/llm/runs/8b/parts/default"
ONE, TWO = (f"{PART}/checkpoints/{step}.s1.a1" for step in (1, 2))


@pytest.fixture
def saved(job: Job) -> Services:
    """Services that have two checkpoints."""
    for step in (1, 2):
        job.register(step, whole(job.model))
        job.services.commits.commit(job.key(step), Description(metrics={"loss": float(step)}))
    return job.services


def etag(services: Services) -> str:
    """That of the first checkpoint."""
    return services.catalog.get_checkpoint(ONE).etag


def aborted(call: Callable[[], object]) -> list[str]:
    """The field that a call is refused for, because something was changed."""
    with pytest.raises(AbortedError, match="was changed since") as refused:
        call()
    assert "ETAG_MISMATCH" == refused.value.reason
    return [one.field for one in refused.value.violations]


def test_everything_that_people_change_changes_it(saved: Services) -> None:
    """And each of them another way, so that nothing that was there before comes back unnoticed."""
    location = saved.catalog.get_checkpoint(ONE).location.location
    seen = [etag(saved)]
    for change in (
        lambda: saved.descriptions.update(ONE, Changes({"a": "b"}, {}, "", ("labels.a",))),
        lambda: saved.descriptions.update(ONE, Changes({}, {"loss": 7.0}, "", ("metrics.loss",))),
        lambda: saved.descriptions.update(ONE, Changes({}, {}, '"a"', ("note",))),
        lambda: saved.locations.move([Move(ONE, location, "/elsewhere/1", keep=True)]),
        lambda: saved.locations.move([Move(ONE, location, "/elsewhere/1")]),
        lambda: saved.deletions.report_missing(ONE, missing=True),
        lambda: saved.deletions.delete(ONE),
        lambda: saved.deletions.record_files(ONE, [], done=False),
        lambda: saved.deletions.record_files(ONE, [], done=True),
    ):
        change()
        seen.append(etag(saved))
    assert len(set(seen)) == len(seen)
    assert all(one.startswith('"') and one.endswith('"') for one in seen)


def test_what_others_do_leaves_it(saved: Services, job: Job, clock: Clock) -> None:
    """Saves, holds, aliases and time; and a write that changes nothing."""
    before = etag(saved)
    saved.holds.hold(ONE, "eval", 60_000_000)
    saved.aliases.set(AliasRequest(f"{PART}/aliases/golden", checkpoint=ONE))
    job.register(3, whole(job.model))
    job.commit(3)
    clock.advance(3600)
    saved.descriptions.update(ONE, Changes({}, {"loss": 1.0}, "", ("metrics.loss", "note")))
    assert before == etag(saved)
    saved.deletions.undelete(saved.deletions.delete(TWO)[0].name)
    assert before == etag(saved)


def test_answers_of_writes_have_it_and_pages_do_not(saved: Services) -> None:
    """A page would have to read what it leaves out."""
    told = saved.descriptions.update(ONE, Changes({"a": "b"}, {}, "", ("labels.a",)))
    assert told.etag == etag(saved) != ""
    assert ["", ""] == [one.etag for one in saved.catalog.list_checkpoints(PART).items]


def test_a_checkpoint_that_was_changed_is_left_alone(saved: Services) -> None:
    """By updates and by deletions; with the new etag they go through."""
    old = etag(saved)
    changed = saved.descriptions.update(ONE, Changes({"a": "b"}, {}, "", ("labels.a",)), etag=old)
    again = Changes({"a": "c"}, {}, "", ("labels.a",))
    assert ["checkpoint.etag"] == aborted(lambda: saved.descriptions.update(ONE, again, etag=old))
    assert ["etag"] == aborted(lambda: saved.deletions.delete(ONE, force=True, etag=old))
    assert changed == saved.catalog.get_checkpoint(ONE)
    assert {"a": "c"} == dict(saved.descriptions.update(ONE, again, etag=changed.etag).labels)
    assert ["etag"] == aborted(lambda: saved.deletions.delete(ONE, etag=changed.etag))
    saved.deletions.delete(ONE, etag=etag(saved))


def test_an_alias_that_was_moved_is_left_alone(saved: Services) -> None:
    """One that is gone, too; and nobody but the first of two makes it."""
    name = f"{PART}/aliases/golden"

    def put(checkpoint: str, old: str = "", *, protected: bool = False) -> AliasInfo:
        return saved.aliases.set(AliasRequest(name, checkpoint=checkpoint, protected=protected, etag=old))

    first = put(ONE)
    assert first == put(ONE, first.etag)
    second = put(TWO, first.etag)
    assert first.etag != second.etag
    assert ["alias.etag"] == aborted(lambda: put(ONE, first.etag))
    assert ["etag"] == aborted(lambda: saved.aliases.delete(name, etag=first.etag))
    listed = {one.name.rpartition("/")[2]: one for one in saved.aliases.list(PART).items}
    assert (second, "") == (listed["golden"], listed["latest"].etag)
    saved.aliases.delete(name, etag=second.etag)
    assert ["alias.etag"] == aborted(lambda: put(ONE, second.etag))
    best = AliasRequest(f"{PART}/aliases/best", metric="loss", direction=Direction.MIN)
    made = saved.aliases.set(best)
    saved.descriptions.update(TWO, Changes({}, {"loss": 0.5}, "", ("metrics.loss",)))
    follows = {one.name: one for one in saved.aliases.list(PART).items}[made.name]
    assert (TWO, True) == (follows.checkpoint, follows.etag != made.etag)


def test_a_policy_that_was_changed_is_left_alone(saved: Services) -> None:
    """Of a part, what is inherited is none of its own."""
    run = f"{PART.rpartition('/')[0]}/-"
    nothing = saved.retention.get_policy(run)
    assert nothing.etag == saved.retention.get_policy(PART).etag != ""
    first = saved.retention.set_policy(run, RetentionPolicy(keep_last=1), etag=nothing.etag)
    assert first.etag == saved.retention.get_policy(run).etag != nothing.etag
    assert nothing.etag == saved.retention.get_policy(PART).etag
    assert ["etag"] == aborted(lambda: saved.retention.set_policy(run, RetentionPolicy(keep_last=2), etag=nothing.etag))
    assert 1 == getattr(saved.retention.get_policy(run).policy, "keep_last", None)
    own = saved.retention.set_policy(PART, RetentionPolicy(keep_last=3), etag=nothing.etag)
    assert own.etag == saved.retention.get_policy(PART).etag != first.etag
    removed = saved.retention.set_policy(run, RetentionPolicy(), etag=first.etag)
    assert nothing.etag == removed.etag


@given(st.lists(st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False) | st.text(max_size=4)), max_size=3))
def test_equal_content_has_equal_etags(content: list[dict[str, object]]) -> None:
    """Whatever the order in which a database gives it."""
    turned = [dict(reversed(list(one.items()))) for one in content]
    assert etag_of(*content) == etag_of(*turned)
    assert etag_of(*content) != etag_of(*content, None)
