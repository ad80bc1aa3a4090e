"""Deleted checkpoints: what stands in the way, what means them afterwards, and how they come back or go for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
from sqlalchemy import func, select

from shardbook.core import limits
from shardbook.core.names import CheckpointName
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ShardbookError
from shardbook_server.service.aliases import AliasRequest, Direction
from shardbook_server.service.describing import Description
from shardbook_server.service.garbage import DELETED, GarbageService
from shardbook_server.service.services import Services
from shardbook_server.service.types import AttemptLocation, OnLive
from shardbook_server.service.views import CheckpointInfo, CheckpointState, FileDeletion
from shardbook_server.storage import events as event_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.events import EventKind
from shardbook_server.storage.retention_tables import holds
from shardbook_server.storage.tables import checkpoints, extent_segments, labels, metrics
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model, whole

PART = "projects/llm/runs/8b/parts/default"
DAY_S = 86_400


def save(job: Job, step: int, **more: float) -> CheckpointInfo:
    """Saves a step with metrics."""
    job.register(step, whole(job.model))
    return job.services.commits.commit(job.key(step), Description(metrics=more, labels={"a": "b"}))


def meant(services: Services, ref: str) -> str | None:
    """Full name of what a ref means, without its place; None for nothing."""
    try:
        return services.catalog.get_checkpoint(ref).name.rpartition("/")[2]
    except NotFoundError:
        return None


def reason(call: Callable[..., Any], *args: Any, **more: Any) -> str:
    """Why a call is refused."""
    with pytest.raises(ShardbookError) as refused:
        call(*args, **more)
    return refused.value.reason


def kinds(database: Database, after: int = 0) -> list[EventKind]:
    """What happened."""
    with database.read() as connection:
        return [one.event.kind for one in event_rows.read_after(connection, after, 1000)]


def test_a_deleted_checkpoint_is_gone_until_it_is_brought_back(job: Job, clock: Clock) -> None:
    """Neither listed nor loaded; the refusal names the way back, and all that was said of it comes with it."""
    services = job.services
    for step in (1, 2):
        save(job, step, loss=1.0)
    before = services.catalog.get_checkpoint("llm/8b@1")
    gone, aliases = services.deletions.delete("llm/8b@1")
    assert (CheckpointState.DELETED, False, clock.now_us, ()) == (gone.state, gone.live, gone.delete_time_us, aliases)
    assert gone.purge_time_us == clock.now_us + 7 * DAY_S * 1_000_000
    for ref in ("llm/8b@1", "llm/8b@1.s1", "llm/8b@1.s1.a1"):
        for call in (services.metadata.get_metadata, services.metadata.list_tensors):
            with pytest.raises(NotFoundError, match=r"`shardbook undelete llm/8b@1\.s1\.a1`") as refused:
                next(iter(cast("Iterable[object]", call(ref))))
            assert "CHECKPOINT_DELETED" == refused.value.reason
    assert [2] == [one.step for one in services.catalog.list_checkpoints(PART).items]
    assert [2, 1] == [one.step for one in services.catalog.list_checkpoints(PART, show_all=True).items]
    assert [gone.name] == [
        one.name for one in services.catalog.list_checkpoints(PART, show_all=True, filter_text="state=DELETED").items
    ]
    assert gone == services.deletions.delete("llm/8b@1")[0]
    assert gone == services.catalog.get_checkpoint("llm/8b@1.s1.a1")
    assert before == services.deletions.undelete("llm/8b@1")
    assert before == services.deletions.undelete("llm/8b@1")
    assert list(services.metadata.get_metadata("llm/8b@1"))


def test_what_latest_means_is_deleted_by_force_alone(job: Job) -> None:
    """Then it means the newest one left, by session and step; at the end none. Back comes what a commit would move."""
    services = job.services
    for step in (1, 2, 3):
        job.save(step)
    assert "LATEST_CHECKPOINT" == reason(services.deletions.delete, "llm/8b@3")
    for step, left in ((3, "2.s1.a1"), (2, "1.s1.a1"), (1, None)):
        services.deletions.delete("llm/8b@latest", force=True)
        assert left == meant(services, "llm/8b@latest"), step
    for step, back in ((2, "2.s1.a1"), (1, "2.s1.a1"), (3, "3.s1.a1")):
        services.deletions.undelete(f"llm/8b@{step}")
        assert back == meant(services, "llm/8b@latest"), step
    services.deletions.delete("llm/8b@3", force=True)
    job.save(4)
    assert "4.s1.a1" == meant(services, "llm/8b@latest")


def test_latest_moves_to_the_newest_session_not_to_the_highest_step(job: Job, other_job: Callable[[], Job]) -> None:
    """An abandoned branch stays abandoned."""
    services = job.services
    for step in (1, 50, 60):
        job.save(step)
    second = other_job()
    second.start(on_live=OnLive.TAKEOVER, resumed_from="llm/8b@1")
    for step in (2, 3):
        second.save(step)
    services.deletions.delete("llm/8b@3", force=True)
    assert "2.s2.a1" == meant(services, "llm/8b@latest")


def test_a_superseded_one_comes_back_superseded(job: Job, other_job: Callable[[], Job]) -> None:
    """And the newer one takes its place again when both were deleted."""
    services = job.services
    job.save(1)
    second = other_job()
    second.start(on_live=OnLive.TAKEOVER)
    second.save(1)
    second.save(2)
    services.deletions.delete("llm/8b@1.s1")
    assert "1.s2.a1" == meant(services, "llm/8b@1")
    assert not services.deletions.undelete("llm/8b@1.s1").live
    services.deletions.delete("llm/8b@1")
    assert None is meant(services, "llm/8b@1")
    services.deletions.delete("llm/8b@1.s1")
    assert services.deletions.undelete("llm/8b@1.s1").live
    assert services.deletions.undelete("llm/8b@1.s2").live
    assert ("1.s2.a1", False) == (meant(services, "llm/8b@1"), services.catalog.get_checkpoint("llm/8b@1.s1").live)


def test_aliases_protect_or_go_along(job: Job) -> None:
    """Protected ones need force; those by hand go with it; those that follow a metric move on."""
    services = job.services
    for step in (1, 2, 3):
        save(job, step, loss=float(step))
    services.aliases.set(AliasRequest(f"{PART}/aliases/production", "llm/8b@1", protected=True))
    services.aliases.set(AliasRequest(f"{PART}/aliases/mine", "llm/8b@1"))
    services.aliases.set(AliasRequest(f"{PART}/aliases/best", metric="loss", direction=Direction.MIN))
    assert "ALIAS_PROTECTED" == reason(services.deletions.delete, "llm/8b@1")
    assert "1.s1.a1" == meant(services, "llm/8b@mine")
    _, gone = services.deletions.delete("llm/8b@best", force=True)
    assert ("mine", "production") == gone
    assert (None, None, "2.s1.a1") == tuple(meant(services, f"llm/8b@{a}") for a in ("mine", "production", "best"))
    assert {"best", "latest"} == {one.name.rpartition("/")[2] for one in services.aliases.list(PART).items}
    services.deletions.undelete("llm/8b@1")
    assert (None, "1.s1.a1") == (meant(services, "llm/8b@mine"), meant(services, "llm/8b@best"))


def test_holds_block_until_they_end(job: Job, clock: Clock) -> None:
    """By force too; the refusal says who and until when, and how to end it."""
    services = job.services
    for step in (1, 2):
        job.save(step)
    _, first = services.holds.hold("llm/8b@1", "eval-7", 60_000_000)
    info, _ = services.holds.hold("llm/8b@1", "copy", 10_000_000)
    assert ["copy", "eval-7"] == [one.holder for one in info.holds]
    with pytest.raises(
        FailedPreconditionError, match=r"eval-7 and 1 more .*`shardbook release llm/8b@1 --name eval-7`"
    ):
        services.deletions.delete("llm/8b@1", force=True)
    clock.advance(30)
    _, longer = services.holds.hold("llm/8b@1", "eval-7", 60_000_000)
    assert (first.create_time_us, first.expire_time_us + 30_000_000) == (longer.create_time_us, longer.expire_time_us)
    assert longer == services.holds.hold("llm/8b@1", "eval-7", 1_000_000)[1]
    assert ("eval-7",) == tuple(one.holder for one in services.catalog.get_checkpoint("llm/8b@1").holds)
    assert "CHECKPOINT_HELD" == reason(services.deletions.delete, "llm/8b@1")
    services.holds.release("llm/8b@1", "eval-7")
    services.holds.release("llm/8b@1", "eval-7")
    services.deletions.delete("llm/8b@1")
    assert "CHECKPOINT_DELETED" == reason(services.holds.hold, "llm/8b@1", "eval-7", 1_000_000)
    services.holds.hold("llm/8b@latest", "eval-7", 1_000_000)
    clock.advance(1)
    services.deletions.delete("llm/8b@latest", force=True)


def test_holds_are_bounded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time, in number, and in who they are of."""
    job.save(1)
    hold = job.services.holds.hold
    for ttl_us in (0, -1, 31 * DAY_S * 1_000_000):
        with pytest.raises(InvalidArgumentError) as refused:
            hold("llm/8b@1", "eval", ttl_us)
        assert "ttl" == refused.value.violations[0].field
    for holder in ("", "a b", "../x"):
        with pytest.raises(InvalidArgumentError) as refused:
            hold("llm/8b@1", holder, 1)
        assert "holder" == refused.value.violations[0].field
    monkeypatch.setattr(limits, "MAX_HOLDS", 4)
    for at in range(4):
        hold("llm/8b@1", f"eval-{at}", 1_000_000)
    assert "LIMIT_EXCEEDED" == reason(hold, "llm/8b@1", "eval-4", 1_000_000)
    hold("llm/8b@1", "eval-3", 2_000_000)


