"""The largest, emptiest and oddest input that is legal is kept exactly, and what lies beyond has one verdict.

On both databases: their integers, texts and names have unlike limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from shardbook.core import limits
from shardbook.core.dtype import dtype_code
from shardbook.core.structure import RankPlan
from shardbook.core.table import EntryKind, TensorTable
from shardbook.core.texts import encode_name
from shardbook.errors import InvalidArgumentError, NotFoundError, ShardbookError
from shardbook_server.service.services import Services
from shardbook_server.service.types import FailureReport, OnLive, RankFailure, SessionStart
from tests.behaviour.service.saves import RUN, Job, Model, whole

STEP, ATTEMPT = limits.INT64_MAX, limits.MAX_ATTEMPT


def test_the_largest_numbers_of_a_key_are_stored_and_found(services: Services, job: Job) -> None:
    """Step 2^63 - 1 and attempt 2^31 - 1, by every form of the name and in listings."""
    saved = job.save(STEP, ATTEMPT)
    assert f"llm/8b@{STEP}" == saved.ref
    for ref in (saved.ref, f"{saved.ref}.s1", f"{saved.ref}.s1.a{ATTEMPT}", "llm/8b@latest"):
        found = services.catalog.get_checkpoint(ref)
        assert (STEP, ATTEMPT) == (found.step, found.attempt)
    assert [saved.name] == [one.name for one in services.catalog.list_checkpoints(f"{RUN}/parts/default").items]


def test_the_largest_session_that_can_be_recorded_is_followed_by_another(services: Services, job: Job) -> None:
    """A session number never runs out, whatever a directory's records say."""
    request = replace(job, session=2**62)
    request.record(1)
    assert 2**62 + 1 == Job(services, Model(2)).start(on_live=OnLive.TAKEOVER).session


def test_refs_with_large_numbers_name_nothing_or_are_refused(services: Services, job: Job) -> None:
    """NOT_FOUND within the range of a number, INVALID_ARGUMENT beyond; never a driver's error."""
    job.save(1)
    for number in (2**31 - 1, 2**31, 2**32, 10**10, 2**63 - 1, 2**63, 2**64):
        for form, largest in (("{}", STEP), ("1.s{}", STEP), ("1.s1.a{}", ATTEMPT), ("{0}.s{0}.a{0}", ATTEMPT)):
            expected = NotFoundError if number <= largest else InvalidArgumentError
            for read in (services.catalog.get_checkpoint, services.metadata.list_tensors):
                with pytest.raises(expected):
                    read(f"llm/8b@{form.format(number)}")


@pytest.mark.parametrize("length", [2**62, 2**63 - 1])
def test_lengths_that_add_up_to_more_than_a_number_holds_are_refused(job: Job, length: int) -> None:
    """Two ranks with 2^62 bytes each: no sum is stored that has gone round, and no rank's is."""

    def save() -> None:
        job.register(1, whole(job.model, bytes_length=length))
        job.commit(1)

    with pytest.raises(ShardbookError) as caught:
        save()
    assert caught.value.status in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")


@dataclass(frozen=True)
class Named(Model):
    """The same model with another name for its bytes entry."""

    name: str = "extra"

    def table(self) -> TensorTable:
        """As ever, but for that name."""
        table = super().table()
        return replace(table, fqns=(*table.fqns[:-1], self.name))


@pytest.mark.parametrize("character", ["a", "\u20ac", "\ud800"])
def test_an_fqn_may_be_long_and_has_a_limit(services: Services, job: Job, character: str) -> None:
    """Up to it every character is kept; beyond it the refusal says how long it is, and what the limit is."""
    size_bytes = len(character.encode("utf-8", "surrogatepass"))
    longest = character * (limits.MAX_FQN_BYTES // size_bytes)
    job.model = Named(2, name=longest)
    job.register(1, whole(job.model))
    assert job.commit(1).live
    tensors = services.metadata.list_tensors("llm/8b@1")
    assert encode_name(longest) in [tensor.fqn for tensor in tensors.items]
    job.model = Named(2, name=longest + character)
    with pytest.raises(InvalidArgumentError, match="the limit is 65536") as caught:
        job.register(2, whole(job.model))
    assert "LIMIT_EXCEEDED" == caught.value.reason
    assert ["blobs[0].payload"] == [violation.field for violation in caught.value.violations]


ODD = "\u202e\x00\ud800\U0001f600'\"%s:x\\<script>\n"


def test_a_failure_s_words_are_kept_as_far_as_they_can_be(services: Services, job: Job) -> None:
    """A rank that reports why it failed is never refused for its message: what cannot be stored is escaped."""
    failure = RankFailure(1, "node1", "write", ODD)
    services.registrations.report_failure(FailureReport(job.key(2), job.location(2), failure))
    shown = services.catalog.get_checkpoint("llm/8b@2.s1.a1").failure
    assert shown.endswith("\\u202e\\x00\\ud800\U0001f600'\"%s:x\\<script>\n")


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "%s %(x)s :x ${x}", "'; DROP TABLE runs; --", "\U0001f600é"]
)
def test_printable_labels_are_kept_exactly(services: Services, text: str) -> None:
    """Hosts, users and job ids are words, whatever language or program would read more into them."""
    started = SessionStart(RUN, "", b"i" * 16, job_id=text, host=text, user=text)
    services.sessions.start(started)
    [part] = services.catalog.get_run(RUN).parts
    assert [text] * 3 == [part.host, part.user, part.job_id]


class Edges(Model):
    """A 0-dim tensor, an empty one, and one with a size of 0 between others; all whole on every rank."""

    def table(self) -> TensorTable:
        """Shapes (), (0,), (3, 0, 2); and an empty bytes entry."""
        return TensorTable(
            fqns=("scalar", "empty", "hollow", "extra"),
            kinds=np.array([EntryKind.TENSOR] * 3 + [EntryKind.BYTES], np.uint8),
            dtypes=np.array([dtype_code("float32")] * 3 + [0], np.uint8),
            layouts=np.zeros(4, np.uint8),
            memory_formats=np.zeros(4, np.uint8),
            ndims=np.array([0, 1, 3, 0], np.int64),
            shapes=np.array([[1, 1, 1], [0, 1, 1], [3, 0, 2], [1, 1, 1]], np.int64),
            key_paths=None,
        )

    def plan(self, rank: int) -> RankPlan:
        """The whole of each."""
        table = self.table()
        return RankPlan(table, np.arange(4), np.zeros((4, 3), np.int64), table.shapes)


def test_tensors_without_dimensions_or_elements_are_saved(services: Services) -> None:
    """DCP saves them: 0-dim ones have one element, empty ones none; a bytes entry may be empty too."""
    job = Job(services, Edges(2))
    job.start()
    job.register(1, whole(job.model, bytes_length=0))
    info = job.commit(1)
    listed = services.metadata.list_tensors(info.name).items
    assert {"scalar": (), "empty": (0,), "hollow": (3, 0, 2), "extra": ()} == {
        one.fqn.decode(): one.shape for one in listed
    }
