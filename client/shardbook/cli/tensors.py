"""``shardbook tensors``."""

from __future__ import annotations

from typing import Annotated

import typer

from shardbook.catalog import TensorInfo
from shardbook.cli import completing, names, output, progress
from shardbook.cli.options import (
    DEFAULT_LIMIT,
    DEFAULT_TIMEOUT_S,
    AsJson,
    Limit,
    Plain,
    Server,
    Timeout,
    client_of,
    counted,
    page_size,
    rows_at_most,
    take,
)

EXAMPLES = """\b
Examples:
  shardbook tensors llm/8b-v3@latest
  shardbook tensors llm/8b-v3@1500 --prefix model.layers.0. --limit 0"""
_COLUMNS = (("NAME", False), ("DTYPE", False), ("SHAPE", False), ("CHUNKS", True), ("SIZE IN FILES", True))
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("CHUNKS", "DTYPE", "SIZE IN FILES", "SHAPE")


def list_tensors(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="project/run@1500, @1500.s3, @latest.", autocompletion=completing.refs)
    ],
    prefix: Annotated[str, typer.Option("--prefix", "-p", help="Only entries whose name starts with this.")] = "",
    limit: Limit = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List what a committed checkpoint holds, in state-dict order."""
    name = names.checkpoint_of(ref)
    client, _ = client_of(server, timeout_s)
    at_most = rows_at_most(limit)
    found = client.list_tensors(name, prefix, page_size=page_size(at_most))
    with progress.shown("listing", is_wanted=not (is_plain or as_json)) as tell:
        tensors, more = take(counted(found, tell, "entries"), at_most)
    if as_json:
        output.print_json({"tensors": [tensor.to_json() for tensor in tensors], "more": more})
        return
    output.print_table(_COLUMNS, map(_row, tensors), expendable=_EXPENDABLE, is_plain=is_plain)
    if prefix and not tensors:
        output.print_line(
            f"nothing begins with {prefix}: `shardbook tensors {ref}` lists every entry", is_plain=is_plain
        )
    if more and limit is None:
        told = f"only the first {DEFAULT_LIMIT} entries: --limit 0 shows all, --prefix narrows them down"
        output.print_line(told, is_plain=is_plain)


def _row(tensor: TensorInfo) -> tuple[str, ...]:
    return (
        tensor.fqn,
        tensor.dtype if tensor.is_tensor else "(object)",
        "[" + ", ".join(map(str, tensor.shape)) + "]" if tensor.is_tensor else "-",
        output.count(tensor.chunk_count),
        output.size(tensor.size_bytes),
    )
