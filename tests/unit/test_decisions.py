"""The stored form of decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.decisions import decode_drops, encode_drops
from shardbook.errors import InvalidArgumentError

_DROPS = st.lists(st.one_of(st.just(b""), st.binary(max_size=40)), max_size=30)


@given(_DROPS)
def test_what_is_stored_is_read_back(drops: list[bytes]) -> None:
    """Bitmaps of every length, equal ones among them."""
    assert drops == decode_drops(encode_drops(drops))


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=4), st.integers(2, 200))
def test_equal_bitmaps_are_stored_once(drops: list[bytes], times: int) -> None:
    """Replicas that drop the same cost next to nothing."""
    once = len(encode_drops(drops))
    assert len(encode_drops(drops * times)) <= once + 2 * len(drops) * times + 8


@given(_DROPS, st.data())
def test_damage_is_a_typed_error_or_other_bitmaps(drops: list[bytes], data: st.DataObject) -> None:
    """Never an error from inside."""
    payload = bytearray(encode_drops(drops))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    try:
        found = decode_drops(bytes(payload))
    except InvalidArgumentError:
        return
    assert all(isinstance(drop, bytes) for drop in found)


def test_a_payload_that_ends_early_is_refused() -> None:
    """Cut anywhere."""
    payload = encode_drops([b"ab", b"", b"ab"])
    for end in range(len(payload)):
        with pytest.raises(InvalidArgumentError):
            decode_drops(payload[:end])