def test_what_is_not_committed_is_not_deleted(job: Job) -> None:
    """Neither what is open nor what is not there."""
    job.save(1)
    job.register(2, whole(job.model)[:1])
    assert "NOT_COMMITTED" == reason(job.services.deletions.delete, "llm/8b@2.s1.a1")
    assert "NOT_COMMITTED" == reason(job.services.holds.hold, "llm/8b@2.s1.a1", "eval", 1)
    assert "NOT_DELETED" == reason(job.services.deletions.undelete, "llm/8b@2.s1.a1")
    assert "NOT_DELETED" == reason(job.services.deletions.record_files, "llm/8b@1.s1.a1", [], done=False)
    assert "NOT_FOUND" == reason(job.services.deletions.delete, "llm/8b@3")
    assert "NOT_FOUND" == reason(job.services.deletions.undelete, "llm/8b@3")


def test_a_deleted_step_can_be_saved_again(job: Job) -> None:
    """A commit that is repeated is answered; a new attempt is live, and the deleted one stays behind it."""
    services = job.services
    job.save(1)
    job.save(2)
    services.deletions.delete("llm/8b@1")
    assert CheckpointState.DELETED is job.commit(1).state
    assert "CHECKPOINT_CLOSED" == reason(job.register, 1, whole(job.model))
    assert "CHECKPOINT_CLOSED" == reason(job.record, 1)
    job.save(1, attempt=2)
    assert "1.s1.a2" == meant(services, "llm/8b@1")
    assert not services.deletions.undelete("llm/8b@1.s1.a1").live


