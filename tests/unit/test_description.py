"""What may be said of a checkpoint, and the form in which records hold it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from shardbook.core.description import (
    check_labels,
    check_metrics,
    decode_note,
    encode_note,
    finite_metrics,
    pack_said,
    unpack_said,
)
from shardbook.errors import InvalidArgumentError


def test_numbers_of_any_kind_are_metrics() -> None:
    """Those of numpy too, and what else has a float."""
    assert {"a": 1.0, "b": 0.5, "c": 3.0} == check_metrics({"a": 1, "b": np.float32(0.5), "c": np.int64(3)})


@pytest.mark.parametrize("value", ["low", None, [1], 10**400, 1j])
def test_what_is_no_number_is_no_metric(value: Any) -> None:
    """The field names it."""
    with pytest.raises(InvalidArgumentError) as caught:
        finite_metrics({"loss": value})
    assert ["metrics.loss"] == [violation.field for violation in caught.value.violations]


def test_what_is_not_finite_is_set_apart() -> None:
    """A diverged loss is no reason to give a save up."""
    assert ({"a": 1.0}, ["b", "c"]) == finite_metrics({"a": 1.0, "b": math.nan, "c": -math.inf})


@pytest.mark.parametrize("labels", [{"a": 1}, {1: "a"}, {"": "a"}, {"-a": "b"}, {"a": "\ud800"}, {"a": "\n"}])
def test_labels_that_are_none(labels: Any) -> None:
    """Keys are names, values printable text."""
    with pytest.raises(InvalidArgumentError):
        check_labels(labels)


@pytest.mark.parametrize("note", ["text", "", 0, False, [], {"a": [1, None, "\x00\ud800é"]}, 2**70, 1.5])
def test_any_json_value_is_a_note(note: Any) -> None:
    """It comes back as it was, and is stored in ASCII."""
    stored = encode_note(note)
    assert stored.isascii()
    assert note == decode_note(stored)


@pytest.mark.parametrize("note", [math.nan, {1, 2}, b"x", object(), "x" * (65 << 10)])
def test_notes_that_are_none(note: Any) -> None:
    """What has no JSON form, or a long one."""
    with pytest.raises(InvalidArgumentError) as caught:
        encode_note(note)
    assert ["note"] == [violation.field for violation in caught.value.violations]


def test_no_note_is_none() -> None:
    """Nothing is stored for it."""
    assert "" == encode_note(None)
    assert decode_note("") is None


def test_records_hold_what_is_said() -> None:
    """It comes back as it was; nothing said takes no byte."""
    said: Any = ({"a": "é"}, {"b": 1.5}, '"note"', {"host": "n"})
    assert said == unpack_said(pack_said(*said))
    assert b"" == pack_said({}, {}, "", {})
    assert ({}, {}, "", {}) == unpack_said(b"")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"3", b'{"labels": 3}', b'{"labels": {"a": 1}}', b'{"metrics": {"a": NaN}}', b"\xff", b"[" * 9999],
)
def test_damaged_words_are_refused(content: bytes) -> None:
    """Whatever is damaged in them."""
    with pytest.raises(InvalidArgumentError):
        unpack_said(content)
