"""``shardbook doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from shardbook.cli import output, progress
from shardbook.cli.failures import NEGATIVE
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Plain, Server, Timeout

if TYPE_CHECKING:
    from shardbook.doctor import Finding

EXAMPLES = """\b
Examples:
  shardbook doctor
  shardbook doctor --server shardbook.example:7070 --json | jq '.findings[] | select(.health != "ok")'"""
_COLUMNS = (("", False), ("CHECK", False), ("FOUND", False), ("NEXT", False))


def doctor(
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Check what saves and loads need: packages, settings, server, token, clock, stores; say what to do.

    Exits 1 when something does not work; what only works less well is a warning. Changes nothing.
    """
    from shardbook.doctor import Health, examine

    with progress.shown("checking", is_wanted=not (is_plain or as_json)) as tell:
        findings: list[Finding] = []
        for finding in examine(server=server, timeout_s=timeout_s):
            findings.append(finding)
            tell(len(findings), len(findings), "checks")
    failed = sum(finding.health is Health.FAIL for finding in findings)
    if as_json:
        output.print_json({"findings": [finding.to_json() for finding in findings], "failed": failed})
    else:
        rows = ((one.health.value, one.check, one.detail, output.or_dash(one.next)) for one in findings)
        output.print_table(_COLUMNS, rows, folded=("FOUND", "NEXT"), is_plain=is_plain)
    if failed:
        raise typer.Exit(NEGATIVE)


__all__ = ["EXAMPLES", "doctor"]
