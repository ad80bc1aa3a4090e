"""What the commands about parts of tensors have in common: ``cat``, ``chunks`` and ``read``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook._targets import checkpoint_named
from shardbook.cli import completing, output
from shardbook.cli.options import client_of
from shardbook.config import ClientConfig
from shardbook.errors import InvalidArgumentError

if TYPE_CHECKING:
    from shardbook.reading.finding import Found
    from shardbook.reading.region import Region

#: A checkpoint that is read with or without a server.
Target = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="project/run@1500, @1500.s3, @latest; or a directory or URL.",
        autocompletion=completing.refs,
    ),
]


def regions_of(tensors: list[str]) -> dict[str, Region]:
    """Returns what texts such as ``embed.weight[0:10]`` name.

    Raises:
        InvalidArgumentError: One is no part of a tensor, or a tensor is named twice.
    """
    from shardbook.reading.region import parse_tensor

    parsed = [parse_tensor(text) for text in tensors]
    regions = dict(parsed)
    if len(regions) < len(parsed):
        raise InvalidArgumentError("one tensor is named twice", field="tensors")
    return regions


def found_in(target: str, regions: Mapping[str, Region], server: str | None, timeout_s: float) -> Found:
    """Returns where the cells lie; only for a ref is a server needed. Raises as ``chunks_of`` and ``client_of``."""
    from shardbook.reading.finding import chunks_of

    if checkpoint_named(target) is None:
        return chunks_of(target, regions, ClientConfig.from_env())
    client, config = client_of(server, timeout_s)
    return chunks_of(target, regions, config, client)


def check_size(found: Found, limit_bytes: int, advice: str) -> None:
    """Raises InvalidArgumentError for more than a command is good for, before it is read; ``advice`` ends the line."""
    from shardbook.core.dtype import ITEMSIZES, dtype_code

    size_bytes = sum(
        math.prod(one.selection.box.sizes) * int(ITEMSIZES[dtype_code(one.chunks.dtype)]) for one in found.tensors
    )
    if size_bytes > limit_bytes:
        raise InvalidArgumentError(f"that is {output.size(size_bytes)}{advice}", reason="TOO_LARGE", field="tensors")


__all__ = ["Target", "check_size", "found_in", "regions_of"]
