"""``shardbook ls`` and ``shardbook show``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

import typer

from shardbook.catalog import Checkpoint, CheckpointState, FileDeletion
from shardbook.cli import completing, names, output, progress
from shardbook.cli.describing import note_text
from shardbook.cli.options import (
    DEFAULT_LIMIT,
    DEFAULT_TIMEOUT_S,
    AsJson,
    Limit,
    Plain,
    Server,
    Timeout,
    client_of,
    counted,
    page_size,
    rows_at_most,
    take,
)
from shardbook.core.names import RunName
from shardbook.descriptions import RankInfo, SaveTiming, Writer

LS_EXAMPLES = """\b
Examples:
  shardbook ls llm/8b-v3
  shardbook ls llm/8b-v3 --all --limit 10
  shardbook ls 'llm/*' --order-by metrics.val_loss --limit 1
  shardbook ls '*/*' --filter 'labels.stage = eval AND step >= 1000 AND NOT metrics.val_loss > 2'
  shardbook ls llm/8b-v3 --json | jq -r '.checkpoints[].ref'"""
SHOW_EXAMPLES = """\b
Examples:
  shardbook show llm/8b-v3@latest
  shardbook show llm/8b-v3@best --ranks
  shardbook show llm/8b-v3@1500.s3 --json | jq -r .checkpoint.location"""
_COLUMNS = (
    ("STEP", True),
    ("STATE", False),
    ("REF", False),
    ("ALIASES", False),
    ("WORLD", True),
    ("TENSORS", True),
    ("CHUNKS", True),
    ("SIZE", True),
    ("CREATED", False),
    ("SESSION", True),
)
_RANK_COLUMNS = (("RANK", True), ("SIZE", True), ("PLAN S", True), ("WRITE S", True), ("REGISTER S", True))
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("SESSION", "CHUNKS", "TENSORS", "WORLD", "SIZE", "CREATED", "ALIASES", "STATE", "STEP")
#: A text of a filter, which is passed over, or a field that is compared (docs/filters.md). The server has the grammar.
_COMPARED: Final = re.compile(
    r"\"(?:[^\"\\]|\\.)*\""
    r"|'(?:[^'\\]|\\.)*'"
    r"|(?<![\w.*/+@-])([\w.*/+@-]+)\s*[<>=!:]"
)
#: Labels and metrics that have columns.
_MOST_FIELDS: Final = 4


def list_checkpoints(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="project/run, project/run:part for one part, or a pattern: 'llm/*', '*/8b-*'.",
            autocompletion=completing.runs,
        ),
    ],
    filter_text: Annotated[
        str, typer.Option("--filter", "-f", metavar="FILTER", help="Which of them (docs/filters.md).")
    ] = "",
    order_by: Annotated[
        str,
        typer.Option(
            "--order-by", "-o", metavar="FIELDS", help="step, bytes, metrics.NAME, labels.KEY, ...; 'step desc' too."
        ),
    ] = "",
    show_all: Annotated[
        bool, typer.Option("--all", "-a", help="Open, failed, expired, superseded and deleted ones too.")
    ] = False,
    limit: Limit = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List the checkpoints of one run or of several.

    Those of a run come with the newest session and step first, those of several runs with the newest first, unless
    --order-by says otherwise. Labels and metrics that are asked for have columns.
    """
    name, part = names.runs_of(run)
    at_most = rows_at_most(limit)
    client, _ = client_of(server, timeout_s)
    found = client.list_checkpoints(
        name, part=part, show_all=show_all, filter=filter_text, order_by=order_by, page_size=page_size(at_most)
    )
    with progress.shown("listing", is_wanted=not (is_plain or as_json)) as tell:
        checkpoints, more = take(counted(found, tell, "checkpoints"), at_most)
    if as_json:
        rows = [checkpoint.to_json() for checkpoint in checkpoints]
        # By part. The listing does not say: what @latest means need not be among what it shows.
        latest = (
            {one.part: one.latest or None for one in client.get_run(name).parts if part in (None, one.part)}
            if isinstance(name, RunName)
            else {}
        )
        output.print_json({"checkpoints": rows, "more": more, "latest": latest})
        return
    fields = _described_fields(filter_text, order_by)
    columns = (*_COLUMNS[:4], *_columns_of(fields), *_COLUMNS[4:])
    shown = (_row(one, fields) for one in checkpoints)
    output.print_table(columns, shown, expendable=_EXPENDABLE, is_plain=is_plain)
    if not checkpoints and not show_all:
        what = "such checkpoint is committed" if filter_text or order_by else "committed checkpoints"
        every = f"`shardbook ls {shlex.quote(run)} --all` shows every attempt"
        output.print_line(f"no {what}: {every}", is_plain=is_plain)
    if more and limit is None:
        output.print_line(f"only the first {DEFAULT_LIMIT} checkpoints: --limit 0 shows all", is_plain=is_plain)


