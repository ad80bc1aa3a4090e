"""Boxes refuse to be invalid, and their set algebra is that of the cells they paint."""

from __future__ import annotations

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.box import Box
from shardbook.errors import InvalidArgumentError

_BOXES_OF_TWO = st.builds(
    lambda pairs: Box(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=2, max_size=2),
)


def _cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, e) for o, e in zip(box.offsets, box.ends, strict=True))))


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [
        ((-1,), (1,)),
        ((0,), (-1,)),
        ((2**63,), (0,)),
        ((0,), (2**63,)),
        ((2**62,), (2**62,)),
        ((0, 0), (1,)),
        ((0.5,), (1,)),
        (("a",), (1,)),
        (3, (1,)),
        ((0,) * 65, (1,) * 65),
    ],
)
def test_a_box_that_no_tensor_can_have_is_refused_with_its_field(offsets: object, sizes: object) -> None:
    """Negative, 2**63 and more, mismatched and non-integer values are typed errors that name the field."""
    with pytest.raises(InvalidArgumentError) as caught:
        Box(offsets, sizes)  # type: ignore[arg-type]

    assert "INVALID_ARGUMENT" == caught.value.reason
    assert caught.value.violations[0].field in {"offsets", "sizes"}


def test_a_scalar_is_one_cell_and_a_zero_size_is_empty() -> None:
    """0-dim and empty boxes are legal: DCP saves both."""
    scalar, empty = Box((), ()), Box((3, 0), (0, 4))

    assert (1, False, ()) == (scalar.volume, scalar.is_empty, scalar.ends)
    assert (0, True) == (empty.volume, empty.is_empty)
    assert Box((), ()) == scalar.intersect(scalar)
    assert scalar.contains(scalar)


def test_the_largest_box_is_legal_and_its_volume_exact() -> None:
    """Values up to 2**63 - 1 are kept; a volume never wraps around."""
    box = Box((0, 0), (2**63 - 1, 2**63 - 1))

    assert (2**63 - 1) ** 2 == box.volume


def test_boxes_keep_plain_tuples_and_survive_pickling() -> None:
    """Lists and numpy integers become tuples of int, so that equal boxes are equal and hash equal."""
    box = Box([1, 2], [3, 4])  # type: ignore[arg-type]

    assert Box((1, 2), (3, 4)) == box
    assert hash(Box((1, 2), (3, 4))) == hash(box)
    assert box == pickle.loads(pickle.dumps(box))


def test_boxes_of_different_dimensions_cannot_be_compared() -> None:
    """A box has no place in a tensor of other dimensions."""
    with pytest.raises(InvalidArgumentError):
        Box((0,), (1,)).intersect(Box((0, 0), (1, 1)))
    with pytest.raises(InvalidArgumentError):
        Box((0,), (1,)).contains(Box((), ()))


@given(_BOXES_OF_TWO, _BOXES_OF_TWO)
def test_set_algebra_is_that_of_the_cells(left: Box, right: Box) -> None:
    """volume, is_empty, intersect and contains agree with sets of cells."""
    shared = left.intersect(right)

    assert len(_cells(left)) == left.volume
    assert (not _cells(left)) == left.is_empty
    assert _cells(left) & _cells(right) == (_cells(shared) if shared else set())
    if not right.is_empty:
        assert (_cells(right) <= _cells(left)) == left.contains(right)