def test_from_the_first_file_on_nothing_comes_back(job: Job) -> None:
    """The list of files is there until the last one is gone, and who shares the place is named."""
    services = job.services
    first = job.save(1)
    job.save(2)
    other = Job(services, Model(2), run="projects/llm/runs/copy")
    other.start()
    other.location = lambda step, attempt=1: Job.location(job, 1)  # type: ignore[method-assign]
    copy = other.save(1)
    beside = Job(services, Model(2), run="projects/llm/runs/beside")
    beside.start()
    beside.save(1)  # in the same directory, with files in one of its own
    services.deletions.delete("llm/8b@1")
    info, sharing = services.deletions.record_files(first.name, [], done=False)
    assert (FileDeletion.BEGUN, [copy.name]) == (info.file_deletion, sharing)
    assert "FILES_DELETED" == reason(services.deletions.undelete, "llm/8b@1")
    with pytest.raises(NotFoundError, match="data files too"):
        list(services.metadata.get_metadata("llm/8b@1"))
    assert list(services.metadata.get_metadata(first.name, show_deleted=True))
    services.deletions.delete(copy.name, force=True)
    assert [copy.name] == services.deletions.record_files(first.name, [], done=False)[1]
    services.deletions.record_files(copy.name, [], done=False)
    assert [] == services.deletions.record_files(first.name, ["/elsewhere"], done=False)[1]
    info, _ = services.deletions.record_files(first.name, [], done=True)
    assert FileDeletion.DONE is info.file_deletion
    assert info == services.deletions.record_files(first.name, [], done=False)[0]


