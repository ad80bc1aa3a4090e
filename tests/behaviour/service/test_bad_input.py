"""What bad input gets: a typed error that names the field, before anything is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from shardbook.core import limits
from shardbook.core.columns import frame, unframe
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.structure import BlobKind
from shardbook.core.table import TensorTable
from shardbook.errors import InvalidArgumentError
from shardbook_server.service.services import Services
from shardbook_server.service.types import (
    AttemptKey,
    AttemptLocation,
    BlobUpload,
    PlanSubmission,
    RankFailure,
    RecordRequest,
    Registration,
    SessionKey,
    SessionStart,
    ShardRegistration,
)
from tests.behaviour.service.saves import RUN, Job, Model, blobs_of, whole

GOOD_KEY = AttemptKey(RUN, "", 1, 1, b"i" * 16, 1, 2)
GOOD_PLACE = AttemptLocation("lustre:llm/step-1", "prefix-a1")
GOOD_SHARD = ShardRegistration(0, b"d" * 32, b"")


def fields(call: Callable[[], object]) -> list[str]:
    """The fields that a refusal names."""
    with pytest.raises(InvalidArgumentError) as caught:
        call()
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "projects/llm/runs/\0"),
        ("run", "projects/../runs/x"),
        ("run", "projects/a%2fb/runs/x"),
        ("run", "projects/llm/runs/\u202eevil"),
        ("run", "projects/llm/runs/" + "x" * 10_000),
        ("run", ""),
        ("part", "<script>"),
        ("part", "a/b"),
        ("step", -1),
        ("step", 2**63),
        ("session", -1),
        ("session", 2**63),
        ("incarnation", b""),
        ("incarnation", b"\0" * 16),
        ("incarnation", b"i" * 17),
        ("attempt", 0),
        ("attempt", 2**31),
        ("world_size", 0),
        ("world_size", limits.MAX_WORLD_SIZE + 1),
    ],
)
def test_attempt_keys(field: str, value: object) -> None:
    """Control characters, dots, escapes, right-to-left marks, long names, numbers out of range."""
    assert [field] == fields(lambda: replace(GOOD_KEY, **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("location", ""),
        ("location", "s3://key:secret@bucket/path"),
        ("location", "https://user@host/x"),
        ("location", "/data\0/x"),
        ("location", "/" + "x" * 5000),
        ("prefix", "/absolute"),
        ("prefix", "trailing/"),
        ("prefix", "../up"),
        ("prefix", "a//b"),
        ("prefix", "new\nline"),
        ("prefix", "\ud800"),
    ],
)
def test_locations(field: str, value: str) -> None:
    """Never credentials, never out of the location."""
    assert [field] == fields(lambda: replace(GOOD_PLACE, **{field: value}))


@pytest.mark.parametrize("location", ["s3://bucket/a@b", "lustre:x/y@z", "/data/user@host/x", "C:/x", "file:///x"])
def test_an_at_sign_in_a_path_is_no_user(location: str) -> None:
    """Only what stands before the host of a URL is user information."""
    assert location == AttemptLocation(location).location


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: PlanSubmission(GOOD_KEY, GOOD_PLACE, 2, b"d" * 32), "rank"),
        (lambda: PlanSubmission(GOOD_KEY, GOOD_PLACE, -1, b"d" * 32), "rank"),
        (lambda: PlanSubmission(GOOD_KEY, GOOD_PLACE, 0, b"d" * 31), "plan_digest"),
        (lambda: PlanSubmission(GOOD_KEY, GOOD_PLACE, 0, b"d" * 32, host="x" * 300), "host"),
        (lambda: PlanSubmission(GOOD_KEY, GOOD_PLACE, 0, b"d" * 32, host="a\tb"), "host"),
        (lambda: Registration(GOOD_KEY, GOOD_PLACE, replace(GOOD_SHARD, rank=2)), "registration.rank"),
        (lambda: replace(GOOD_SHARD, structure_digest=b""), "structure_digest"),
        (lambda: replace(GOOD_SHARD, extents=bytes(limits.MAX_EXTENTS_BYTES + 1)), "extents"),
        (
            lambda: replace(GOOD_SHARD, volatile_properties=bytes(limits.MAX_EXTENTS_BYTES + 1)),
            "volatile_properties",
        ),
        (lambda: BlobUpload(BlobKind.PLAN, bytes(limits.MAX_BLOB_BYTES + 1)), "payload"),
        (lambda: RankFailure(0, "", "sleep", "x"), "phase"),
        (lambda: RankFailure(-1, "", "plan", "x"), "rank"),
        (lambda: SessionKey(RUN, "", 0, b"i" * 16), "session"),
        (lambda: SessionStart(RUN, "", b"i" * 16, job_id="x" * 300), "job_id"),
        (lambda: SessionStart(RUN, "", b"i" * 16, user="a\0"), "user"),
        (lambda: RecordRequest(GOOD_KEY, GOOD_PLACE, (), 0), "registration_count"),
        (lambda: RecordRequest(GOOD_KEY, GOOD_PLACE, (replace(GOOD_SHARD, rank=3),), 3), "registrations[0].rank"),
        (lambda: RecordRequest(GOOD_KEY, GOOD_PLACE, (GOOD_SHARD, GOOD_SHARD), 2), "registrations"),
        (lambda: RecordRequest(GOOD_KEY, GOOD_PLACE, (GOOD_SHARD,) * 4097, 4097), "registrations"),
        (lambda: RecordRequest(GOOD_KEY, GOOD_PLACE, (), 2, write_time_us=-1), "write_time"),
        (lambda: RecordRequest(replace(GOOD_KEY, session=2**63 - 1), GOOD_PLACE, (), 2), "key.session"),
    ],
)
def test_other_values(make: Callable[[], object], field: str) -> None:
    """Ranks, digests, labels and sizes."""
    assert [field] == fields(make)


def bomb() -> bytes:
    """A frame of some kilobytes that inflates beyond the limit."""
    packed = zstandard.ZstdCompressor(level=1).compress(bytes(limits.MAX_INFLATED_BYTES + 1))
    assert len(packed) < 1 << 16
    return b"\1" + packed


@pytest.mark.parametrize("kind", list(BlobKind))
def test_blobs_that_are_none(services: Services, kind: BlobKind) -> None:
    """Damaged, of another kind, cut off, inflating without end: refused before anything is inflated or stored."""
    good = {
        BlobKind.TABLE: whole(Model(2))[0].table.payload,
        BlobKind.PLAN: whole(Model(2))[0].plan.payload,
        BlobKind.STRUCTURE: whole(Model(2))[0].structure.payload,
    }
    other = good[BlobKind.TABLE if kind is BlobKind.PLAN else BlobKind.PLAN]
    before = [BlobUpload(one, good[one]) for one in BlobKind if one < kind]
    content = unframe(good[kind])
    for bad in (b"", b"\0", b"\7x", b"\1x", other, bomb(), b"\0" + content[:-1], b"\0" + content + b"x"):
        at = len(before)
        assert [f"blobs[{at}].payload"] == fields(
            lambda bad=bad: services.blobs.check("llm", [*before, BlobUpload(kind, bad)])  # type: ignore[misc]
        )


def test_a_blob_that_is_not_canonical_is_refused(services: Services) -> None:
    """One content has one encoding, else one content would have many digests."""
    content = bytearray(unframe(whole(Model(2))[0].table.payload))
    # The number of entries, 5, as a varint with a leading zero.
    assert 5 == content[5]
    content[5:6] = b"\x85\x00"
    with pytest.raises(InvalidArgumentError) as caught:
        services.blobs.check("llm", [BlobUpload(BlobKind.TABLE, frame(bytes(content)))])
    assert "NOT_CANONICAL" == caught.value.reason


def test_compression_is_no_part_of_the_digest(services: Services) -> None:
    """zstd output varies by version: digests are over what is inside."""
    payload = whole(Model(2))[0].table.payload
    raw, packed = (
        services.blobs.check("llm", [BlobUpload(BlobKind.TABLE, one)]).blobs[0]
        for one in (payload, b"\0" + unframe(payload))
    )
    assert raw.ref == packed.ref


def test_any_fqn_is_kept(services: Services) -> None:
    """DCP allows NUL, lone surrogates, empty and very long names; refusing one would lose a save."""
    names = ("", "\0", "\ud800", "x" * 10_000, "\u202eabc")

    class Odd(Model):
        def table(self) -> TensorTable:
            return replace(super().table(), fqns=names)

    job = Job(services, Odd(2))
    job.start()
    job.save(1)
    listed = services.metadata.list_tensors("llm/8b@1").items
    assert [name.encode("utf-8", "surrogatepass") for name in names] == [tensor.fqn for tensor in listed]
    [only] = services.metadata.list_tensors("llm/8b@1", fqn_prefix=b"\0").items
    assert b"\0" == only.fqn


def test_a_rank_that_writes_nothing_registers(services: Services) -> None:
    """It has no file, and the others' items make the checkpoint whole."""
    job = Job(services, Model(2))
    job.start()
    everything = np.packbits(np.ones(5, bool)).tobytes()
    nothing = blobs_of(Model(1), 0, everything)
    empty = replace(nothing, rank=1, extents=encode_extents(Extents()))
    job.register(1, [blobs_of(Model(1), 0), empty])
    assert 5 == services.metadata.list_tensors(job.commit(1).name).total_size
