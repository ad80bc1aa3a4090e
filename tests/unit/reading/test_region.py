"""Regions select what numpy's basic indexing selects, and say what they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.errors import InvalidArgumentError
from shardbook.reading.region import parse_tensor, select

_bounds = st.none() | st.integers(-7, 7)


@st.composite
def shapes_and_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    """A shape, and a region of it that may or may not be one."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    index = st.builds(slice, _bounds, _bounds) | st.integers(-6, 6) | st.just(np.int64(-1))
    indices: list[Any] = draw(st.lists(index, max_size=5))
    if draw(st.booleans()):
        indices.insert(draw(st.integers(0, len(indices))), ...)
    return shape, draw(st.sampled_from([tuple(indices), None, indices[0] if indices else ...]))


@given(shapes_and_regions())
def test_a_region_selects_what_numpy_selects(case: tuple[tuple[int, ...], Any]) -> None:
    """The same cells in the same shape, or an IndexError there and a typed error here."""
    shape, region = case
    array = np.arange(int(np.prod(shape))).reshape(shape)
    try:
        expected = array[() if region is None else region]
    except IndexError:
        with pytest.raises(InvalidArgumentError) as caught:
            select(region, shape)
        assert "INVALID_REGION" == caught.value.reason
        return
    selection = select(region, shape)
    box = selection.box
    cells = array[tuple(slice(*pair) for pair in zip(box.offsets, box.ends, strict=True))]
    assert expected.shape == selection.shape
    assert np.array_equal(expected, cells.reshape(selection.shape))


@pytest.mark.parametrize(
    "region",
    [slice(0, 4, 2), slice(None, None, -1), (None,), True, "0", 1.0, np.arange(2), [0, 1], slice("a"), (..., ...)],
    ids=str,
)
def test_what_is_no_basic_index_is_refused(region: Any) -> None:
    """Steps, new axes, booleans, arrays and text: a typed error that names the field."""
    with pytest.raises(InvalidArgumentError) as caught:
        select(region, (4, 4), "w")
    assert ("INVALID_REGION", "region") == (caught.value.reason, caught.value.violations[0].field)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w", ("w", None)),
        ("embed.weight[0:10]", ("embed.weight", (slice(0, 10),))),
        ("w[-1, :4 , 3:,...]", ("w", (-1, slice(None, 4), slice(3, None), ...))),
        ("w[:]", ("w", (slice(None),))),
        ("w[::1]", ("w", (slice(None, None, 1),))),
        ("groups[0][...]", ("groups[0]", (...,))),
        ("a\nb[1]", ("a\nb", (1,))),
    ],
)
def test_what_people_type_is_parsed(text: str, expected: object) -> None:
    """A name, and what stands in its last brackets."""
    assert expected == parse_tensor(text)


@pytest.mark.parametrize("text", ["w[]", "w[a]", "w[1;2]", "w[0x1]", "w[1:2:3:4]", "w[99999999999999999999]", "w[1.5]"])
def test_what_is_no_region_is_refused(text: str) -> None:
    """The message shows how regions are written."""
    with pytest.raises(InvalidArgumentError, match="write w") as caught:
        parse_tensor(text)
    assert "INVALID_REGION" == caught.value.reason
