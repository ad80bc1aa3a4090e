"""``shardbook diff``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shardbook._targets import checkpoint_named
from shardbook.cli import completing, output, progress
from shardbook.cli.failures import NEGATIVE, asking_storage
from shardbook.cli.options import AsJson, Limit, Plain, Server, Timeout, client_of, rows_at_most

if TYPE_CHECKING:
    from shardbook.comparing import CheckpointDiff, TensorFacts

EXAMPLES = """\b
Examples:
  shardbook diff llm/8b-v3@1000 llm/8b-v3@latest
  shardbook diff llm/8b-v3@1500 /lustre/ckpt/8b-v3/step-1500 --tensors
  shardbook diff llm/8b-v2@9000 llm/8b-v3@500 --json | jq -r '.diff.changed[].fqn'"""
#: Tensors that are told one by one where they were only cut into other chunks, from so many chunks into so many.
_MOST_ALIKE: Final = 5
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
    show_all: Annotated[
        bool, typer.Option("--all", "-a", help="A row for each tensor, those too that were only sharded anew.")
    ] = False,
    limit: Limit = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Compare what two checkpoints hold: tensors, dtypes, shapes, chunks, bytes, world size. Not the values.

    Directories need no server. Tensors that were sharded anew, and are the same otherwise, are counted; --all has a row
    for each. Exits 1 when anything differs.
    """
    from shardbook.comparing import diff

    needs_server = checkpoint_named(a) is not None or checkpoint_named(b) is not None
    client, config = client_of(server, timeout_s) if needs_server else (None, None)
    with asking_storage(), progress.shown("comparing", is_wanted=not (is_plain or as_json)):
        found = diff(a, b, config=config, client=client)
    if as_json:
        output.print_json({"diff": found.to_json(rows_at_most(limit) or None)})
    else:
        _print(found, rows_at_most(limit), show_all=show_all, is_plain=is_plain)
    if not (found.same_tensors if tensors_only else found.is_same):
        raise typer.Exit(NEGATIVE)


def _print(found: CheckpointDiff, limit: int, *, show_all: bool, is_plain: bool) -> None:
    alike = Counter[tuple[int, int]]() if show_all else _sharded_alike(found)
    rows = list(_rows(found, alike))
    shown = rows[: limit or None]
    if shown:
        output.print_table(_COLUMNS, shown, is_plain=is_plain)
    if len(rows) > len(shown):
        output.print_line(f"and {output.count(len(rows) - len(shown))} more: --limit 0 shows all", is_plain=is_plain)
    if alike:
        output.print_line("tensors that were only sharded anew are counted: --all shows each", is_plain=is_plain)
    for line in _summary(found):
        output.print_line(line, is_plain=is_plain)


def _sharded_alike(found: CheckpointDiff) -> Counter[tuple[int, int]]:
    """Returns how many tensors differ in nothing but their chunks, by chunks in A and in B, where those are many."""
    from shardbook.comparing import Change

    only = (change for change in found.changed if change.changed == (Change.SHARDING,))
    alike = Counter((change.a.chunk_count, change.b.chunk_count) for change in only)
    return Counter({counts: number for counts, number in alike.items() if number > _MOST_ALIKE})


def _rows(found: CheckpointDiff, alike: Counter[tuple[int, int]]) -> Iterator[tuple[str, ...]]:
    """Yields a row for each entry that differs, but for those that are counted in ``alike``: one for each count."""
    from shardbook.comparing import Change
    from shardbook.core.table import printable

    for one in found.removed:
        yield "-", printable(one.fqn), "removed", _told(one), "-"
    for one in found.added:
        yield "+", printable(one.fqn), "added", "-", _told(one)
    for (before, after), number in alike.most_common():
        chunks_of = (f"{output.count(count)} chunk{'' if count == 1 else 's'} each" for count in (before, after))
        yield "~", f"({output.count(number)} tensors)", Change.SHARDING.value, *chunks_of
    for change in found.changed:
        if change.changed == (Change.SHARDING,) and (change.a.chunk_count, change.b.chunk_count) in alike:
            continue
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
        told = "tensors: " + ", ".join(f"{output.count(len(some))} {what}" for some, what in counts if some)
        yield f"{told}, in sharding alone" if found.only_resharded else told
    yield _pair("bytes", output.count(a.size_bytes), output.count(b.size_bytes))
    yield _pair("world size", output.count(a.world_size), output.count(b.world_size))


def _pair(what: str, a: str, b: str) -> str:
    return f"{what}: {a}" if a == b else f"{what}: {a}, then {b}"


__all__ = ["EXAMPLES", "diff_checkpoints"]
