"""Bad payloads: blobs, digests and extents. A typed error that names the field; never INTERNAL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from shardbook.core import limits
from shardbook.core.columns import frame, unframe
from shardbook.core.dtype import dtype_code
from shardbook.core.structure import BlobKind
from shardbook.core.table import EntryKind, TensorTable, encode_table
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from tests.behaviour.rpc.api import Api, Job, fields, payload, refusal, row

DIGEST = bytes(range(32))


def _table_payload() -> bytes:
    what = payload([row("w", 0, 2)])
    return next(blob.payload for (kind, _), blob in what.blobs.items() if kind == BlobKind.TABLE)


def _bomb(size_bytes: int) -> bytes:
    return b"\x01" + zstandard.ZstdCompressor(level=1).compress(bytes(size_bytes))


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda good: b"", id="empty"),
        pytest.param(lambda good: b"\x07" + good[1:], id="frame"),
        pytest.param(lambda good: b"\x00garbage", id="garbage"),
        pytest.param(lambda good: b"\x01garbage", id="no-zstd"),
        pytest.param(lambda good: frame(unframe(good)[:-1]), id="cut"),
        pytest.param(lambda good: frame(unframe(good) + b"\x00"), id="longer"),
        pytest.param(lambda good: frame(bytes(len(unframe(good)))), id="zeros"),
        pytest.param(lambda good: _bomb(limits.MAX_INFLATED_BYTES + 1), id="bomb"),
        pytest.param(lambda good: b"\x00" + bytes(limits.MAX_BLOB_BYTES), id="large"),
    ],
)
def test_a_payload_that_is_damaged_or_a_bomb_names_its_blob(
    api: Api, run: str, damaged: Callable[[bytes], bytes]
) -> None:
    """Rule: content is decoded within limits and proved canonical before anything of the call is stored."""
    job = Job.start(api, run)
    request = job.register_request(0, job.rows()[0])
    good = _table_payload()
    request.blobs.add(kind=types_pb2.BLOB_KIND_TABLE, payload=good)
    request.blobs.add(kind=types_pb2.BLOB_KIND_TABLE, payload=damaged(good))
    error = refusal(api.registration.RegisterShards, request)
    assert ("INVALID_ARGUMENT", ["blobs[1].payload"]) == (error.status, fields(error))
    assert "NOT_FOUND" == refusal(job.progress).status


def test_every_single_changed_byte_is_refused_or_is_other_content(api: Api, run: str) -> None:
    """Rule: no damage to a table gets past the codec as a bug; what still parses has another digest."""
    job = Job.start(api, run)
    content = unframe(_table_payload())
    wanted = hashlib.sha256(content).digest()
    for at in range(len(content)):
        changed = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
        request = pb.PlanSaveRequest(
            key=job.key(), location=job.location(), rank=0, plan_digest=wanted, blobs=[_raw_table(changed)]
        )
        try:
            response = api.registration.PlanSave(request)
        except Exception:  # noqa: BLE001 - judged by the call below
            error = refusal(api.registration.PlanSave, request)
            assert ("INVALID_ARGUMENT", ["blobs[0].payload"]) == (error.status, fields(error))
        else:
            assert pb.PlanSaveResponse.STATE_STRUCTURE_UNKNOWN == response.state


def _raw_table(content: bytes) -> types_pb2.Blob:
    return types_pb2.Blob(kind=types_pb2.BLOB_KIND_TABLE, payload=b"\x00" + content)


def test_a_digest_of_the_wrong_size_or_of_nothing(api: Api, run: str) -> None:
    """Rule: 32 bytes; a digest that the uploads do not have stays unknown, whatever the client claims."""
    job = Job.start(api, run)
    what = job.rows()[0]
    for digest in (b"", DIGEST[:31], DIGEST + b"x"):
        plan = replace(what, plan_digest=digest)
        shards = replace(what, structure_digest=digest)
        assert ["plan_digest"] == fields(refusal(job.plan, 0, plan))
        assert ["registration.structure_digest"] == fields(refusal(job.register, 0, shards))
    lying = replace(what, structure_digest=DIGEST)
    assert [DIGEST] == [ref.digest for ref in job.register(0, lying).unknown]
    assert 0 == job.progress().progress.registered_count


def test_a_blob_of_another_kind_than_it_says_is_refused(api: Api, run: str) -> None:
    """Rule: a table is no plan."""
    job = Job.start(api, run)
    request = job.register_request(0, job.rows()[0])
    for kind in (types_pb2.BLOB_KIND_PLAN, types_pb2.BLOB_KIND_STRUCTURE):
        request.ClearField("blobs")
        request.blobs.add(kind=kind, payload=_table_payload())
        assert ["blobs[0].payload"] == fields(refusal(api.registration.RegisterShards, request))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extents", b""),
        ("extents", b"\xff" * 50),
        ("extents", b"\x01\x01\x07"),
        ("extents", bytes(limits.MAX_EXTENTS_BYTES + 1)),
        ("volatile_properties", b"\xff" * 9),
        ("volatile_properties", b"\x01"),
    ],
)
def test_extents_that_fit_no_structure_are_refused(api: Api, run: str, field: str, value: bytes) -> None:
    """Rule: extents are checked against the structure they belong to before they are stored."""
    job = Job.start(api, run)
    what = job.rows()[0]
    request = job.register_request(0, what)
    request.blobs.extend(what.blobs.values())
    setattr(request.registration, field, value)
    error = refusal(api.registration.RegisterShards, request)
    assert ("INVALID_ARGUMENT", [f"registration.{field}"]) == (error.status, fields(error))


@pytest.mark.parametrize("shape", [(2**32, 2**31), (2**62, 4), (-1, 3), (3, -(2**63)), (2**63 - 1, 2**63 - 1)], ids=str)
def test_sizes_below_0_or_from_2_to_the_63_are_refused(api: Api, run: str, shape: tuple[int, int]) -> None:
    """Rule: sizes and their product fit int64; a table that an honest client cannot make is refused all the same."""
    table = TensorTable(
        fqns=("w",),
        kinds=np.array([EntryKind.SHARD], np.uint8),
        dtypes=np.array([dtype_code("float32")], np.uint8),
        layouts=np.zeros(1, np.uint8),
        memory_formats=np.zeros(1, np.uint8),
        ndims=np.array([2], np.int64),
        shapes=np.array([[1, 1]], np.int64),
        key_paths=None,
    )
    # Past the constructor, which refuses this.
    object.__setattr__(table, "shapes", np.array([shape], np.int64))
    job = Job.start(api, run)
    request = job.register_request(0, job.rows()[0])
    request.blobs.add(kind=types_pb2.BLOB_KIND_TABLE, payload=encode_table(table).payload)
    error = refusal(api.registration.RegisterShards, request)
    assert ("INVALID_ARGUMENT", ["blobs[0].payload"]) == (error.status, fields(error))
