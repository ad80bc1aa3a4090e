"""Columns, names and frames: one encoding for one content, and no input that hurts the reader."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from shardbook.core.columns import ByteReader, ByteWriter, frame, pack_columns, unframe
from shardbook.errors import InvalidArgumentError
from tests.unit.strategies import fqns, int64


def pack(values: list[int], *, delta: bool) -> bytes:
    """Packs one column."""
    writer = ByteWriter()
    writer.column(np.array(values, dtype=np.int64), delta=delta)
    return writer.finish()


@given(st.lists(int64, max_size=40), st.booleans())
@example([-(2**63), 2**63 - 1, 0, -1], True)
@example([-(2**63), 2**63 - 1, 0, -1], False)
def test_any_column_comes_back(values: list[int], delta: bool) -> None:
    """Every int64 survives, whatever the differences wrap to."""
    reader = ByteReader(pack(values, delta=delta))
    assert values == reader.column(len(values), delta=delta).tolist()
    reader.end()


@given(st.lists(st.lists(int64, max_size=5), max_size=6), st.booleans())
def test_many_columns_at_once_are_packed_as_one_by_one(columns: list[list[int]], delta: bool) -> None:
    """There is one packing of a column, whoever packs it."""
    values = np.array([value for column in columns for value in column], dtype=np.int64)
    counts = np.array([len(column) for column in columns], dtype=np.int64)
    assert [pack(column, delta=delta) for column in columns] == pack_columns(values, counts, delta=delta)


def test_regular_columns_cost_a_few_bytes_whatever_their_length() -> None:
    """A constant and an even run are stored as their rule."""
    assert len(pack([7] * 100_000, delta=False)) == 2
    assert len(pack(list(range(5, 100_005)), delta=True)) == 3


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8), st.data())
def test_bytes_that_decode_are_the_only_ones_for_their_values(values: list[int], data: st.DataObject) -> None:
    """Altering a byte gives an error or other values: two encodings never mean the same (NOT_CANONICAL otherwise)."""
    packed = bytearray(pack(values, delta=False))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    reader = ByteReader(bytes(packed))
    try:
        decoded = reader.column(len(values), delta=False).tolist()
        reader.end()
    except InvalidArgumentError as error:
        assert error.reason in {"MALFORMED_PAYLOAD", "NOT_CANONICAL", "LIMIT_EXCEEDED"}
    else:
        assert values != decoded


def test_a_wider_column_than_needed_is_not_canonical() -> None:
    """The width is the narrowest that holds the values."""
    with pytest.raises(InvalidArgumentError) as caught:
        ByteReader(b"\x00\x02\x00\x00\x01\x00").column(2, delta=False)
    assert caught.value.reason == "NOT_CANONICAL"


def test_a_varint_with_leading_zeros_is_not_canonical() -> None:
    """0x80 0x00 would be a second spelling of 0."""
    with pytest.raises(InvalidArgumentError) as caught:
        ByteReader(b"\x80\x00").varint()
    assert caught.value.reason == "NOT_CANONICAL"


@given(st.lists(fqns, max_size=5))
def test_any_name_comes_back(names: list[str]) -> None:
    """NUL, lone surrogates and the empty name are names."""
    writer = ByteWriter()
    writer.names(names)
    reader = ByteReader(writer.finish())
    assert tuple(names) == reader.names(len(names))
    reader.end()


@given(st.lists(st.booleans(), max_size=30))
def test_bits_come_back_and_padding_is_zero(flags: list[bool]) -> None:
    """Eight a byte."""
    writer = ByteWriter()
    writer.bits(np.array(flags, dtype=np.bool_))
    assert (len(flags) + 7) // 8 == len(writer.finish())
    assert flags == ByteReader(writer.finish()).bits(len(flags)).tolist()


@given(st.binary(max_size=3000))
def test_any_frame_comes_back(content: bytes) -> None:
    """Raw or zstd, whichever is shorter."""
    payload = frame(content)
    assert content == unframe(payload)
    assert len(payload) <= len(content) + 1


def test_a_zstd_bomb_is_refused_before_it_inflates() -> None:
    """The frame says its size; 300 MiB of zeros in 30 kB are refused by that word."""
    bomb = b"\x01" + zstandard.ZstdCompressor().compress(bytes(300 << 20))
    assert len(bomb) < 100_000
    with pytest.raises(InvalidArgumentError) as caught:
        unframe(bomb)
    assert caught.value.reason == "LIMIT_EXCEEDED"


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    """Content size cut to 10 in the header, and a frame without a size."""
    packed = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(bytes(200)))
    packed[5] = 10
    without = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(200))
    for payload in (b"\x01" + bytes(packed), b"\x01" + without, b"\x01junk", b"\x02abc", b""):
        with pytest.raises(InvalidArgumentError) as caught:
            unframe(payload)
        assert caught.value.reason == "MALFORMED_PAYLOAD"


def test_bytes_behind_a_zstd_frame_are_refused() -> None:
    """A second payload cannot hide behind the first."""
    packed = b"\x01" + zstandard.ZstdCompressor().compress(bytes(200))
    with pytest.raises(InvalidArgumentError):
        unframe(packed + b"x")
