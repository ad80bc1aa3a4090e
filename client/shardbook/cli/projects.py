"""``shardbook projects``."""

from __future__ import annotations

from shardbook.cli import output
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

EXAMPLES = """\b
Examples:
  shardbook projects
  shardbook projects --json | jq -r '.projects[].ref'"""
_COLUMNS = (("PROJECT", False), ("RUNS", True))


def list_projects(
    limit: Limit = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List projects."""
    client, _ = client_of(server, timeout_s)
    at_most = rows_at_most(limit)
    projects, more = take(client.list_projects(page_size=page_size(at_most)), at_most)
    if as_json:
        output.print_json({"projects": [project.to_json() for project in projects], "more": more})
        return
    rows = ((project.ref, output.count(project.run_count)) for project in projects)
    output.print_table(_COLUMNS, rows, is_plain=is_plain)
    if not projects:
        output.print_line(
            "no projects yet: `shardbook.dcp.init(run='project/run')` starts a run, and its project", is_plain=is_plain
        )
    if more and limit is None:
        output.print_line(f"only the first {DEFAULT_LIMIT} projects: --limit 0 shows all", is_plain=is_plain)
