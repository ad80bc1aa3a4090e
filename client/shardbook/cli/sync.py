"""``shardbook sync``."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook.cli import output, progress
from shardbook.cli.failures import NEGATIVE
from shardbook.cli.options import AsJson, Plain, Server, Timeout, client_of
from shardbook.errors import ShardbookError

if TYPE_CHECKING:
    from shardbook.sync import SyncedAttempt

EXAMPLES = """\b
Examples:
  shardbook sync /lustre/ckpt/8b-v3
  shardbook sync /lustre/ckpt/8b-v3/step-1500 s3://bucket/ckpt --json"""
_COLUMNS = (("OUTCOME", False), ("REF", False), ("DIRECTORY", False), ("WHY", False))
_PIECES = re.compile(r"([0-9]+)|([^0-9]+)")
#: Deadline of one call, seconds: nobody waits at a prompt, and parts of large attempts take their time.
_TIMEOUT_S = 60.0


def sync(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="Checkpoint directories, or any above.")],
    show_all: Annotated[
        bool, typer.Option("--all", "-a", help="A row for what the catalogue had already, too.")
    ] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Record what checkpoint directories hold and the catalogue lacks.

    For saves that were made while the server was away. Directories whose job was killed before it had described them
    are put right, too. Safe to repeat, and while jobs save. Exits 1 when a save was
    found that could not be recorded, or none was found.
    """
    from shardbook.sync import sync_directories, unsettled

    client, config = client_of(server, timeout_s)
    results: list[SyncedAttempt] = []
    try:
        with progress.shown("syncing", is_wanted=not (is_plain or as_json)) as tell:
            for result in sync_directories(client, directories, stores=config.stores):
                results.append(result)
                tell(len(results), len(results), "attempts")
    except ShardbookError:
        # What was recorded before the server went away is worth knowing.
        if results:
            _print(results, show_all=show_all, as_json=as_json, is_plain=is_plain)
        raise
    _print(results, show_all=show_all, as_json=as_json, is_plain=is_plain)
    if unsettled(results) or not results:
        raise typer.Exit(NEGATIVE)


def _print(results: list[SyncedAttempt], *, show_all: bool, as_json: bool, is_plain: bool) -> None:
    from shardbook.sync import SyncOutcome

    results = sorted(results, key=lambda result: _natural(result.directory))
    counts = Counter(result.outcome for result in results)
    if as_json:
        output.print_json(
            {
                "attempts": [result.to_json() for result in results],
                "counts": {outcome.value: counts[outcome] for outcome in SyncOutcome},
            }
        )
        return
    rows = [_row(result) for result in results if show_all or not _is_old_news(result)]
    if rows:
        output.print_table(_COLUMNS, rows, folded=("DIRECTORY", "WHY"), is_plain=is_plain)
    found = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in SyncOutcome if counts[outcome])
    output.print_line(
        found
        or "no checkpoint directories that Shardbook wrote were found: name the directory that the saves were given as "
        "checkpoint_id, or one above it",
        is_plain=is_plain,
    )


def _is_old_news(result: SyncedAttempt) -> bool:
    """True for what the catalogue had and nothing is to be said about: the count is enough."""
    from shardbook.sync import SyncOutcome

    return result.outcome is SyncOutcome.PRESENT and not result.message


def _natural(path: str) -> list[tuple[int, str]]:
    """Returns a key that sorts ``step-2`` before ``step-10``."""
    return [(int(digits), "") if digits else (-1, text) for digits, text in _PIECES.findall(path)]


def _row(result: SyncedAttempt) -> tuple[str, ...]:
    why = result.message
    if result.missing_ranks:
        more = "" if result.missing_count <= len(result.missing_ranks) else ", ..."
        why = f"{why}: {', '.join(map(str, result.missing_ranks))}{more}"
    return result.outcome.value, output.or_dash(result.ref or ""), result.directory, output.or_dash(why)
