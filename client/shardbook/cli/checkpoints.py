"""``shardbook ls`` and ``shardbook show``."""

from __future__ import annotations

from typing import Annotated

import typer

from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.cli import names, output
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Limit, Plain, Server, Timeout, client_of, page_size, take

LS_EXAMPLES = """\b
Examples:
  shardbook ls llm/8b-v3
  shardbook ls llm/8b-v3 --all --limit 10
  shardbook ls llm/8b-v3 --json | jq -r '.checkpoints[].ref'"""
SHOW_EXAMPLES = """\b
Examples:
  shardbook show llm/8b-v3@latest
  shardbook show llm/8b-v3@1500.s3 --json | jq -r .checkpoint.location"""
_COLUMNS = (
    ("STEP", True),
    ("STATE", False),
    ("REF", False),
    ("LATEST", False),
    ("WORLD", True),
    ("TENSORS", True),
    ("CHUNKS", True),
    ("SIZE", True),
    ("CREATED", False),
    ("SESSION", True),
)
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("SESSION", "CHUNKS", "TENSORS", "WORLD", "SIZE", "CREATED", "LATEST", "STATE", "STEP")


def list_checkpoints(
    run: Annotated[str, typer.Argument(metavar="RUN", help="project/run, or project/run:part for one part.")],
    show_all: Annotated[
        bool, typer.Option("--all", "-a", help="Open, failed, expired and superseded attempts too.")
    ] = False,
    limit: Limit = 50,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List the checkpoints of a run, newest first. A * marks what @latest means."""
    name, part = names.run_of(run)
    client, _ = client_of(server, timeout_s)
    found = client.list_checkpoints(name, part=part, show_all=show_all, page_size=page_size(limit))
    checkpoints, more = take(found, limit)
    # By part. The listing does not say: what @latest means need not be the newest one.
    latest = {one.part: one.latest or None for one in client.get_run(name).parts if part in (None, one.part)}
    if as_json:
        rows = [checkpoint.to_json() for checkpoint in checkpoints]
        output.print_json({"checkpoints": rows, "more": more, "latest": latest})
        return
    output.print_table(
        _COLUMNS, (_row(one, latest.get(one.part)) for one in checkpoints), expendable=_EXPENDABLE, is_plain=is_plain
    )
    if not checkpoints and not show_all:
        output.print_line(
            f"no committed checkpoints: `shardbook ls {run} --all` shows every attempt", is_plain=is_plain
        )
    if more:
        output.print_line(f"only the first {limit} checkpoints: --limit 0 shows all", is_plain=is_plain)


def show_checkpoint(
    ref: Annotated[str, typer.Argument(metavar="REF", help="project/run@1500, @1500.s3, @latest.")],
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Show everything about one checkpoint."""
    name = names.checkpoint_of(ref)
    client, config = client_of(server, timeout_s)
    checkpoint = client.get_checkpoint(name)
    if as_json:
        output.print_json({"checkpoint": checkpoint.to_json()})
        return
    facts = _facts(checkpoint)
    here = config.stores.here(checkpoint.location)
    if here is not None and here != checkpoint.location:
        facts.insert(3, ("path here", here))
    output.print_facts(facts, is_plain=is_plain)


def _row(checkpoint: Checkpoint, latest: str | None) -> tuple[str, ...]:
    proved = checkpoint.state is CheckpointState.COMMITTED
    return (
        str(checkpoint.step),
        state_of(checkpoint),
        checkpoint.ref,
        "*" if checkpoint.name == latest else "-",
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
    return checkpoint.state.value.lower()


def _facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    facts = [
        ("ref", checkpoint.ref),
        ("state", state_of(checkpoint) + (", recorded after the fact" if checkpoint.recovered else "")),
        ("location", output.or_dash(checkpoint.location)),
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
    ]
    if checkpoint.failure:
        facts.append(("failure", checkpoint.failure))
    facts += [("warning", warning) for warning in checkpoint.warnings]
    return facts
