"""``shardbook runs``."""

from __future__ import annotations

from typing import Annotated

import typer

from shardbook.catalog import Run, RunPart
from shardbook.cli import completing, names, output
from shardbook.cli.options import (
    DEFAULT_LIMIT,
    DEFAULT_TIMEOUT_S,
    AsJson,
    Limit,
    Plain,
    Server,
    Timeout,
    client_of,
    page_size,
    rows_at_most,
    take,
)
from shardbook.core.names import DEFAULT_PART

EXAMPLES = """\b
Examples:
  shardbook runs
  shardbook runs llm --json | jq -r '.runs[].ref'"""
_COLUMNS = (
    ("RUN", False),
    ("LATEST", True),
    ("CHECKPOINTS", True),
    ("WRITING", False),
    ("SESSION", True),
    ("HOST", False),
    ("USER", False),
    ("LAST SEEN", False),
)
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("SESSION", "USER", "HOST", "LAST SEEN", "WRITING", "CHECKPOINTS", "LATEST")


def list_runs(
    project: Annotated[
        str | None,
        typer.Argument(metavar="[PROJECT]", help="Only the runs of one project.", autocompletion=completing.projects),
    ] = None,
    limit: Limit = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List runs: where each stands, and who writes it."""
    if project is not None:
        project = names.project_of(project)
    client, _ = client_of(server, timeout_s)
    at_most = rows_at_most(limit)
    runs, more = take(client.list_runs(project, page_size=page_size(at_most)), at_most)
    if as_json:
        output.print_json({"runs": [run.to_json() for run in runs], "more": more})
        return
    output.print_table(
        _COLUMNS,
        expendable=_EXPENDABLE,
        rows=(_row(run, part) for run in runs for part in run.parts),
        is_plain=is_plain,
    )
    if not runs:
        if project is not None and next(client.list_runs(page_size=1), None) is not None:
            output.print_line(
                f"no runs in project {project}: `shardbook runs` lists those of all projects", is_plain=is_plain
            )
        else:
            output.print_line(
                f"no runs yet: `shardbook.dcp.init(run='{project or 'project'}/run')` starts one", is_plain=is_plain
            )
    if more and limit is None:
        output.print_line(f"only the first {DEFAULT_LIMIT} runs: --limit 0 shows all", is_plain=is_plain)


def _row(run: Run, part: RunPart) -> tuple[str, ...]:
    return (
        run.ref if part.part == DEFAULT_PART else f"{run.ref}:{part.part}",
        "-" if part.latest_step is None else str(part.latest_step),
        output.count(part.checkpoint_count),
        "yes" if part.writing else "no",
        str(part.session),
        output.or_dash(part.host),
        output.or_dash(part.user),
        output.table_time(part.last_seen_time),
    )
