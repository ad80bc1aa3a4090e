"""Extents: a few bytes a save in the steady state, exact where nothing follows from the structure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.columns import frame, unframe
from shardbook.core.extents import (
    NO_CHECKSUM,
    Extents,
    check_extents,
    decode_extents,
    decode_segment,
    decode_volatile,
    encode_extents,
    encode_segment,
    encode_volatile,
    registration_digest,
    structure_info,
)
from shardbook.core.structure import RankStructure
from shardbook.errors import InvalidArgumentError
from tests.unit.strategies import extents_of, structures
from tests.unit.test_structure_codec import fsdp_rank

#: Payloads of the release before checksums.
_FROM_BEFORE = [
    ("00010000", Extents()),
    ("000100030e027d037e030000", Extents(np.array([900, 901, 7]))),
    (
        "000103020a0100010001000401020008007a73746400010100",
        Extents(
            lengths=np.array([5, 6]),
            starts=np.array([0, 9]),
            transforms=(("zstd",),),
            transform_index=np.array([1, 0]),
        ),
    ),
    (
        "00010c0301060000010001020001010000",
        Extents(np.array([3]), hints=np.array([0, 1, 2]), attributes=np.array([1, 0, 0])),
    ),
]


def same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """True when two optional columns are equal."""
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def assert_equal(one: Extents, other: Extents) -> None:
    """Column by column."""
    assert one.transforms == other.transforms
    for name in ("variable_lengths", "lengths", "starts", "transform_index", "hints", "attributes", "checksums"):
        assert same(getattr(one, name), getattr(other, name)), name


@given(st.data(), st.integers(0, 6), st.integers(0, 3))
def test_extents_come_back_exactly(data: st.DataObject, item_count: int, variable_count: int) -> None:
    """Lengths, starts, transforms, hints, attributes and checksums, each there or not."""
    extents = data.draw(extents_of(item_count, variable_count))
    assert_equal(extents, decode_extents(encode_extents(extents)))


@given(structures(), st.data())
def test_extents_are_checked_against_counts_alone(structure: RankStructure, data: st.DataObject) -> None:
    """The bytes they cover are known without geometry; one item more or less is refused."""
    info = structure_info(structure)
    extents = data.draw(extents_of(info.item_count, info.variable_count))
    total = extents.lengths.sum() if extents.lengths is not None else extents.variable_lengths.sum() + info.fixed_bytes
    assert total == check_extents(extents.facts, info)
    longer = Extents(variable_lengths=np.ones(info.variable_count + 1, dtype=np.int64))
    with pytest.raises(InvalidArgumentError) as caught:
        check_extents(longer.facts, info)
    assert caught.value.reason == "EXTENTS_MISMATCH"


def test_the_steady_state_costs_four_bytes_and_bytes_entries_a_byte_each() -> None:
    """Nothing but the lengths of bytes entries travels, and those as what they are above the shortest."""
    assert len(encode_extents(Extents())) == 4
    lengths = np.full(20, 1600, dtype=np.int64)
    before = len(encode_extents(Extents(variable_lengths=lengths)))
    lengths[7] += 1
    assert len(encode_extents(Extents(variable_lengths=lengths))) <= before + 20
    assert before <= 8


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300), st.data())
def test_checksums_cost_four_bytes_an_item_and_nothing_else(values: list[int], data: st.DataObject) -> None:
    """Beside the number of items; where some items have none, a bit an item more."""
    explicit = data.draw(st.booleans())
    lengths = np.arange(len(values)) if explicit else None
    plain = Extents(lengths=lengths, starts=lengths)
    checked = replace(plain, checksums=np.array(values, dtype=np.int64))
    without, payload = (len(unframe(encode_extents(one))) for one in (plain, checked))
    count_bytes = 0 if explicit else 1 if len(values) < 128 else 2
    assert without + 4 * len(values) + count_bytes == payload
    some = data.draw(st.lists(st.sampled_from(range(len(values))), max_size=len(values) - 1, unique=True))
    checked.checksums[some] = NO_CHECKSUM  # type: ignore[index] # it is there
    bits_bytes = (len(values) + 7) // 8 if some else 0
    assert payload - 4 * len(some) + bits_bytes == len(unframe(encode_extents(checked)))
    assert_equal(checked, decode_extents(encode_extents(checked)))


@pytest.mark.parametrize(("payload", "extents"), _FROM_BEFORE)
def test_extents_without_checksums_are_what_they_were_before_there_were_any(payload: str, extents: Extents) -> None:
    """What earlier releases stored decodes to the same, and what nobody asks checksums of is stored as they did."""
    assert_equal(extents, decode_extents(bytes.fromhex(payload)))
    assert payload == encode_extents(extents).hex()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("0120 01 00", "MALFORMED_PAYLOAD"),  # says that items lack checksums, but not that there are any
        ("0150 01 00", "MALFORMED_PAYLOAD"),  # a flag that nobody has given a meaning yet
        ("0110 01 00 010203", "MALFORMED_PAYLOAD"),  # three bytes of four
        ("0110 01 00 01020304 05", "MALFORMED_PAYLOAD"),
        ("0130 02 00 c0 0102030405060708", "NOT_CANONICAL"),  # every bit is set: there is a shorter way
        ("0130 02 00 a0 01020304", "NOT_CANONICAL"),  # a bit beyond the items
        ("0130 02 00 00", "INVALID_ARGUMENT"),  # no item has one
        ("0110 00 00", "INVALID_ARGUMENT"),
    ],
)
def test_checksums_have_one_encoding(content: str, reason: str) -> None:
    """Whatever else says the same, or nothing, is refused."""
    with pytest.raises(InvalidArgumentError) as caught:
        decode_extents(frame(bytes.fromhex(content)))
    assert reason == caught.value.reason


@given(st.sampled_from([16, 17, 28, 48, 49, 63]), st.integers(1, 9), st.binary(max_size=60))
def test_extents_with_checksums_that_decode_encode_to_the_same(flags: int, count: int, content: bytes) -> None:
    """A digest of the payload is one of what it means."""
    payload = bytes((1, flags, count)) + content
    try:
        extents = decode_extents(frame(payload))
    except InvalidArgumentError as error:
        assert error.reason in {"MALFORMED_PAYLOAD", "NOT_CANONICAL", "LIMIT_EXCEEDED", "INVALID_ARGUMENT"}
    else:
        assert payload == unframe(encode_extents(extents))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_volatile_properties_come_back(flags: list[tuple[bool, bool]]) -> None:
    """Two bits an entry; none set is the empty payload."""
    requires_grad = np.array([a for a, _ in flags], dtype=np.bool_)
    pin_memory = np.array([b for _, b in flags], dtype=np.bool_)
    payload = encode_volatile(requires_grad, pin_memory)
    grads, pins = decode_volatile(payload, len(flags))
    assert np.array_equal(requires_grad, grads)
    assert np.array_equal(pin_memory, pins)
    assert (payload == b"") == (not any(a or b for a, b in flags))


def test_properties_of_another_table_are_refused() -> None:
    """The count of entries is part of the payload."""
    payload = encode_volatile(np.ones(3, dtype=np.bool_), np.zeros(3, dtype=np.bool_))
    with pytest.raises(InvalidArgumentError) as caught:
        decode_volatile(payload, 4)
    assert caught.value.reason == "EXTENTS_MISMATCH"


@given(st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=3)), max_size=20))
def test_segments_come_back(registrations: list[tuple[bytes, bytes]]) -> None:
    """In rank order."""
    assert registrations == decode_segment(encode_segment(registrations))


def test_a_segment_of_equal_ranks_costs_next_to_nothing() -> None:
    """256 ranks without bytes entries: less than a fifth of a byte a rank."""
    assert len(encode_segment([(encode_extents(Extents()), b"")] * 256)) < 50


def test_the_same_registration_has_one_digest_however_it_was_compressed() -> None:
    """Idempotence is about content: a client with another zstd is not refused as different."""
    content = unframe(encode_extents(Extents(variable_lengths=np.arange(400, dtype=np.int64) % 3)))
    packed, raw = frame(content), b"\0" + content
    assert packed != raw
    assert registration_digest(b"s" * 32, packed, b"") == registration_digest(b"s" * 32, raw, b"")
    assert registration_digest(b"s" * 32, packed, b"") != registration_digest(b"t" * 32, packed, b"")


@pytest.mark.parametrize(
    "columns",
    [
        {"variable_lengths": np.array([-1])},
        {"lengths": np.array([2**62]), "starts": np.array([2**62])},
        {"lengths": np.array([1]), "starts": np.array([0, 0])},
        {"lengths": np.array([1])},
        {"transforms": (("zstd",),), "transform_index": np.array([2])},
        {"checksums": np.array([-2, 1])},
        {"checksums": np.array([2**32])},
        {"checksums": np.array([-1, -1])},
        {"checksums": np.array([1]), "hints": np.array([0, 0])},
    ],
)
def test_impossible_extents_are_refused(columns: dict[str, object]) -> None:
    """Negative, beyond 2**63, columns of different length, unknown transforms."""
    with pytest.raises(InvalidArgumentError) as caught:
        Extents(**columns)  # type: ignore[arg-type]
    assert caught.value.violations[0].field == "extents"


@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_are_extents(content: bytes) -> None:
    """Noise never crashes the reader."""
    try:
        extents = decode_extents(frame(b"\x01" + content))
    except InvalidArgumentError as error:
        assert error.reason in {"MALFORMED_PAYLOAD", "NOT_CANONICAL", "LIMIT_EXCEEDED", "INVALID_ARGUMENT"}
    else:
        assert extents.transforms == decode_extents(encode_extents(extents)).transforms


def test_counts_of_a_regular_rank() -> None:
    """What a warm registration is checked against."""
    info = structure_info(fsdp_rank(0, 4, 10))
    assert (10, 10, 0) == (info.entry_count, info.item_count, info.variable_count)
