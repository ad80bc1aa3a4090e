"""Tables, plans and structures: exact, canonical, content-addressed, and small where sharding is regular."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.columns import ByteReader, frame, unframe
from shardbook.core.structure import (
    BlobKind,
    FileName,
    RankPlan,
    RankStructure,
    decode_plan,
    decode_structure,
    encode_plan,
    encode_structure,
    reference_of,
)
from shardbook.core.table import EntryKind, TensorTable, decode_table, encode_table
from shardbook.errors import InvalidArgumentError
from tests.unit.strategies import plans, structures, tables

REASONS = {"MALFORMED_PAYLOAD", "NOT_CANONICAL", "LIMIT_EXCEEDED", "INVALID_ARGUMENT", "UNSUPPORTED_FORMAT"}


def same_table(one: TensorTable, other: TensorTable) -> bool:
    """True when two tables hold the same."""
    return (
        one.fqns == other.fqns
        and one.key_paths == other.key_paths
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            for name in ("kinds", "dtypes", "layouts", "memory_formats", "ndims", "shapes")
        )
    )


@given(tables())
def test_a_table_comes_back_exactly(table: TensorTable) -> None:
    """Any fqn, any kind, any shape, any key path; the digest is the SHA-256 of the canonical bytes."""
    encoded = encode_table(table)
    decoded, digest = decode_table(encoded.payload)
    assert same_table(table, decoded)
    assert encoded.digest == digest == hashlib.sha256(unframe(encoded.payload)).digest()
    assert encoded == encode_table(decoded)


@given(plans())
def test_a_plan_comes_back_exactly(plan: RankPlan) -> None:
    """Quotient coding is exact for any box, also for empty ones and ones that leave their tensor."""
    encoded = encode_plan(plan, encode_table(plan.table).digest)
    decoded, digest = decode_plan(encoded.payload, lambda _: plan.table)
    assert encoded.digest == digest
    for name in ("entry", "offsets", "sizes"):
        assert np.array_equal(getattr(plan, name), getattr(decoded, name))


@given(structures())
def test_a_structure_comes_back_exactly(structure: RankStructure) -> None:
    """What was kept, file order and expected lengths."""
    plan_digest = hashlib.sha256(b"plan").digest()
    encoded = encode_structure(structure, plan_digest)
    decoded, digest = decode_structure(encoded.payload, lambda _: structure.plan)
    assert encoded.digest == digest
    assert structure.files == decoded.files
    for name in ("kept", "file_items", "order", "lengths"):
        assert np.array_equal(getattr(structure, name), getattr(decoded, name))
    assert (BlobKind.PLAN, plan_digest) == reference_of(BlobKind.STRUCTURE, unframe(encoded.payload))


@given(structures(), st.data())
def test_altered_bytes_never_pass_for_the_same_content(structure: RankStructure, data: st.DataObject) -> None:
    """A flipped byte gives a typed error, or another content with another digest; never a crash, never a twin."""
    table_payload = encode_table(structure.plan.table)
    plan_payload = encode_plan(structure.plan, table_payload.digest)
    encoded = data.draw(
        st.sampled_from([table_payload, plan_payload, encode_structure(structure, plan_payload.digest)])
    )
    content = bytearray(unframe(encoded.payload))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    payload = frame(bytes(content))
    try:
        if encoded is table_payload:
            again = encode_table(decode_table(payload)[0])
        elif encoded is plan_payload:
            reference = reference_of(BlobKind.PLAN, unframe(payload))
            assert reference is not None
            again = encode_plan(decode_plan(payload, lambda _: structure.plan.table)[0], reference[1])
        else:
            reference = reference_of(BlobKind.STRUCTURE, unframe(payload))
            assert reference is not None
            again = encode_structure(decode_structure(payload, lambda _: structure.plan)[0], reference[1])
    except InvalidArgumentError as error:
        assert error.reason in REASONS
    else:
        assert unframe(again.payload) == bytes(content)
        assert again.digest != encoded.digest


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_with_a_typed_error(content: bytes) -> None:
    """Noise behind a valid header."""
    with pytest.raises(InvalidArgumentError):
        decode_plan(frame(b"SBPL\x01" + content[:31]), lambda _: pytest.fail("no table has this digest"))
    noise = frame(b"SBTB\x01" + content)
    try:
        table, _ = decode_table(noise)
    except InvalidArgumentError as error:
        assert error.reason in REASONS
    else:
        assert unframe(encode_table(table).payload) == unframe(noise)


def fsdp_rank(rank: int, world_size: int, tensor_count: int) -> RankStructure:
    """A rank of a regularly sharded model, each tensor (world_size * 16, 64 + number) cut on dimension 0."""
    rows = np.arange(tensor_count, dtype=np.int64)
    shapes = np.stack([np.full(tensor_count, world_size * 16), 64 + rows], axis=1)
    code = np.full(tensor_count, 1, dtype=np.uint8)
    table = TensorTable(
        tuple(f"model.layers.{row}.weight" for row in rows),
        np.full(tensor_count, EntryKind.SHARD, dtype=np.uint8),
        code,
        code * 0,
        code * 0,
        np.full(tensor_count, 2, dtype=np.int64),
        shapes,
        None,
    )
    box_sizes = np.stack([np.full(tensor_count, 16), shapes[:, 1]], axis=1)
    offsets = np.stack([np.full(tensor_count, 16 * rank), rows * 0], axis=1)
    plan = RankPlan(table, rows, offsets, box_sizes)
    lengths = box_sizes.prod(1) * 4 + 1513
    return RankStructure(plan, rows, (FileName(True, "0.distcp"),), np.array([tensor_count]), rows, lengths)


def test_a_regular_rank_of_1000_chunks_costs_less_than_a_tenth_of_a_byte_a_chunk() -> None:
    """Plan and structure together, table apart: ranks share it."""
    structure = fsdp_rank(37, 256, 1000)
    plan = encode_plan(structure.plan, bytes(32))
    assert len(plan.payload) + len(encode_structure(structure, plan.digest).payload) < 200


def test_equal_ranks_of_different_number_have_equal_digests() -> None:
    """File names leave the rank's number out, so a replica names the structure of its twin."""
    assert FileName.of("__3_0.distcp", 3) == FileName.of("__17_0.distcp", 17) == FileName(True, "0.distcp")
    assert FileName.of("__3_0.distcp", 17) == FileName(False, "__3_0.distcp")
    assert FileName.of("__17_0.distcp", 17).path(17) == "__17_0.distcp"