def test_saves_that_are_not_over_count_where_files_go(job: Job, clock: Clock) -> None:
    """Without a prefix they may have any file there: while they are open, and while their writers may come back."""
    services = job.services
    first = job.save(1)
    job.save(2)
    place = job.location(1)
    beside = Job(services, Model(2), run="projects/llm/runs/beside")
    beside.start()
    places = {
        11: AttemptLocation(place.location, ""),
        12: AttemptLocation(place.location, f"{place.prefix}/more"),
        13: AttemptLocation(place.location, f"{place.prefix}0"),
        14: AttemptLocation("lustre:elsewhere", ""),
    }
    beside.location = lambda step, attempt=1: places[step]  # type: ignore[method-assign]
    for step in places:
        beside.register(step, whole(beside.model)[:1])
    services.deletions.delete(first.name, files=True)

    def sharing() -> list[int | None]:
        names = services.deletions.record_files(first.name, [], done=False)[1]
        return [CheckpointName.parse(name).id.step for name in names]

    assert [11, 12] == sharing()
    services.commits.abort(beside.key(12), "its ranks are gone")
    assert [11] == sharing()
    for _ in range(10):
        services.sessions.expire_leases()
        clock.advance(10)
    assert CheckpointState.EXPIRED == services.progress.progress(beside.key(11)).counts.state
    assert [11] == sharing()
    Job(services, Model(2), run=beside.run).start(on_live=OnLive.TAKEOVER)
    assert [] == sharing()


def test_directories_within_each_other_share_and_cases_differ(job: Job, services: Services) -> None:
    """By the letter, on both databases: what is above may have files below it, what only looks alike may not."""
    root = job.location(1).location
    prefixes = ["Set/One", "Set", "Set/One/more", "set/one/more", "Set/One2", "Other", ""]
    places = {step: AttemptLocation(root, prefix) for step, prefix in enumerate(prefixes, 1)}
    job.location = lambda step, attempt=1: places[step]  # type: ignore[method-assign]
    names = {save(job, step).name: step for step in places}
    doomed = next(iter(names))
    services.deletions.delete(doomed, files=True)
    assert [2, 3, 7] == [names[one] for one in services.deletions.record_files(doomed, [], done=False)[1]]


