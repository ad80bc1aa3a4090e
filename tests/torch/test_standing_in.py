"""What the coordinator does for ranks without a route: their records and their failures are found on storage."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from shardbook.breaker import CircuitBreaker
from shardbook.client import Client
from shardbook.core import directory as names
from shardbook.core.manifest import AttemptIdentity
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.directory import write_record
from shardbook.dcp.failing import tell_failure
from shardbook.dcp.runtime import Member
from shardbook.dcp.standing_in import OtherRanks
from shardbook.dcp.submission import Submitter
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import RankFailedError
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import CheckpointState
from tests.behaviour.client.directories import identity, record
from tests.behaviour.client.saves import start_session

_WORLD_SIZE = 130


@pytest.fixture
def coordinator(server: str, run: str, tmp_path: Path) -> Submitter:
    """Rank 0 of many, which alone has a route and has registered."""
    incarnation = uuid.uuid4().bytes
    client = Client(server).guarded(CircuitBreaker().start_save())
    session = start_session(Client(server), run, incarnation).session
    attempt = Attempt(
        run=run,
        part="default",
        step=1,
        incarnation=incarnation,
        number=1,
        member=Member(0, _WORLD_SIZE),
        path=str(tmp_path),
        location=str(tmp_path),
    )
    submitter = Submitter(client, attempt, session, set())
    submitter.register(record(_who(attempt), 0))
    return submitter


def _who(attempt: Attempt) -> AttemptIdentity:
    return identity(1, run=attempt.run, incarnation=attempt.incarnation, world_size=_WORLD_SIZE)


@pytest.fixture
def files(tmp_path: Path) -> CheckpointFiles:
    """The checkpoint's directory."""
    return CheckpointFiles.of(FileSystemWriter(tmp_path))


def test_all_ranks_with_a_record_are_registered_in_one_go(coordinator: Submitter, files: CheckpointFiles) -> None:
    """The service names fifty missing ranks at a time; a thousand of them must not take twenty looks."""
    others = OtherRanks(coordinator, coordinator.attempt, files)
    for rank in range(1, _WORLD_SIZE):
        write_record(files, record(_who(coordinator.attempt), rank))
    assert _WORLD_SIZE - 1 == others.register()
    assert 0 == others.register()
    answer = coordinator.client.commit(pb.CommitCheckpointRequest(key=coordinator.key))
    assert CheckpointState.CHECKPOINT_STATE_COMMITTED == answer.checkpoint.state


def test_what_it_sends_for_others_is_counted(coordinator: Submitter, files: CheckpointFiles) -> None:
    """Bytes are those of the messages that this rank sent, whoever they are about."""
    budget = coordinator.client._transport.budget
    assert budget is not None
    before = budget.sent_bytes
    others = OtherRanks(coordinator, coordinator.attempt, files)
    assert 0 == others.register()
    asked = budget.sent_bytes - before  # who is missing
    write_record(files, record(_who(coordinator.attempt), 1))
    assert 1 == others.register()
    assert budget.sent_bytes - before > 2 * asked + 100


def test_a_damaged_record_is_looked_at_again(coordinator: Submitter, files: CheckpointFiles) -> None:
    """It may be one that is only half visible yet; the other ranks' are registered."""
    who = _who(coordinator.attempt)
    files.write(names.record_path(who.prefix, 1), b"half")
    write_record(files, record(who, 2))
    assert 1 == OtherRanks(coordinator, coordinator.attempt, files).register()


def test_a_failure_on_storage_is_told_to_the_service(coordinator: Submitter, files: CheckpointFiles) -> None:
    """The rank had no route; those who have one learn which it was, where and why."""
    lost = replace(coordinator.attempt, member=Member(77, _WORLD_SIZE))
    tell_failure(lost, None, files, "write", OSError(28, "No space left\non device: /data"))
    with pytest.raises(RankFailedError) as caught:
        OtherRanks(coordinator, coordinator.attempt, files).register()
    assert ("77", "write") == (caught.value.metadata["rank"], caught.value.metadata["phase"])
    told = coordinator.client.get_progress(pb.GetCheckpointProgressRequest(key=coordinator.key)).progress.failure
    assert (77, "write", caught.value.metadata["host"]) == (told.rank, told.phase, told.host)
    assert "No space left" in told.reason
