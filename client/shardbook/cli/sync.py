"""``shardbook sync``."""

from __future__ import annotations

import importlib.util
import pickle
from collections import Counter
from typing import Annotated

import typer

from shardbook._attempts import Exporter
from shardbook.cli import output
from shardbook.cli.failures import NEGATIVE
from shardbook.cli.options import AsJson, Server, Timeout, client_of
from shardbook.core.fold import FoldedAttempt
from shardbook.errors import ShardbookError
from shardbook.sync import SyncedAttempt, SyncOutcome, sync_directories, unsettled

EXAMPLES = """\b
Examples:
  shardbook sync /lustre/ckpt/8b-v3
  shardbook sync /lustre/ckpt/8b-v3/step-1500 s3://bucket/ckpt --json"""
_COLUMNS = (("OUTCOME", False), ("REF", False), ("DIRECTORY", False), ("WHY", False))
#: Deadline of one call, seconds: nobody waits at a prompt, and parts of large attempts take their time.
_TIMEOUT_S = 60.0


def sync(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="Checkpoint directories, or any above.")],
    as_json: AsJson = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Record what checkpoint directories hold and the catalogue lacks.

    For saves that were made while the server was away. Safe to repeat, and while jobs save. Exits 1 when a save was
    found that could not be recorded.
    """
    client, config = client_of(server, timeout_s)
    results: list[SyncedAttempt] = []
    try:
        results.extend(sync_directories(client, directories, stores=config.stores, export=_exporter()))
    except ShardbookError:
        # What was recorded before the server went away is worth knowing.
        if results:
            _print(results, as_json=as_json)
        raise
    _print(results, as_json=as_json)
    if unsettled(results):
        raise typer.Exit(NEGATIVE)


def _exporter() -> Exporter | None:
    """Makes ``.metadata`` where torch is installed, as the save would have; sync itself needs no torch."""
    if importlib.util.find_spec("torch") is None:
        return None

    def export(directory: str, folded: FoldedAttempt) -> bytes:
        from shardbook.dcp.metadata import build_metadata, default_header

        prefix = folded.manifest.identity.prefix
        header = default_header(directory, prefix)
        return pickle.dumps(build_metadata(folded.structure, folded.located, prefix, header))

    return export


def _print(results: list[SyncedAttempt], *, as_json: bool) -> None:
    counts = Counter(result.outcome for result in results)
    if as_json:
        output.print_json(
            {
                "attempts": [result.to_json() for result in results],
                "counts": {outcome.value: counts[outcome] for outcome in SyncOutcome},
            }
        )
        return
    if results:
        output.print_table(_COLUMNS, map(_row, results))
    found = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in SyncOutcome if counts[outcome])
    output.print_line(found or "no checkpoint directories that Shardbook wrote were found")


def _row(result: SyncedAttempt) -> tuple[str, ...]:
    why = result.message
    if result.missing_ranks:
        more = "" if result.missing_count <= len(result.missing_ranks) else ", ..."
        why = f"{why}: {', '.join(map(str, result.missing_ranks))}{more}"
    return result.outcome.value, output.or_dash(result.ref or ""), result.directory, output.or_dash(why)