def test_a_purge_keeps_the_row_alone(job: Job, database: Database, clock: Clock) -> None:
    """After its time, and not while files are going; the number stays taken, and structures become collectable."""
    services = job.services
    for step in (1, 2, 3):
        save(job, step, loss=1.0)
    services.holds.hold("llm/8b@1", "eval", 1_000_000)
    clock.advance(2)
    for step in (1, 2):
        services.deletions.delete(f"llm/8b@{step}")
    services.deletions.record_files("llm/8b@2", [], done=False)

    def purged(*, dry_run: bool = False) -> int:
        done = GarbageService(database).collect(dry_run=dry_run)
        return next(one.count for one in done if one.kind == DELETED)

    clock.advance(6.9 * DAY_S)
    assert 0 == purged()
    clock.advance(0.2 * DAY_S)
    assert (1, 1, 0) == (purged(dry_run=True), purged(), purged())
    with database.read() as connection:
        for table, key in ((extent_segments, "checkpoint_id"), (labels, "checkpoint_id"), (metrics, "checkpoint_id")):
            left = connection.scalar(select(func.count(table.c[key].distinct())))
            assert 2 == left, table.name
        assert 0 == connection.scalar(select(func.count()).select_from(holds))
        assert 3 == connection.scalar(select(func.count()).select_from(checkpoints))
    with pytest.raises(FailedPreconditionError, match="`shardbook import` records it anew, in another run") as purged_:
        services.deletions.undelete("llm/8b@1")
    assert "CHECKPOINT_PURGED" == purged_.value.reason
    assert "CHECKPOINT_PURGED" == reason(services.deletions.record_files, "llm/8b@1", [], done=False)
    assert "CHECKPOINT_DELETED" == reason(lambda: list(services.metadata.get_metadata("llm/8b@1.s1.a1")))
    assert "NOT_FOUND" != reason(lambda: list(services.metadata.get_metadata("llm/8b@1", show_deleted=True)))
    assert "CHECKPOINT_CLOSED" == reason(job.record, 1)
    services.deletions.record_files("llm/8b@2", [], done=True)
    assert 1 == purged()
    assert None is services.catalog.get_checkpoint("llm/8b@2.s1.a1").purge_time_us
    assert list(services.metadata.get_metadata("llm/8b@3"))


def test_lost_data_is_passed_over(job: Job) -> None:
    """By latest, while there is another, and by best; until it is found again. It can still be loaded by its step."""
    services = job.services
    for step in (1, 2, 3):
        save(job, step, loss=-float(step))
    services.aliases.set(AliasRequest(f"{PART}/aliases/best", metric="loss", direction=Direction.MIN))
    flagged = services.deletions.report_missing("llm/8b@3", missing=True)
    assert (True, True) == (flagged.data_missing, flagged.live)
    assert ("2.s1.a1", "2.s1.a1") == (meant(services, "llm/8b@latest"), meant(services, "llm/8b@best"))
    assert flagged == services.deletions.report_missing("llm/8b@3", missing=True)
    assert list(services.metadata.get_metadata("llm/8b@3"))
    services.deletions.report_missing("llm/8b@3", missing=False)
    assert ("3.s1.a1", "3.s1.a1") == (meant(services, "llm/8b@latest"), meant(services, "llm/8b@best"))
    for step in (1, 2, 3):
        services.deletions.report_missing(f"llm/8b@{step}", missing=True)
    assert ("3.s1.a1", None) == (meant(services, "llm/8b@latest"), meant(services, "llm/8b@best"))
    save(job, 0, loss=0.0)
    assert ("0.s1.a1", "0.s1.a1") == (meant(services, "llm/8b@latest"), meant(services, "llm/8b@best"))
    assert "CHECKPOINT_DELETED" == reason(
        lambda: (services.deletions.delete("llm/8b@1"), services.deletions.report_missing("llm/8b@1", missing=True))
    )


def test_every_change_is_told_in_its_transaction(job: Job, database: Database) -> None:
    """Deleted, moved, brought back, lost, found."""
    services = job.services
    for step in (1, 2):
        job.save(step)
    with database.read() as connection:
        before = event_rows.read_after(connection, 0, 1000)[-1].cursor
    services.deletions.delete("llm/8b@2", force=True)
    services.deletions.delete("llm/8b@2", force=True)
    services.deletions.undelete("llm/8b@2")
    services.deletions.report_missing("llm/8b@2", missing=True)
    services.deletions.report_missing("llm/8b@2", missing=False)
    assert [
        EventKind.DELETED,
        EventKind.LATEST_MOVED,
        EventKind.UNDELETED,
        EventKind.LATEST_MOVED,
        EventKind.DATA_LOST,
        EventKind.LATEST_MOVED,
        EventKind.DATA_FOUND,
        EventKind.LATEST_MOVED,
    ] == kinds(database, before)
