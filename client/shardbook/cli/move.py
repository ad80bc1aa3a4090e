"""``shardbook move``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook.cli import completing, names, output, progress
from shardbook.cli.failures import NEGATIVE, asking_storage
from shardbook.cli.options import AsJson, Plain, Server, Timeout, client_of
from shardbook.core.names import CheckpointName, RunName

if TYPE_CHECKING:
    from shardbook.moving import MovedCheckpoint

EXAMPLES = """\b
Examples:
  rsync -a /lustre/ckpt/8b-v3/ /archive/ckpt/8b-v3/ && shardbook move llm/8b-v3 --to archive
  shardbook move llm/8b-v3@1500 --to s3-eu/cold --from lustre/ckpt --keep
  shardbook move llm/8b-v3 --to archive --from /data/ckpt --dry-run --json | jq '.moves[].outcome'"""
_COLUMNS = (("OUTCOME", False), ("CHECKPOINT", False), ("SIZE", True), ("TO", False), ("WHY", False))
_TIMEOUT_S = 60.0


def move_checkpoints(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|REF",
            help="project/run for all that is committed; or one.",
            autocompletion=completing.runs_or_refs,
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="STORE[/PATH]", help="Where the files have been copied to.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STORE[/PATH]|DIR", help="What was copied. [default: the store of each checkpoint, whole]"
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Add the place behind the others, rather than make it the only one.")
    ] = False,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Look at the files; switch nothing.")] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Tell the catalogue that checkpoints have been copied to another store, once all of their files are there.

    Copy them first, with rsync or the like; no file is copied or removed here. Below --to everything lies as it did
    below --from. A checkpoint of which a file lacks or is too short stays where it was, and the exit code is 1. The
    same again goes on where it was interrupted.
    """
    from shardbook.moving import move

    wanted: RunName | CheckpointName
    wanted, part = (names.checkpoint_of(target), None) if "@" in target else names.run_of(target)
    client, config = client_of(server, timeout_s)
    with asking_storage(), progress.shown("moving", is_wanted=not is_plain) as tell:
        found = list(
            move(
                wanted,
                to,
                part=part,
                source=source,
                keep=keep,
                dry_run=is_dry,
                config=config,
                client=client,
                progress=tell,
            )
        )
    if as_json:
        output.print_json({"moves": [one.to_json() for one in found], "dry_run": is_dry})
    else:
        _print(found, is_dry=is_dry, is_plain=is_plain)
    if not all(one.is_there for one in found):
        raise typer.Exit(NEGATIVE)


def _print(found: list[MovedCheckpoint], *, is_dry: bool, is_plain: bool) -> None:
    from shardbook.moving import MoveOutcome

    if found:
        output.print_table(_COLUMNS, map(_row, found), expendable=("SIZE",), folded=("WHY",), is_plain=is_plain)
    counts = Counter(one.outcome for one in found)
    told = ", ".join(f"{output.count(counts[one])} {one.value}" for one in MoveOutcome if counts[one])
    output.print_line((told or "nothing to move") + (", and nothing was switched" if is_dry else ""), is_plain=is_plain)


def _row(one: MovedCheckpoint) -> tuple[str, ...]:
    return (
        one.outcome.value,
        one.ref,
        output.size(one.size_bytes),
        output.or_dash(one.to_location),
        output.or_dash(one.message),
    )