def show_checkpoint(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="project/run@1500, @1500.s3, @latest.", autocompletion=completing.refs)
    ],
    ranks: Annotated[bool, typer.Option("--ranks", help="What each rank took and wrote, too.")] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Show everything about one checkpoint."""
    name = names.checkpoint_of(ref)
    client, config = client_of(server, timeout_s)
    checkpoint = client.get_checkpoint(name)
    by_rank = list(client.list_ranks(checkpoint.name)) if ranks else []
    if as_json:
        listed = {"ranks": [one.to_json() for one in by_rank]} if ranks else {}
        output.print_json({"checkpoint": checkpoint.to_json(), **listed})
        return
    facts = _facts(checkpoint)
    here = config.stores.here(checkpoint.location)
    if here is not None and here != checkpoint.location:
        facts.insert(3, ("path here", here))
    output.print_facts(facts, is_plain=is_plain)
    if ranks and not by_rank:
        output.print_line("nothing is known of its ranks: an older server or client saved it", is_plain=is_plain)
    elif ranks:
        output.print_table(_RANK_COLUMNS, map(_rank_row, by_rank), is_plain=is_plain)


def _rank_row(one: RankInfo) -> tuple[str, ...]:
    times = (one.plan_s, one.write_s, one.register_s)
    return (str(one.rank), output.size(one.size_bytes), *(f"{time_s:.3f}" for time_s in times))


def _described_fields(filter_text: str, order_by: str) -> list[str]:
    """Returns the labels and metrics that are asked for, those that are ordered by first: they are worth a column."""
    ordered = [one.split()[0] for one in order_by.split(",") if one.strip()]
    compared = [match[1] for match in _COMPARED.finditer(filter_text) if match[1]]
    fields = [field for field in (*ordered, *compared) if field.startswith(("labels.", "metrics."))]
    return list(dict.fromkeys(fields))[:_MOST_FIELDS]


def _columns_of(fields: Sequence[str]) -> Iterator[tuple[str, bool]]:
    keys = [field.partition(".")[2] for field in fields]
    taken = {header for header, _ in _COLUMNS}
    for field, key in zip(fields, keys, strict=True):
        yield (key if keys.count(key) == 1 and key not in taken else field), field.startswith("metrics.")


def _value(checkpoint: Checkpoint, field: str) -> str:
    kind, _, key = field.partition(".")
    if kind == "labels":
        return checkpoint.labels.get(key, "-")
    return f"{checkpoint.metrics[key]:g}" if key in checkpoint.metrics else "-"


def _row(checkpoint: Checkpoint, fields: Sequence[str]) -> tuple[str, ...]:
    proved = checkpoint.state in (CheckpointState.COMMITTED, CheckpointState.DELETED)
    return (
        str(checkpoint.step),
        state_of(checkpoint),
        checkpoint.ref,
        output.or_dash(", ".join(checkpoint.aliases)),
        *(_value(checkpoint, field) for field in fields),
        output.count(checkpoint.world_size),
        output.count(checkpoint.tensor_count) if proved else "-",
        output.count(checkpoint.chunk_count) if proved else "-",
        output.size(checkpoint.size_bytes) if proved else "-",
        output.table_time(checkpoint.create_time),
        str(checkpoint.session),
    )


def state_of(checkpoint: Checkpoint) -> str:
    """Returns the state in the words of a listing; a commit that a later session replaced is ``superseded``."""
    if checkpoint.state is CheckpointState.COMMITTED and not checkpoint.live:
        return "superseded"
    if checkpoint.data_missing and checkpoint.state is CheckpointState.COMMITTED:
        return "data missing"
    return checkpoint.state.value.lower()


def _facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    facts = [
        ("ref", checkpoint.ref),
        ("state", state_of(checkpoint) + (", recorded after the fact" if checkpoint.recovered else "")),
        ("location", output.or_dash(checkpoint.location)),
        *(("and in", location) for location in checkpoint.other_locations),
        ("data directory", output.or_dash(checkpoint.prefix)),
        ("step", str(checkpoint.step)),
        ("part", checkpoint.part),
        ("session", f"{checkpoint.session}, attempt {checkpoint.attempt}, incarnation {checkpoint.incarnation}"),
        ("world size", output.count(checkpoint.world_size)),
        ("tensors", output.count(checkpoint.tensor_count)),
        ("chunks", output.count(checkpoint.chunk_count)),
        ("bytes entries", output.count(checkpoint.bytes_entry_count)),
        ("size", f"{output.size(checkpoint.size_bytes)} ({output.count(checkpoint.size_bytes)} bytes)"),
        ("created", output.time(checkpoint.create_time)),
        ("committed", output.time(checkpoint.commit_time)),
        ("structure", output.or_dash(checkpoint.structure_digest)),
        ("name", checkpoint.name),
        *_said(checkpoint),
    ]
    facts += _fate(checkpoint)
    if checkpoint.failure:
        facts.append(("failure", checkpoint.failure))
    facts += [("warning", warning) for warning in checkpoint.warnings]
    return facts


def _fate(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yields what there is to say of its end."""
    for one in checkpoint.holds:
        yield "held by", f"{one.holder} until {output.time(one.expire_time)}"
    if checkpoint.data_missing:
        yield "data", f"missing: `shardbook verify {checkpoint.ref}` says what"
    if checkpoint.delete_time is not None:
        until = f", can be brought back until {output.time(checkpoint.purge_time)}" if checkpoint.purge_time else ""
        is_kept = checkpoint.file_deletion is FileDeletion.NONE
        yield "deleted", output.time(checkpoint.delete_time) + (until if is_kept else "")
    if checkpoint.file_deletion is not FileDeletion.NONE:
        yield "data files", "deleted" if checkpoint.file_deletion is FileDeletion.DONE else "being deleted"


