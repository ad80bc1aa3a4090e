"""``shardbook diff``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from shardbook._targets import checkpoint_named
from shardbook.cli import completing, output, progress
from shardbook.cli.failures import NEGATIVE, asking_storage
from shardbook.cli.options import AsJson, Limit, Plain, Server, Timeout, client_of
from shardbook.comparing import Change, CheckpointDiff, TensorFacts, diff
from shardbook.core.table import printable

EXAMPLES = """\b
Examples:
  shardbook diff llm/8b-v3@1000 llm/8b-v3@latest
  shardbook diff llm/8b-v3@1500 /lustre/ckpt/8b-v3/step-1500 --tensors
  shardbook diff llm/8b-v2@9000 llm/8b-v3@500 --json | jq -r '.diff.changed[].fqn'"""
_COLUMNS = (("", False), ("NAME", False), ("WHAT", False), ("A", False), ("B", False))
#: Deadline of one call, seconds: the metadata of a large checkpoint takes its time.
_TIMEOUT_S = 60.0


def diff_checkpoints(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="project/run@1500, @latest; or a checkpoint directory or URL.",
            autocompletion=completing.refs,
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The same of the other checkpoint.", autocompletion=completing.refs)
    ],
    tensors_only: Annotated[
        bool, typer.Option("--tensors", help="Exit by the tensors alone, whatever bytes and world size are.")
    ] = False,
    limit: Limit = 50,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Compare what two checkpoints hold: tensors, dtypes, shapes, chunks, bytes, world size. Not the values.

    Directories need no server. Exits 1 when anything differs.
    """
    needs_server = checkpoint_named(a) is not None or checkpoint_named(b) is not None
    client, config = client_of(server, timeout_s) if needs_server else (None, None)
    with asking_storage(), progress.shown("comparing", is_wanted=not (is_plain or as_json)):
        found = diff(a, b, config=config, client=client)
    if as_json:
        output.print_json({"diff": found.to_json(limit or None)})
    else:
        _print(found, limit, is_plain=is_plain)
    if not (found.same_tensors if tensors_only else found.is_same):
        raise typer.Exit(NEGATIVE)


def _print(found: CheckpointDiff, limit: int, *, is_plain: bool) -> None:
    rows = list(_rows(found))
    shown = rows[: limit or None]
    if shown:
        output.print_table(_COLUMNS, shown, is_plain=is_plain)
    if len(rows) > len(shown):
        output.print_line(f"and {output.count(len(rows) - len(shown))} more: --limit 0 shows all", is_plain=is_plain)
    for line in _summary(found):
        output.print_line(line, is_plain=is_plain)


def _rows(found: CheckpointDiff) -> Iterator[tuple[str, ...]]:
    for one in found.removed:
        yield "-", printable(one.fqn), "removed", _told(one), "-"
    for one in found.added:
        yield "+", printable(one.fqn), "added", "-", _told(one)
    for change in found.changed:
        what = ", ".join(change.changed)
        chunks = Change.SHARDING in change.changed
        yield "~", printable(change.fqn), what, _told(change.a, chunks=chunks), _told(change.b, chunks=chunks)


def _told(one: TensorFacts, *, chunks: bool = False) -> str:
    if not one.is_tensor:
        return "(object)"
    told = f"{one.dtype} [{', '.join(map(str, one.shape))}]"
    return f"{told} in {output.count(one.chunk_count)}" if chunks else told


def _summary(found: CheckpointDiff) -> Iterator[str]:
    a, b = found.a, found.b
    if found.same_structure:
        yield "tensors: the same, one structure"
    elif found.same_tensors:
        yield "tensors: the same"
    else:
        counts = ((found.removed, "removed"), (found.added, "added"), (found.changed, "changed"))
        yield "tensors: " + ", ".join(f"{output.count(len(some))} {what}" for some, what in counts if some)
    yield _pair("bytes", output.count(a.size_bytes), output.count(b.size_bytes))
    yield _pair("world size", output.count(a.world_size), output.count(b.world_size))


def _pair(what: str, a: str, b: str) -> str:
    return f"{what}: {a}" if a == b else f"{what}: {a}, then {b}"


__all__ = ["EXAMPLES", "diff_checkpoints"]
