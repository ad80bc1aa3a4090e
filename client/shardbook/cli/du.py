"""``shardbook du``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook.cli import completing, names, output, progress
from shardbook.cli.options import AsJson, Plain, Server, Timeout, client_of
from shardbook.core.names import DEFAULT_PART, RunName

if TYPE_CHECKING:
    from shardbook.client import Client
    from shardbook.usage import PartUsage

EXAMPLES = """\b
Examples:
  shardbook du
  shardbook du llm other/run --json | jq '[.parts[].size_bytes] | add'"""
_COLUMNS = (("SIZE", True), ("CHECKPOINTS", True), ("SUPERSEDED", True), ("RUN", False))
#: Deadline of one call, seconds: large listings take their time.
_TIMEOUT_S = 60.0


def disk_usage(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROJECT|RUN]...",
            help="Projects, and runs as project/run; all of them when none is named.",
            autocompletion=completing.runs,
        ),
    ] = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Show how many bytes the checkpoints of runs take, largest first, as the catalogue has them.

    SUPERSEDED is what later sessions saved anew. What killed saves left is not counted: `shardbook gc` finds it.
    """
    from shardbook.usage import usage

    client, _ = client_of(server, timeout_s)
    with progress.shown("counting", is_wanted=not (is_plain or as_json)) as tell:
        parts = list(usage(client, dict.fromkeys(_runs(client, targets or [])), tell))
    parts.sort(key=lambda one: (-one.size_bytes, one.run, one.part))
    total = sum(one.size_bytes for one in parts)
    if as_json:
        output.print_json({"parts": [one.to_json() for one in parts], "size_bytes": total})
        return
    output.print_table(_COLUMNS, map(_row, parts), is_plain=is_plain)
    output.print_line(f"{output.size(total)} in all", is_plain=is_plain)


def _runs(client: Client, targets: list[str]) -> Iterator[RunName]:
    if not targets:
        yield from (RunName.parse(run.name) for run in client.list_runs())
    for target in targets:
        if "/" in target:
            yield names.run_of(target)[0]
        else:
            yield from (RunName.parse(run.name) for run in client.list_runs(names.project_of(target)))


def _row(one: PartUsage) -> tuple[str, ...]:
    return (
        output.size(one.size_bytes),
        output.count(one.checkpoint_count),
        output.size(one.superseded_bytes) if one.superseded_count else "-",
        one.run if one.part == DEFAULT_PART else f"{one.run}:{one.part}",
    )


__all__ = ["EXAMPLES", "disk_usage"]
