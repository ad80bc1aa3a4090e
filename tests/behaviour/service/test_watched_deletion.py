"""What watchers work on is not deleted, whoever comes first."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from shardbook.core.names import CheckpointName
from shardbook.core.retention import RetentionPolicy
from shardbook.errors import ClaimLostError, FailedPreconditionError, NotFoundError
from shardbook_server.service import behind
from shardbook_server.service.claiming import ClaimRequest, FinishRequest, Outcome
from shardbook_server.service.deletion import mark
from shardbook_server.service.services import Services
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import claims as claim_rows
from shardbook_server.storage.claims import ClaimRow, ClaimState
from shardbook_server.storage.database import Database
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job

RUN = "projects/llm/runs/8b/parts/-"
PART = "projects/llm/runs/8b/parts/default"
NAME = "subscriptions/mmlu"
CLAIM = ClaimRequest(NAME, RUN, "", "start", b"1" * 16, "host 1", 60.0, 3)
LAST = RetentionPolicy(keep_last=1)


def delete(services: Services, one: CheckpointInfo) -> str:
    """Deletes a checkpoint; returns why it is refused, or nothing."""
    try:
        services.deletions.delete(one.name, force=True, files=True)
    except FailedPreconditionError as error:
        return error.reason
    return ""


def reasons(services: Services) -> dict[int, tuple[str, ...]]:
    """What a policy says of the steps."""
    seen = services.retention.preview(RUN, LAST).items
    return {CheckpointName.parse(one.name).id.step or 0: one.reasons for one in seen}


def test_what_a_watcher_works_on_is_neither_deleted_nor_pruned(services: Services, job: Job, clock: Clock) -> None:
    """Not by force, until the work is done or its lease has ended; the reason names the subscription."""
    first, second, third, _ = [job.save(step) for step in range(1, 5)]
    names = [one.name for one in (first, second, third)]
    assert first.name == getattr(services.claims.claim(CLAIM).claim, "checkpoint", first).name
    services.claims.claim(replace(CLAIM, claim_id=b"2" * 16))
    services.claims.finish(FinishRequest(NAME, b"2" * 16, second.name, Outcome.FAILED, "exit code 1", 10.0, 3))
    with pytest.raises(FailedPreconditionError, match=r"`shardbook watch --name mmlu --status`") as refused:
        services.deletions.delete(first.name, force=True)
    assert ("CHECKPOINT_HELD", "mmlu") == (refused.value.reason, refused.value.metadata["holder"])
    services.holds.hold(first.name, "eval", 1_000_000)
    seen = reasons(services)
    assert (("held by eval, watch mmlu",), ("held by watch mmlu",)) == (seen[1], seen[2])
    assert [True, True, True] == [one.keep for one in services.retention.prune(RUN, LAST, names)]
    services.claims.finish(FinishRequest(NAME, b"1" * 16, first.name, Outcome.DONE, "", 10.0, 3))
    clock.advance(2)
    assert ("", "CHECKPOINT_HELD") == (delete(services, first), delete(services, second))
    clock.advance(10 + 3_600)
    assert [False, False, False] == [one.keep for one in services.retention.prune(RUN, LAST, names)]


def test_what_a_watcher_has_still_to_come_to_is_not_pruned(services: Services, job: Job, clock: Clock) -> None:
    """For a day after its commit while somebody works for the subscription, for an hour while nobody does."""
    for step in range(1, 5):
        job.save(step)
    others = {
        "some": replace(CLAIM, subscription="subscriptions/some", filter_text="step >= 3"),
        "elsewhere": replace(CLAIM, subscription="subscriptions/elsewhere", parent="projects/llm/runs/9b/parts/-"),
        "later": replace(CLAIM, subscription="subscriptions/later", cursor=""),
    }
    for at, request in enumerate(others.values()):
        services.claims.claim(replace(request, claim_id=bytes([at]) * 16, lease_s=1.0))
    assert services.claims.claim(replace(CLAIM, lease_s=86_400.0)).claim is not None
    job.save(5)
    clock.advance(2)
    coming = {
        1: ("held by watch mmlu",),
        2: ("held by watch mmlu (to come)",),
        # Its watcher was lost, and another one takes its work up.
        3: ("held by watch some, watch mmlu (to come)",),
        4: ("held by watch mmlu (to come), watch some (to come)",),
    }
    assert coming == {step: why for step, why in reasons(services).items() if step < 5}
    names = [f"{PART}/checkpoints/{step}.s1.a1" for step in range(1, 5)]
    assert [True] * 4 == [one.keep for one in services.retention.prune(RUN, LAST, names)]
    clock.advance(3_600)
    assert coming[2] == reasons(services)[4]
    assert "" == delete(services, services.catalog.get_checkpoint(names[1]))
    clock.advance(82_000)
    assert coming[2] == reasons(services)[3]
    clock.advance(86_400 - 82_000 - 3_602)
    assert (("held by watch mmlu",), ("no rule keeps it",)) == (reasons(services)[1], reasons(services)[3])
    assert [True, False, False, False] == [one.keep for one in services.retention.prune(RUN, LAST, names)]
    clock.advance(3_601)
    assert [False] * 4 == [one.keep for one in services.retention.prune(RUN, LAST, names)]


def test_many_that_are_behind_are_some_names_and_a_number(
    services: Services, job: Job, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, and however many different things they are about, or nothing that can be read."""
    monkeypatch.setattr(behind, "_JUDGED", 2)
    for step in (1, 2, 3):
        job.save(step)
    with database.write() as connection:
        for number in range(30):
            # None of the first two is about the steps; the one of tomorrow, and all behind, count as being about all.
            text = ("step > 90", "shiny_new_field = 3", "step > 91", "step > 92")[number // 10]
            claim_rows.insert_subscription(
                connection, f"s{number:02}", parent=RUN, filter_text=text, cursor=0, now_us=database.now_us(connection)
            )
    kept = "held by watch s10 (to come), watch s11 (to come), watch s12 (to come), 17 more watches (to come)"
    assert {1: (kept,), 2: (kept,)} == {step: why for step, why in reasons(services).items() if step < 3}


def test_what_was_committed_long_ago_is_not_looked_for(
    services: Services, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the last events alone, for whoever is behind by more."""
    for step in (1, 2, 3):
        job.save(step)
    claimed = services.claims.claim(CLAIM).claim
    assert claimed is not None
    done = FinishRequest(NAME, CLAIM.claim_id, claimed.checkpoint.name, Outcome.DONE, "", 10.0, 3)
    services.claims.finish(done)
    monkeypatch.setattr(behind, "_EVENTS", 2)
    assert ("no rule keeps it",) == reasons(services)[2]
    monkeypatch.undo()
    assert ("held by watch mmlu (to come)",) == reasons(services)[2]


def test_a_watcher_whose_checkpoint_is_gone_is_told(services: Services, job: Job, clock: Clock) -> None:
    """Once its lease has ended it may be deleted: neither renewed nor handed out again, and the next one is."""
    first, second, third = [job.save(step) for step in (1, 2, 3)]
    services.claims.claim(CLAIM)
    clock.advance(61)
    assert ("", "") == (delete(services, first), delete(services, second))
    with pytest.raises(ClaimLostError):
        services.claims.renew(NAME, CLAIM.claim_id, 60.0)
    again = services.claims.claim(CLAIM).claim
    assert again is not None
    assert third.name == again.checkpoint.name
    assert CheckpointState.DELETED is services.catalog.get_checkpoint(first.name).state


@pytest.mark.parametrize("way", ["delete", "prune"])
def test_a_claim_that_is_being_made_is_not_missed(way: str, services: Services, database: Database, job: Job) -> None:
    """Who deletes waits for the claim's transaction, and then sees it."""
    first, _ = job.save(1), job.save(2)
    with database.write(lock="subscriptions/other") as connection:
        now_us = database.now_us(connection)
        claim_rows.insert_subscription(connection, "other", parent=RUN, filter_text="", cursor=0, now_us=now_us)
        found = claim_rows.find_subscription(connection, "other")
        assert found is not None
        ids = [first.checkpoint_id]
        assert set(ids) == checkpoint_rows.lock_committed(connection, ids, shared=True)
        row = ClaimRow(found.id, ids[0], b"3" * 16, ClaimState.RUNNING, 1, now_us + 60_000_000, "host", "")
        claim_rows.put_claim(connection, row)
        refused: list[str] = []

        def remove() -> None:
            if way == "delete":
                refused.append(delete(services, first))
            else:
                (made,) = services.retention.prune(RUN, LAST, [first.name])
                refused.append("CHECKPOINT_HELD" if made.keep else "")

        remover = threading.Thread(target=remove)
        remover.start()
        remover.join(0.3)
    remover.join()
    assert ["CHECKPOINT_HELD"] == refused
    assert CheckpointState.COMMITTED is services.catalog.get_checkpoint(first.name).state


def test_what_is_being_deleted_is_not_claimed(services: Services, database: Database, job: Job) -> None:
    """Who claims waits for the deletion's transaction, and takes the next one."""
    first, second = job.save(1), job.save(2)
    claimed: list[str] = []

    def claim() -> None:
        view = services.claims.claim(CLAIM).claim
        claimed.append("" if view is None else view.checkpoint.name)

    with database.write([job.key(1).part_name.run]) as connection:
        checkpoint_rows.lock_committed(connection, [first.checkpoint_id])
        row = checkpoint_rows.find_by_ids(connection, [first.checkpoint_id])
        claimer = threading.Thread(target=claim)
        claimer.start()
        claimer.join(0.3)
        mark(connection, list(row.values()), database.now_us(connection), 1_000_000, [], files=True)
    claimer.join()
    assert [second.name] == claimed
    with pytest.raises(NotFoundError):
        services.holds.hold(first.name, "eval", 1_000_000)