@pytest.mark.parametrize("name", ["", "/abs", "a/../b", "..", "a//b", "s3://x", "a\0b", "x" * 5000])
def test_file_names_stay_below_their_directory(name: str) -> None:
    """A registration cannot point a loader at another file of the machine."""
    with pytest.raises(InvalidArgumentError) as caught:
        FileName(False, name)
    assert caught.value.violations[0].field == "files"


def test_tensors_of_2_to_the_63_elements_are_refused() -> None:
    """A volume that int64 cannot hold is named, not wrapped; 2**63 - 1 itself is fine, and so is an empty giant."""

    def table(*shape: int) -> TensorTable:
        one = np.ones(1, dtype=np.uint8)
        return TensorTable(("w",), one, one, one * 0, one * 0, np.array([len(shape)]), np.array([shape]), None)

    table(2**63 - 1)
    table(2**40, 0, 2**40)
    for shape in ((2**32, 2**31), (2**62, 2), (2**40, 2**40, 2**40)):
        with pytest.raises(InvalidArgumentError) as caught:
            table(*shape)
        assert caught.value.violations[0].field == "shapes"


@pytest.mark.parametrize(("field", "value"), [("sizes", -1), ("offsets", -1), ("offsets", 2**63 - 1)])
def test_negative_and_endless_boxes_are_refused(field: str, value: int) -> None:
    """The error names the column."""
    plan = fsdp_rank(0, 2, 3).plan
    columns = {"offsets": plan.offsets.copy(), "sizes": plan.sizes.copy()}
    columns[field][1, 0] = value
    with pytest.raises(InvalidArgumentError) as caught:
        RankPlan(plan.table, plan.entry, **columns)
    assert caught.value.violations[0].field in {"offsets", "sizes"}


def test_a_newer_format_is_refused_by_its_version() -> None:
    """Readers learn a format before anyone writes it; until then the reason says so."""
    content = bytearray(unframe(encode_table(fsdp_rank(0, 2, 3).plan.table).payload))
    content[4] = 2
    with pytest.raises(InvalidArgumentError) as caught:
        decode_table(frame(bytes(content)))
    assert caught.value.reason == "UNSUPPORTED_FORMAT"


def test_a_reader_never_reads_past_the_end() -> None:
    """Every truncation of a valid payload is refused."""
    content = unframe(encode_table(fsdp_rank(0, 2, 3).plan.table).payload)
    for size in range(len(content)):
        with pytest.raises(InvalidArgumentError):
            decode_table(frame(content[:size]))
    assert ByteReader(b"").raw(0) == b""
