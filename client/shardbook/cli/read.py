"""``shardbook read``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shardbook.cli import output, progress
from shardbook.cli.failures import asking_storage
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Plain, Server, Timeout
from shardbook.cli.wanted import Target, check_size, found_in, regions_of

if TYPE_CHECKING:
    from shardbook.reading.stored import Array

EXAMPLES = """\b
Examples:
  shardbook read llm/8b-v3@latest model.norm.weight
  shardbook read llm/8b-v3@1500 'model.embed.weight[0:100]' model.norm.weight --json
  shardbook read /ckpt/step-1500 'model.embed.weight[-1]'"""
_COLUMNS = (
    ("NAME", False),
    ("DTYPE", False),
    ("SHAPE", False),
    ("MIN", True),
    ("MAX", True),
    ("MEAN", True),
    ("STD", True),
    ("ZEROS", True),
    ("NAN", True),
    ("INF", True),
)
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("INF", "ZEROS", "DTYPE", "STD")
#: Most bytes that are read for a line.
_READ_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Statistics:
    """What the values of a tensor, or of a part of it, are like.

    Attributes:
        fqn: Name of the tensor.
        dtype: Name such as ``bfloat16``.
        shape: Sizes of what was read, elements.
        cell_count: Elements that were read.
        min: Least finite value; null when there is none, and for complex numbers.
        max: Largest finite value; null likewise.
        mean: Of the finite values, in 64-bit floating point; null likewise.
        std: Of the finite values, likewise.
        zero_count: Elements that are 0.
        nan_count: Elements that are no number.
        inf_count: Elements that are infinite.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    cell_count: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    zero_count: int
    nan_count: int
    inf_count: int

    @classmethod
    def of(cls, fqn: str, dtype: str, array: Array) -> Statistics:
        """Returns what an array is like."""
        import numpy as np

        is_complex = array.dtype.name.startswith("complex")
        wide = array.astype(np.complex128 if is_complex else np.float64).reshape(-1)
        nan, inf = np.isnan(wide), np.isinf(wide)
        finite = wide[~(nan | inf)]
        least: float | None = None
        largest: float | None = None
        mean: float | None = None
        std: float | None = None
        if len(finite) and not is_complex:
            # The sum of large values may be no number where the values are.
            with np.errstate(over="ignore", invalid="ignore"):
                values = (finite.min(), finite.max(), finite.mean(), finite.std())
            least, largest, mean, std = (float(value) if math.isfinite(value) else None for value in values)
        zeros, nans, infs = (int(some.sum()) for some in (wide == 0, nan, inf))
        return cls(fqn, dtype, array.shape, array.size, least, largest, mean, std, zeros, nans, infs)

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "shape": list(self.shape)}


def read(
    ref: Target,
    tensors: Annotated[
        list[str],
        typer.Argument(metavar="TENSOR...", help="Names, with the part that is wanted: 'embed.weight[0:10]', 'w[-1]'."),
    ],
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Say what the values of tensors are like: least, largest, mean, deviation, and how many are zero or no number.

    `shardbook cat` prints the values. A directory or URL is read without any server. Needs no torch.
    """
    from shardbook.reading.api import read_found

    regions = regions_of(tensors)
    with asking_storage(), progress.shown("reading", is_wanted=not (is_plain or as_json)):
        found = found_in(ref, regions, server, timeout_s)
        check_size(found, _READ_BYTES, ": ask for a part, as in 'embed.weight[0:1000]'")
        arrays = read_found(found)
    rows = [
        Statistics.of(wanted.chunks.fqn, wanted.chunks.dtype, array)
        for wanted, array in zip(found.tensors, arrays.values(), strict=True)
    ]
    if as_json:
        output.print_json({"tensors": [row.to_json() for row in rows]})
        return
    output.print_table(_COLUMNS, map(_row, rows), expendable=_EXPENDABLE, is_plain=is_plain)


def _row(one: Statistics) -> tuple[str, ...]:
    from shardbook.core.table import printable

    values = ("-" if value is None else f"{value:.6g}" for value in (one.min, one.max, one.mean, one.std))
    counts = map(output.count, (one.zero_count, one.nan_count, one.inf_count))
    return printable(one.fqn), one.dtype, "[" + ", ".join(map(str, one.shape)) + "]", *values, *counts


__all__ = ["EXAMPLES", "Statistics", "read"]
