"""What a client may claim that no writer would: refused, whatever it costs to look at, and nobody else suffers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from shardbook.core.columns import ByteWriter, frame
from shardbook.core.extents import Extents
from shardbook.core.head import decode_metadata_header
from shardbook.core.names import CheckpointName, RunName
from shardbook.core.structure import FileName, RankStructure
from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook_server.service.attempts import Attempt, open_attempts
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.staging import ShardChecker
from shardbook_server.service.types import AttemptLocation, ShardRegistration
from shardbook_server.service.views import CheckpointState, RegistrationAnswer
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, whole


def test_counts_that_wrap_around_are_no_structure() -> None:
    """Three files that claim 2**64 items and a few: their sum is right by accident, and numpy would believe it."""
    structure = Model(1).structure(0)
    count = structure.item_count
    files = tuple(FileName(True, f"{at}.distcp") for at in range(3))
    claimed = np.array([2**63 - 1, 2**63 - 1, count + 2], np.int64)
    with pytest.raises(InvalidArgumentError, match="files do not hold the kept items"):
        RankStructure(structure.plan, structure.kept, files, claimed, structure.order, structure.lengths)


def test_ranks_that_claim_more_than_there_can_be(services: Services) -> None:
    """Each below its own limit, together beyond an int64: a typed refusal, and the attempt is over."""
    job = Job(services, Model(4))
    job.start()
    job.register(1, whole(job.model, bytes_length=2**62 - 8000))
    with pytest.raises(InvalidArgumentError) as caught:
        job.commit(1)
    assert "LIMIT_EXCEEDED" == caught.value.reason
    assert CheckpointState.FAILED == services.progress.progress(job.key(1)).counts.state


def test_one_who_disagrees_fails_alone(job: Job) -> None:
    """A batch with a clash of steps, another place for the same step, and one that has nothing to do with either."""
    first, second = whole(job.model)
    job.register(1, [first])
    clash, other, innocent = job.entry(2, first), job.entry(2, second), job.entry(1, second)
    place = innocent.registration.location
    clash = replace(clash, registration=replace(clash.registration, location=place))
    elsewhere = AttemptLocation(place.location + "x", place.prefix)
    other = replace(other, registration=replace(other.registration, location=elsewhere))
    innocent = replace(innocent, blobs=job.check(second))
    verdicts = job.services.registrations.register_batch([clash, other, innocent])
    assert ["ATTEMPT_MISMATCH"] * 2 == [one.reason for one in verdicts[:2] if isinstance(one, ShardbookError)]
    assert isinstance(verdicts[2], RegistrationAnswer)
    assert job.commit(1).live


def test_ranks_that_disagree_at_the_same_moment_learn_of_it(database: Database, job: Job) -> None:
    """Each opens another step at one place, through replicas that see nothing of each other until they commit."""
    first, second = whole(job.model)
    place = job.location(1)
    clash = job.entry(2, second, job.check(second))
    clash = replace(clash, registration=replace(clash.registration, location=place))
    elsewhere = build_services(database, lease_ttl_s=60)
    with ThreadPoolExecutor(1) as pool:
        with database.write([RunName("llm", "8b")], exclusive=False) as connection:
            opened = open_attempts(connection, [(job.key(1), place)], database.now_us(connection), 60)
            assert [Attempt] == [type(one) for one in opened.values()]
            late = pool.submit(elsewhere.registrations.register_batch, [clash])
            # On Postgres it gets as far as the place itself; SQLite has one writer.
            time.sleep(0.3)
            assert not late.done()
        (verdict,) = late.result(30)
    assert isinstance(verdict, ShardbookError)
    assert "ATTEMPT_MISMATCH" == verdict.reason
    job.register(1, [first, second])
    assert job.commit(1).live


def test_a_header_that_nests_without_end() -> None:
    """JSON's own depth limit is an error like any other damage."""
    with pytest.raises(InvalidArgumentError, match="metadata header"):
        decode_metadata_header(frame(b"[" * 200_000))


def test_a_batch_keeps_no_columns() -> None:
    """Eighteen bytes may stand for millions of items: what is kept of them is a few numbers."""
    writer = ByteWriter()
    for byte in (1, 1):
        writer.byte(byte)
    writer.varint(1 << 20)
    for _ in range(2):
        writer.column(np.zeros(1 << 20, np.int64), delta=False)
    shard = ShardChecker().check(ShardRegistration(0, b"d" * 32, frame(writer.finish())))
    assert (1 << 20, True, 0) == (shard.extents.item_count, shard.extents.explicit, shard.extents.size_bytes)
    assert not any(isinstance(value, (np.ndarray, Extents)) for value in vars(shard.extents).values())


def test_digits_are_ascii() -> None:
    """Other scripts have digits too; a step has one way to be written."""
    with pytest.raises(InvalidArgumentError):
        CheckpointName.parse("llm/8b@\u0661")
