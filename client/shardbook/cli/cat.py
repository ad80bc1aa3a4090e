"""``shardbook cat``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shardbook.cli import output, progress
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Plain, Server, Timeout
from shardbook.cli.wanted import Target, check_size, found_in, regions_of

if TYPE_CHECKING:
    from shardbook.reading.finding import Found, WantedTensor
    from shardbook.reading.stored import Array

EXAMPLES = """\b
Examples:
  shardbook cat llm/8b-v3@latest 'model.embed.weight[0:10]'
  shardbook cat llm/8b-v3@1500 'model.embed.weight[0:10]' model.norm.weight -o x.safetensors
  shardbook cat /ckpt/step-1500 'model.embed.weight[-1, :4]' --json"""
#: Most bytes that are read for a terminal.
_PRINTED_BYTES: Final = 64 << 20
_SMALLER: Final = (
    " for a terminal: ask for a part, as in 'embed.weight[0:10]', or write all of it with -o FILE.safetensors"
)
#: Most elements whose values are printed, one by one.
_PRINTED_CELLS: Final = 1000


@dataclass(frozen=True)
class PrintedTensor:
    """What was read of one tensor.

    Attributes:
        fqn: Its name.
        dtype: Name such as ``bfloat16``.
        tensor_shape: Sizes of the whole tensor, elements.
        offsets: First element read in each of its dimensions.
        shape: Sizes of what was read, elements; without the dimensions that an index took away.
        size_bytes: Bytes of what was read.
        values: Nested lists; numbers that JSON lacks are text, complex ones pairs. null with `--output`, and for more
            than 1,000 elements.
    """

    fqn: str
    dtype: str
    tensor_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    size_bytes: int
    values: Any

    @classmethod
    def of(cls, wanted: WantedTensor, array: Array, *, with_values: bool) -> PrintedTensor:
        """Returns what is said of an array."""
        shown = with_values and array.size <= _PRINTED_CELLS
        return cls(
            fqn=wanted.chunks.fqn,
            dtype=wanted.chunks.dtype,
            tensor_shape=wanted.chunks.shape,
            offsets=wanted.selection.box.offsets,
            shape=array.shape,
            size_bytes=array.nbytes,
            values=_plain(array) if shown else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        sizes = {name: list(getattr(self, name)) for name in ("tensor_shape", "offsets", "shape")}
        return {**vars(self), **sizes}


def cat(
    ref: Target,
    tensors: Annotated[
        list[str],
        typer.Argument(
            metavar="TENSOR...",
            help="Names, with the part that is wanted: 'embed.weight[0:10]', 'w[-1, :4]'. "
            "A name that ends in a bracket itself takes [...] behind it.",
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write to this .safetensors or .npy file instead."),
    ] = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Print tensors of a checkpoint, or write them to a file. Needs neither torch nor more bytes than are asked for.

    A directory or URL is read without any server.
    """
    from shardbook.reading.api import read_found
    from shardbook.reading.files import check_output, write_arrays

    regions = regions_of(tensors)
    if target is not None:
        check_output(target, len(regions))
    with progress.shown("reading", is_wanted=not (is_plain or as_json)):
        found = found_in(ref, regions, server, timeout_s)
        if target is None:
            check_size(found, _PRINTED_BYTES, _SMALLER)
        arrays = read_found(found)
        if target is not None:
            write_arrays(target, arrays, {"format": "pt", "shardbook_ref": ref})
    _print(found, arrays, target, as_json=as_json, is_plain=is_plain)


def _print(found: Found, arrays: dict[str, Array], target: Path | None, *, as_json: bool, is_plain: bool) -> None:
    both = zip(found.tensors, arrays.values(), strict=True)
    if as_json:
        rows = [PrintedTensor.of(*pair, with_values=target is None).to_json() for pair in both]
        output.print_json({"tensors": rows, "output": None if target is None else str(target)})
        return
    if target is not None:
        size_bytes = sum(array.nbytes for array in arrays.values())
        noun = "tensor" if len(arrays) == 1 else "tensors"
        output.print_line(f"{target}: {len(arrays)} {noun}, {output.size(size_bytes)}", is_plain=is_plain)
        return
    import numpy as np

    for wanted, array in both:
        shape = ", ".join(map(str, array.shape))
        output.print_line(f"{wanted.chunks.fqn}: {wanted.chunks.dtype} [{shape}]", is_plain=is_plain)
        for line in np.array2string(array, threshold=_PRINTED_CELLS // 10).splitlines():
            output.print_line(line, is_plain=is_plain)


def _plain(array: Array) -> Any:
    """Nested lists of what JSON has."""
    if array.ndim:
        return [_plain(row) for row in array]
    if array.dtype.kind in "biu":
        return array.item()
    value = complex(array)
    is_complex = array.dtype.name.startswith("complex")
    return [_number(value.real), _number(value.imag)] if is_complex else _number(value.real)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


__all__ = ["EXAMPLES", "PrintedTensor", "cat"]
