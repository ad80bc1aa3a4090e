"""``shardbook lineage``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shardbook.cli import names, output
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Plain, Server, Timeout, client_of
from shardbook.core import limits
from shardbook.core.lineage import LineageKind
from shardbook.core.names import CheckpointName
from shardbook.errors import InvalidArgumentError
from shardbook.lineage import Lineage, LineageEdge, LineageNode

if TYPE_CHECKING:
    from rich.tree import Tree

    from shardbook.client import Client

EXAMPLES = """\b
Examples:
  shardbook lineage llm/8b-v3@latest
  shardbook lineage llm/8b-v3@1500 --up --depth 20 --json
  shardbook lineage llm/8b-chat@200 fine-tuned-from llm/8b-v3@1500
  shardbook lineage llm/8b-v3@1500 evaluated-by "mmlu 5-shot"
  shardbook lineage llm/8b-v3@1500 evaluated-by "mmlu 5-shot" --remove"""
_COLUMNS = (
    ("WAY", False),
    ("DEPTH", True),
    ("CHECKPOINT", False),
    ("KIND", False),
    ("OF", False),
    ("RECORDED", False),
)
_EXPENDABLE = ("RECORDED", "WAY")
#: How a younger end is told from its older one.
_DOWNWARD: Final = {
    "resumed_from": "resumed as",
    "fine_tuned_from": "fine-tuned to",
    "converted_from": "converted to",
    "evaluated_by": "evaluated by",
}


def lineage(
    ref: Annotated[str, typer.Argument(metavar="REF", help="project/run@1500, @1500.s3, @latest, @best.")],
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND", help="resumed-from, fine-tuned-from, converted-from, evaluated-by."),
    ] = None,
    other: Annotated[
        str | None,
        typer.Argument(metavar="OBJECT]", help="REF of any run, or the name or URL of something else."),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the edge back, rather than record it.")] = False,
    up: Annotated[bool, typer.Option("--up", help="Only what it comes from.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Only what came of it.")] = False,
    depth: Annotated[
        int,
        typer.Option("--depth", metavar="N", min=1, max=limits.MAX_LINEAGE_DEPTH, help="How many edges away to look."),
    ] = limits.DEFAULT_LINEAGE_DEPTH,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Show where a checkpoint comes from and what came of it, or record that by hand.

    Terminals show a tree, all else a row an edge. Jobs record it themselves when they are told: init(resumed_from=,
    fine_tuned_from=), load(lineage=). With KIND and OBJECT an edge is recorded; the same again changes nothing, and one
    that would close a cycle is refused.
    """
    name = names.checkpoint_of(ref)
    if kind is not None and other is None:
        raise InvalidArgumentError("write REF KIND OBJECT, or REF alone", field="lineage")
    if remove and kind is None:
        raise InvalidArgumentError("--remove goes with KIND and OBJECT", field="remove")
    client, _ = client_of(server, timeout_s)
    if kind is not None and other is not None:
        if up or down:
            raise InvalidArgumentError("--up and --down go with REF alone", field="up")
        told = _changed(client, name, LineageKind.parse(kind), other, remove=remove)
        if not as_json:
            output.print_line(told, is_plain=is_plain)
            return
    direction = "both" if up is down else "up" if up else "down"
    found = client.get_lineage(name, direction=direction, max_depth=depth)
    if as_json:
        output.print_json({"lineage": found.to_json()})
    elif is_plain or not sys.stdout.isatty():
        rows = _rows(found)
        output.print_table(_COLUMNS, rows, expendable=_EXPENDABLE, is_plain=True)
        if not rows:
            _print_remarks(found, ref, direction)
    else:
        output.print_tree(_tree(found))
        _print_remarks(found, ref, direction)


def _changed(client: Client, name: CheckpointName, kind: LineageKind, other: str, *, remove: bool) -> str:
    """Records an edge, or takes it back; returns what was done."""
    if remove:
        return "removed" if client.remove_lineage(name, kind, other) else "there was no such edge"
    edge = client.add_lineage(name, kind, other)
    return f"{edge.subject.ref} {_words(edge.kind)} {_shown(edge.object)}"


def _print_remarks(found: Lineage, ref: str, direction: str) -> None:
    if found.session_begin is not None:
        begin = found.session_begin.ref
        output.print_line(f"Its session says where it began with {begin}: `shardbook lineage {begin}`")
    elif not found.ancestors and not found.descendants:
        which = {"up": " that it comes from", "down": " that came of it"}.get(direction, "")
        output.print_line(
            f"Nothing is recorded{which}: `shardbook lineage {ref} fine-tuned-from REF` records where it comes from"
        )
    if found.truncated:
        output.print_line("There is more: --depth looks further")


def _rows(found: Lineage) -> Sequence[tuple[str, ...]]:
    return [
        (way, str(edge.depth), _shown(edge.subject), edge.kind, _shown(edge.object), output.time(edge.create_time))
        for way, edges in (("up", found.ancestors), ("down", found.descendants))
        for edge in edges
    ]


def _tree(found: Lineage) -> Tree:
    """Returns the checkpoint with what it comes from and what came of it below; each checkpoint is unfolded once."""
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(output.plain(_shown(found.checkpoint)), style="bold"))
    for title, edges, is_up in (("comes from", found.ancestors, True), ("came of it", found.descendants, False)):
        if edges:
            by_end: dict[str, list[LineageEdge]] = {}
            for edge in edges:
                by_end.setdefault((edge.younger if is_up else edge.older).ref, []).append(edge)
            _grow(root.add(Text(title, style="dim")), found.checkpoint.ref, by_end, set(), is_up=is_up)
    return root


def _grow(branch: Tree, ref: str, edges: dict[str, list[LineageEdge]], unfolded: set[str], *, is_up: bool) -> None:
    from rich.text import Text

    unfolded.add(ref)
    for edge in edges.get(ref, ()):
        end = edge.older if is_up else edge.younger
        words = _words(edge.kind) if is_up else _DOWNWARD.get(edge.kind, edge.kind)
        is_repeated = end.ref in unfolded and end.ref in edges
        told = f"{words} {_shown(end)}{' (see there)' if is_repeated else ''}"
        below = branch.add(Text(output.plain(told)))
        if end.is_known and not is_repeated:
            _grow(below, end.ref, edges, unfolded, is_up=is_up)


def _words(kind: str) -> str:
    return kind.replace("_", " ").replace("fine tuned", "fine-tuned")


def _shown(node: LineageNode) -> str:
    return node.ref if node.state in ("COMMITTED", "") else f"{node.ref} ({node.state.lower()})"
