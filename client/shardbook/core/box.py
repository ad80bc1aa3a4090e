"""An n-dimensional box of a tensor: what DCP calls a chunk's offsets and sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError


@dataclass(frozen=True)
class Box:
    """A box that cannot be invalid; hashable, usable from several threads.

    A box of no dimensions is one cell. A box with a size of 0 is empty: it has a place, and no cells.
    Any sequences of integers are taken (``torch.Size`` included) and kept as tuples of ``int``.

    Attributes:
        offsets: First element in each dimension, elements.
        sizes: Elements in each dimension.

    Raises:
        InvalidArgumentError: Lengths differ, a value is negative, no integer, or 2**63 and more, the box ends
            beyond 2**63 - 1, or it has more dimensions than a tensor can have.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", _integers(self.offsets, "offsets"))
        object.__setattr__(self, "sizes", _integers(self.sizes, "sizes"))
        if len(self.offsets) != len(self.sizes):
            raise InvalidArgumentError(
                f"a box has {len(self.offsets)} offsets and {len(self.sizes)} sizes", field="sizes"
            )
        if len(self.sizes) > limits.MAX_NDIM:
            raise InvalidArgumentError(
                f"a box has {len(self.sizes)} dimensions, the limit is {limits.MAX_NDIM}", field="sizes"
            )
        if any(end > limits.INT64_MAX for end in self.ends):
            raise InvalidArgumentError("a box ends beyond 2**63 - 1", field="sizes")

    @property
    def ndim(self) -> int:
        """Number of dimensions; 0 for a scalar."""
        return len(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """First element past the box in each dimension."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def volume(self) -> int:
        """Number of cells, exact however large."""
        return math.prod(self.sizes)

    @property
    def is_empty(self) -> bool:
        """True when the box has no cells."""
        return 0 in self.sizes

    def contains(self, other: Box) -> bool:
        """Returns whether ``other`` lies within this box; an empty box lies where its offsets and ends lie."""
        self._check_comparable(other)
        return all(
            mine <= theirs and their_end <= my_end
            for mine, theirs, their_end, my_end in zip(self.offsets, other.offsets, other.ends, self.ends, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """Returns the cells that both boxes have; None when they have none in common."""
        self._check_comparable(other)
        offsets = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(min(ends) - offset for offset, *ends in zip(offsets, self.ends, other.ends, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    def _check_comparable(self, other: Box) -> None:
        if self.ndim != other.ndim:
            raise InvalidArgumentError(f"a box of {other.ndim} dimensions has no place in one of {self.ndim}")


def _integers(values: Sequence[int], field: str) -> tuple[int, ...]:
    try:
        checked = tuple(map(operator.index, values))
    except TypeError as exc:
        raise InvalidArgumentError(f"{field} of a box are integers, not {values!r:.80}", field=field) from exc
    for value in checked:
        if not 0 <= value <= limits.INT64_MAX:
            raise InvalidArgumentError(f"{value} is negative, or 2**63 and more", field=field)
    return checked
