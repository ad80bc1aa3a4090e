"""Regions of a tensor as numpy's basic indexing has them, resolved against a shape. No I/O."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from types import EllipsisType
from typing import Final, TypeAlias

from shardbook.core.box import Box
from shardbook.errors import InvalidArgumentError

#: One index: an integer takes its dimension away, a slice keeps it, an ellipsis stands for whole dimensions.
Index: TypeAlias = "int | slice | EllipsisType"
#: What ``array[region]`` takes, without steps, new axes and arrays; None for the whole tensor.
Region: TypeAlias = "Index | tuple[Index, ...] | None"

_TEXT: Final = re.compile(r"(.*)\[([^\[\]]*)\]", re.DOTALL)
_NUMBER: Final = r"\s*([+-]?[0-9]{1,19})?\s*"
_SLICE: Final = re.compile(f"{_NUMBER}:{_NUMBER}(?::{_NUMBER})?")


@dataclass(frozen=True)
class Selection:
    """A region of one tensor.

    Attributes:
        box: The cells, in the tensor's coordinates.
        kept: Dimensions that no integer took away, in order.
    """

    box: Box
    kept: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result, elements; empty for one cell."""
        return tuple(self.box.sizes[dim] for dim in self.kept)


def select(region: Region, shape: tuple[int, ...], fqn: str = "") -> Selection:
    """Returns what ``array[region]`` would select of an array of this shape.

    Args:
        region: Slices have bounds like numpy's (negative ones count from the end, those beyond are cut) and no step.
        shape: Elements.
        fqn: Tensor that errors name.

    Raises:
        InvalidArgumentError: Reason ``INVALID_REGION``: it is none, has too many indices, a step other than 1, or an
            integer outside of the tensor.
    """
    indices = _whole(region, shape, fqn)
    offsets, sizes, kept = [], [], []
    for dim, (index, size) in enumerate(zip(indices, shape, strict=True)):
        if isinstance(index, slice):
            begin, end = _bounds(index, size, fqn)
            kept.append(dim)
        else:
            begin = _integer(index, fqn)
            if not -size <= begin < size:
                raise _bad(f"index {begin} is outside of dimension {dim}, which has {size}", fqn)
            begin %= size
            end = begin + 1
        offsets.append(begin)
        sizes.append(end - begin)
    return Selection(Box(tuple(offsets), tuple(sizes)), tuple(kept))


def parse_tensor(text: str) -> tuple[str, Region]:
    """Returns name and region of what people type: ``embed.weight[0:10]``, ``w[-1]``, ``w[:, 3]``, or a name alone.

    A name that ends in a bracket itself is written with ``[...]`` behind it.

    Raises:
        InvalidArgumentError: Reason ``INVALID_REGION``: what stands in the brackets is no region.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        return text, None
    fqn, inside = match.groups()
    return fqn, tuple(_parse_index(part, text) for part in inside.split(","))


def _parse_index(part: str, text: str) -> Index:
    stripped = part.strip()
    if stripped == "...":
        return ...
    match = _SLICE.fullmatch(part)
    if match is not None:
        return slice(*(None if bound is None else int(bound) for bound in match.groups()))
    if re.fullmatch(r"[+-]?[0-9]{1,19}", stripped):
        return int(stripped)
    raise _bad(
        f"{part!r} in {text!r} is neither an index nor a slice: write w[0:10], w[-1] or w[:, 3:5], and for a name "
        "that ends in a bracket w[0][...]"
    )


def _whole(region: Region, shape: tuple[int, ...], fqn: str) -> list[int | slice]:
    """One index a dimension: the ellipsis, or the end, filled with whole dimensions."""
    given = () if region is None else region if isinstance(region, tuple) else (region,)
    at = [number for number, index in enumerate(given) if index is Ellipsis]
    if len(at) > 1:
        raise _bad("there is more than one ellipsis", fqn)
    missing = len(shape) - (len(given) - len(at))
    if missing < 0:
        raise _bad(f"there are {len(given) - len(at)} indices for {len(shape)} dimensions", fqn)
    split = at[0] if at else len(given)
    filled = [*given[:split], *[slice(None)] * missing, *given[split + len(at) :]]
    return [index for index in filled if index is not Ellipsis]


def _bounds(index: slice, size: int, fqn: str) -> tuple[int, int]:
    if index.step is not None and _integer(index.step, fqn) != 1:
        raise _bad(f"step {index.step} is not 1", fqn)
    start, stop = (None if bound is None else _integer(bound, fqn) for bound in (index.start, index.stop))
    begin, end, _ = slice(start, stop).indices(size)
    return begin, max(begin, end)


def _integer(value: object, fqn: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _bad(f"{value!r:.80} is neither an integer nor a slice", fqn)
    try:
        return operator.index(value)
    except TypeError:  # an array of more than one integer has the method, too
        raise _bad(f"{value!r:.80} is neither an integer nor a slice", fqn) from None


def _bad(why: str, fqn: str = "") -> InvalidArgumentError:
    what = f"region of {fqn!a}" if fqn else "a region"
    return InvalidArgumentError(f"{what}: {why}", reason="INVALID_REGION", field="region")


__all__ = ["Index", "Region", "Selection", "parse_tensor", "select"]
