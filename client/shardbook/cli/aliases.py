"""``shardbook alias``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook.cli import completing, names, output
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Etag, Plain, Server, Timeout, client_of
from shardbook.core.limits import MAX_COMPARISONS
from shardbook.core.names import AliasName, CheckpointName, PartName, RunName
from shardbook.descriptions import Alias, Direction
from shardbook.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from shardbook.client import Client

EXAMPLES = """\b
Examples:
  shardbook alias llm/8b-v3
  shardbook alias best --metric val_loss --min llm/8b-v3
  shardbook alias production llm/8b-v3@1500 --protect
  shardbook alias production llm/8b-v3 --delete --force"""
_COLUMNS = (("ALIAS", False), ("CHECKPOINT", False), ("FOLLOWS", False), ("PROTECTED", False), ("SET", False))
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("SET", "PROTECTED", "FOLLOWS")


def alias(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME] RUN|REF",
            help="RUN alone lists its aliases; NAME REF sets one.",
            autocompletion=completing.runs_or_refs,
        ),
    ],
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="METRIC", help="Follow the best value of a metric.")
    ] = None,
    smallest: Annotated[bool, typer.Option("--min", help="The smallest value is best.")] = False,
    largest: Annotated[bool, typer.Option("--max", help="The largest value is best.")] = False,
    protect: Annotated[
        bool | None,
        typer.Option(
            "--protect/--no-protect",
            help="Not to be moved or deleted without --force; as it is where neither is given.",
            show_default=False,
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the alias; the checkpoint stays.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Move or delete one that is protected.")] = False,
    etag: Etag = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List the aliases of a run, or set, move or delete one: a name for a checkpoint, as in project/run@best.

    The server keeps @latest by itself, and one with --metric on the live checkpoint with the best value, after every
    commit and whenever a metric is set. RUN may be project/run:part.
    """
    if len(words) not in (1, 2):
        raise InvalidArgumentError("write RUN, NAME RUN or NAME REF", field="alias")
    if len(words) == 1 and (
        smallest or largest or delete or force or any(one is not None for one in (metric, protect, etag))
    ):
        raise InvalidArgumentError(
            f"NAME is missing: write `shardbook alias NAME {words[0]}` and the options; without NAME it lists",
            field="alias",
        )
    client, _ = client_of(server, timeout_s)
    if len(words) == 1:
        run, part = names.run_of(words[0])
        _print(client, run, list(client.list_aliases(run, part=part)), as_json=as_json, is_plain=is_plain)
        return
    name, target = words
    if delete:
        client.delete_alias(_alias_of(name, target), force=force, etag=etag)
        if as_json:
            output.print_json({"aliases": []})
        return
    if metric is None:
        if smallest or largest:
            raise InvalidArgumentError("--min and --max go with --metric", field="metric")
        done = _set(client, name, target, protect=protect, force=force, etag=etag)
    else:
        if smallest is largest:
            raise InvalidArgumentError("say which value is best: --min or --max", field="metric")
        if protect:
            raise InvalidArgumentError("an alias that follows a metric cannot be protected", field="protect")
        direction = Direction.MIN if smallest else Direction.MAX
        done = client.follow_metric(_alias_of(name, target), metric, direction, force=force, etag=etag)
    _print(client, AliasName.parse(done.name).part.run, [done], as_json=as_json, is_plain=is_plain)


def _set(client: Client, name: str, target: str, *, protect: bool | None, force: bool, etag: str | None) -> Alias:
    checkpoint = names.checkpoint_of(target)
    wanted = AliasName(checkpoint.part, name)
    if protect is None:
        found = _found(client, wanted)
        protect = found is not None and found.protected
        if found is not None and force:
            # Somebody may protect it meanwhile, which force would take away.
            etag = etag or found.etag or None
    return client.set_alias(wanted, checkpoint, protected=protect, force=force, etag=etag)


def _found(client: Client, name: AliasName) -> Alias | None:
    """Returns the alias as it is; None where it is not there yet."""
    try:
        listed = client.list_aliases(name.part.run, part=name.part.part)
        return next((one for one in listed if one.name == str(name)), None)
    except NotFoundError:
        return None  # nor is the run: who sets it says so


def _alias_of(name: str, target: str) -> AliasName:
    run, part = names.run_of(target)
    return AliasName(PartName(run) if part is None else PartName(run, part), name)


def refs_of(client: Client, run: RunName, aliases: Iterable[Alias]) -> dict[str, str]:
    """Returns the refs of what aliases of a run mean, as listings have them, by name: short ones of what is live."""
    refs = {one.checkpoint: one.checkpoint_ref for one in aliases if one.checkpoint}
    steps = sorted({step for name in refs if (step := CheckpointName.parse(name).id.step) is not None})
    for at in range(0, len(steps), MAX_COMPARISONS):
        wanted = " OR ".join(f"step = {step}" for step in steps[at : at + MAX_COMPARISONS])
        refs |= {one.name: one.ref for one in client.list_checkpoints(run, filter=wanted) if one.name in refs}
    return refs


def _print(client: Client, run: RunName, aliases: Sequence[Alias], *, as_json: bool, is_plain: bool) -> None:
    if as_json:
        output.print_json({"aliases": [one.to_json() for one in aliases]})
        return
    refs = refs_of(client, run, aliases)
    rows = (_row(one, refs.get(one.checkpoint, "")) for one in aliases)
    output.print_table(_COLUMNS, rows, expendable=_EXPENDABLE, is_plain=is_plain)


def _row(one: Alias, means: str) -> tuple[str, ...]:
    return (
        one.ref,
        output.or_dash(means),
        "-" if one.direction is None else f"{one.direction.value} {one.metric}",
        "yes" if one.protected else "no",
        output.table_time(one.update_time),
    )
