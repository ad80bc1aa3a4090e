"""``shardbook import``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook.cli import completing, names, output, progress
from shardbook.cli.describing import given_labels, given_metrics
from shardbook.cli.failures import NEGATIVE, asking_storage
from shardbook.cli.options import AsJson, Plain, Server, Timeout, Trusted, client_of
from shardbook.core.lineage import check_end
from shardbook.core.names import CheckpointName
from shardbook.errors import InvalidArgumentError, ShardbookError

if TYPE_CHECKING:
    from shardbook.client import Client
    from shardbook.importing import ImportedCheckpoint

EXAMPLES = """\b
Examples:
  shardbook import /lustre/old/ckpt --run llm/8b-v2 --dry-run
  shardbook import /lustre/old/ckpt/final --run llm/8b-v2 --step 90000
  shardbook import s3://bucket/ckpt --run llm/8b-v2 --part weights --json
  shardbook import /lustre/old/ckpt --run llm/8b-v2 --label stage=pretrain --metric val_loss=1.9
  shardbook import /lustre/old/hf --run llm/8b-hf --step 90000 --converted-from llm/8b-v2@90000"""
_COLUMNS = (
    ("OUTCOME", False),
    ("REF", False),
    ("SAVED BY", False),
    ("RANKS", True),
    ("ENTRIES", True),
    ("SIZE", True),
    ("DIRECTORY", False),
    ("WHY", False),
)
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("ENTRIES", "RANKS", "SAVED BY", "SIZE")
_WRITERS = {"manifest": "Shardbook", "dcp": "DCP"}
#: Deadline of one call, seconds: nobody waits at a prompt, and parts of large checkpoints take their time.
_TIMEOUT_S = 60.0


def import_checkpoints(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="Checkpoint directories, or any above.")],
    run: Annotated[
        str,
        typer.Option(
            "--run",
            "-r",
            metavar="RUN",
            help="project/run to record them in; made when new.",
            autocompletion=completing.runs,
        ),
    ],
    part: Annotated[
        str | None, typer.Option("--part", metavar="PART", help="Part of the run. [default: as saved, else default]")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", min=0, help="Step. [default: as saved, else the last number of the name]"),
    ] = None,
    attempt: Annotated[
        int, typer.Option("--attempt", metavar="N", min=1, help="2 or more for a plain DCP directory saved over since.")
    ] = 1,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label each of them; may be repeated.")
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME=VALUE", help="A metric of each; may be repeated.")
    ] = None,
    note: Annotated[str | None, typer.Option("--note", metavar="TEXT", help="A note to keep with each.")] = None,
    converted_from: Annotated[
        str | None,
        typer.Option(
            "--converted-from", metavar="REF|NAME", help="What they are another form of (`shardbook lineage`)."
        ),
    ] = None,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Say what would be recorded; record nothing.")] = False,
    trusted: Trusted = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Record existing checkpoints in a run: by plain DCP, or saved under another catalogue.

    Data files stay where and as they are. Plain DCP's directories need torch here. Saves of Shardbook into this very
    run keep their session, as `shardbook sync` has it, which needs no --run; all others are recorded as offline saves.
    What a save of Shardbook says of itself (labels, metrics, note, who wrote it) comes along; --label, --metric and
    --note add to it when a checkpoint is recorded, `shardbook label` later.

    Safe to repeat: the same content again is fine, other content under the same name is refused. Exits 1 when a
    checkpoint was not recorded, or none was found.
    """
    from shardbook.importing import ImportInto, find_directories, import_directories

    into_run, part_of_run = names.run_of(run)
    if part_of_run is not None and part not in (None, part_of_run):
        raise InvalidArgumentError(f"{run} and --part {part} name two parts", field="part")
    client, config = client_of(server, timeout_s)
    into = ImportInto(
        into_run,
        part or part_of_run,
        step,
        attempt,
        trusted,
        is_dry,
        config.stores,
        given_labels(labels),
        given_metrics(metrics),
        note,
        converted_from,
    )
    if converted_from is not None:
        _check_known(client, converted_from)
    with asking_storage():
        found = find_directories(directories)
    results: list[ImportedCheckpoint] = []
    try:
        with progress.shown("importing", is_wanted=not (is_plain or as_json)) as tell:
            results.extend(import_directories(client, found, into, tell))
    except ShardbookError:
        # What was recorded before the server went away is worth knowing.
        if results:
            _print(results, as_json=as_json, is_plain=is_plain)
        raise
    _print(results, as_json=as_json, is_plain=is_plain)
    if not results or not all(result.is_settled for result in results):
        raise typer.Exit(NEGATIVE)


def _check_known(client: Client, converted_from: str) -> None:
    """Looks whether what reads as a checkpoint of the catalogue is one, or was: a slip would be recorded as a name.

    Raises:
        NotFoundError: There is none.
    """
    end = check_end(converted_from, "converted_from")
    if isinstance(end, CheckpointName):
        client.get_checkpoint(end, show_deleted=True)


def _print(results: list[ImportedCheckpoint], *, as_json: bool, is_plain: bool) -> None:
    from shardbook.importing import ImportOutcome

    counts = Counter(result.outcome for result in results)
    if as_json:
        output.print_json(
            {
                "checkpoints": [result.to_json() for result in results],
                "counts": {outcome.value: counts[outcome] for outcome in ImportOutcome},
            }
        )
        return
    if results:
        output.print_table(
            _COLUMNS, map(_row, results), expendable=_EXPENDABLE, folded=("DIRECTORY", "WHY"), is_plain=is_plain
        )
    told = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in ImportOutcome if counts[outcome])
    output.print_line(
        told
        or "no checkpoint directories were found: name one that holds .metadata or .shardbook, or a directory above it",
        is_plain=is_plain,
    )


def _row(result: ImportedCheckpoint) -> tuple[str, ...]:
    is_read = result.ref is not None
    return (
        result.outcome.value,
        output.or_dash(result.ref or ""),
        output.or_dash(_WRITERS.get(result.source, "")),
        output.count(result.world_size) if is_read else "-",
        output.count(result.entry_count) if is_read else "-",
        output.size(result.size_bytes) if is_read else "-",
        result.directory,
        output.or_dash(result.message),
    )