def _said(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yields what is said of a checkpoint, as far as anything is."""
    if checkpoint.aliases:
        yield "aliases", ", ".join(checkpoint.aliases)
    for key, text in sorted(checkpoint.labels.items()):
        yield f"label {key}", text
    for key, value in sorted(checkpoint.metrics.items()):
        yield f"metric {key}", output.number(value)
    if checkpoint.note is not None:
        yield "note", note_text(checkpoint.note)
    writer = checkpoint.writer
    who = who_wrote(writer.user, writer.host, writer.job_id)
    if who:
        yield "written by", who
    versions = versions_of(writer)
    if versions:
        yield "written with", versions
    if checkpoint.timing is not None:
        yield from timing_of(checkpoint.timing)


def who_wrote(user: str, host: str, job_id: str) -> str:
    """Returns user, host and job of a writer, as far as they are known: ``ada on node-7, job 4711``, ``on node-7``."""
    place = " ".join([*([user] if user else []), *([f"on {host}"] if host else [])])
    return ", ".join(one for one in (place, f"job {job_id}" if job_id else "") if one)


def versions_of(writer: Writer) -> str:
    """Returns what a checkpoint was written with; empty when that is not known."""
    versions = [("Shardbook", writer.client_version), ("torch", writer.torch_version), ("git", writer.git_commit)]
    return ", ".join(f"{name} {version}" for name, version in versions if version)


def timing_of(timing: SaveTiming, *, is_open: bool = False) -> Iterator[tuple[str, str]]:
    """Yields what stands out: the slowest phase first, then the slowest rank of each, and bytes by rank."""
    if timing.phases:
        worst = max(timing.phases, key=lambda phase: phase.slowest_s)
        host = f" on {worst.slowest_host}" if worst.slowest_host else ""
        yield "slowest", f"rank {worst.slowest_rank}{host}: {worst.phase}, {worst.slowest_s:.3f} s"
    for phase in timing.phases:
        host = f" on {phase.slowest_host}" if phase.slowest_host else ""
        slowest = f"slowest {phase.slowest_s:.3f} s, rank {phase.slowest_rank}{host}"
        yield f"{phase.phase} time", f"{slowest}; median {phase.median_s:.3f} s"
    if not is_open:
        yield "commit time", f"{timing.commit_s:.3f} s"
    largest = f"most {output.size(timing.largest_rank_bytes)}, rank {timing.largest_rank}"
    yield "bytes a rank", f"{largest}; median {output.size(timing.median_rank_bytes)}"
