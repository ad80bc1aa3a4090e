"""``shardbook watch``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardbook.cli import completing, names, output
from shardbook.cli.checkpoints import state_of
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Plain, Server, Timeout, client_of
from shardbook.core.names import check_segment
from shardbook.errors import InvalidArgumentError
from shardbook.events import EVERYTHING, KINDS, NOW, Event, EventKind, Subscription

if TYPE_CHECKING:
    from shardbook._watching import Watching
    from shardbook.client import Client

EXAMPLES = """\b
Examples:
  shardbook watch 'llm/*' --kind committed
  shardbook watch llm/8b-v3 --since start --once --json
  shardbook watch 'llm/*' --name mmlu --exec 'python eval.py --checkpoint {path}'
  shardbook watch --name mmlu --status
  shardbook watch --status"""
_COLUMNS = (
    ("CHECKPOINT", False),
    ("STATE", False),
    ("ATTEMPT", True),
    ("HOLDER", False),
    ("DUE", False),
    ("WHY", False),
)
_ALL_COLUMNS = (
    ("NAME", False),
    ("ABOUT", False),
    ("FILTER", False),
    ("BEHIND", True),
    ("DONE", True),
    ("MADE", False),
)


def _kinds(incomplete: str) -> list[str]:
    return [kind.value for kind in KINDS if kind.startswith(incomplete)]


def watch(
    run: Annotated[
        str,
        typer.Argument(
            metavar="[RUN]",
            help="project/run, project/run:part, or a pattern: 'llm/*'.",
            autocompletion=completing.runs,
        ),
    ] = EVERYTHING,
    filter_text: Annotated[
        str, typer.Option("--filter", "-f", metavar="FILTER", help="Which checkpoints (docs/filters.md).")
    ] = "",
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            "-k",
            metavar="KIND",
            help=f"Which events: {', '.join(KINDS)}; may be given several times.",
            autocompletion=_kinds,
        ),
    ] = None,
    since: Annotated[
        str, typer.Option("--since", metavar="now|start|CURSOR", help="Where to begin; start is the oldest event.")
    ] = NOW,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Subscription: a place that the server keeps.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option("--exec", metavar="CMD", help="Run CMD on each committed checkpoint; {ref}, {path}, {step}, ..."),
    ] = None,
    lease_s: Annotated[
        float,
        typer.Option(
            "--lease", min=2, max=86_400, metavar="SECONDS", help="A killed watcher's checkpoint is free then."
        ),
    ] = 120.0,
    attempts: Annotated[
        int, typer.Option("--attempts", min=1, max=100, metavar="N", help="Attempts at one checkpoint.")
    ] = 3,
    retry_delay_s: Annotated[
        float,
        typer.Option("--retry-delay", min=0, max=3_600, metavar="SECONDS", help="Before the second one; then doubled."),
    ] = 30.0,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=0, metavar="N", help="End after N events or checkpoints; 0 never.")
    ] = 0,
    once: Annotated[bool, typer.Option("--once", help="End when there is nothing more now.")] = False,
    status: Annotated[
        bool,
        typer.Option(
            "--status", help="Show the subscription, and what is being worked on; without --name, all of them."
        ),
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Forget the subscription, its place and claims.")] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Print what happens in the catalogue, as it happens; or run a command on every checkpoint that is committed.

    With --name and --exec any number of watchers share the work: each checkpoint is claimed by one of them at a time,
    is not deleted meanwhile, and is tried again when CMD fails or its watcher dies. CMD finds SHARDBOOK_REF, _NAME,
    _PATH, _LOCATION, _PROJECT, _RUN, _PART, _STEP, _ATTEMPT and _SERVER in its environment. No shell reads it.
    """
    place, part = names.runs_of(run)
    client, config = client_of(server, timeout_s)
    if status or delete:
        _look_after(client, name, command, delete=delete, as_json=as_json, is_plain=is_plain)
        return
    if command is None:
        if name is not None:
            raise InvalidArgumentError("--name goes with --exec, --status or --delete", field="name")
        with client.watch(
            place, part=part, filter=filter_text, kinds=kinds or (), since=since, until_now=once
        ) as events:
            _print_events(events, limit, as_json=as_json, is_plain=is_plain)
        return
    if name is None:
        raise InvalidArgumentError("--exec needs --name NAME: the server keeps the place under it", field="name")
    if kinds and set(kinds) != {EventKind.COMMITTED}:
        raise InvalidArgumentError("--exec works on committed checkpoints alone", field="kind")
    from shardbook.cli.commands import Command
    from shardbook.cli.working import Work, Worker

    work = Work(
        name=check_segment(name, "name"),
        command=Command.parse(command),
        run=place,
        part=part,
        filter=filter_text,
        since=since,
        lease_s=lease_s,
        attempts=attempts,
        retry_delay_s=retry_delay_s,
        limit=limit,
        once=once,
        as_json=as_json,
        is_plain=is_plain,
    )
    raise typer.Exit(Worker(client, config.stores, work).run())


def _print_events(events: Watching, limit: int, *, as_json: bool, is_plain: bool) -> None:
    for at, event in enumerate(events, start=1):
        if as_json:
            output.print_json_line(event.to_json())
        else:
            output.print_line("  ".join(_cells(event)), is_plain=is_plain)
        # Somebody reads along, through a pipe too.
        sys.stdout.flush()
        if at == limit:
            return


def _cells(event: Event) -> tuple[str, ...]:
    what = output.time(event.time), f"{event.kind.value:<13}"
    checkpoint = event.checkpoint
    if event.alias:
        return *what, event.alias_ref, *([] if checkpoint is None else ["->", checkpoint.ref])
    if checkpoint is None:
        return *what, event.part
    if event.kind is EventKind.COMMITTED:
        return *what, checkpoint.ref, output.size(checkpoint.size_bytes)
    return *what, checkpoint.ref, checkpoint.failure if event.kind is EventKind.FAILED else state_of(checkpoint)


def _look_after(
    client: Client, name: str | None, command: str | None, *, delete: bool, as_json: bool, is_plain: bool
) -> None:
    if command is not None or (name is None and delete):
        raise InvalidArgumentError("--status and --delete go with --name alone", field="name")
    if name is None:
        _show_all(list(client.list_subscriptions()), as_json=as_json, is_plain=is_plain)
        return
    found = client.get_subscription(name)
    if delete:
        client.delete_subscription(name)
    if as_json:
        output.print_json({"subscription": found.to_json()})
    elif delete:
        output.print_line(f"{name} is forgotten", is_plain=is_plain)
    else:
        _show(found, is_plain=is_plain)


def _show_all(found: Sequence[Subscription], *, as_json: bool, is_plain: bool) -> None:
    if as_json:
        output.print_json({"subscriptions": [one.to_json() for one in found]})
        return
    rows = (
        (
            one.name,
            one.parent,
            output.or_dash(one.filter),
            output.count(one.behind_count),
            output.count(one.done_count),
            output.table_time(one.create_time),
        )
        for one in found
    )
    output.print_table(_ALL_COLUMNS, rows, expendable=("MADE", "DONE", "FILTER"), is_plain=is_plain)


def _show(found: Subscription, *, is_plain: bool) -> None:
    facts: list[tuple[str, Any]] = [
        ("name", found.name),
        ("about", found.parent),
        ("filter", output.or_dash(found.filter)),
        ("cursor", found.cursor),
        ("events behind it", output.count(found.behind_count)),
        ("done", output.count(found.done_count)),
        ("made", output.time(found.create_time)),
    ]
    output.print_facts(facts, is_plain=is_plain)
    if found.claims:
        rows = [
            (
                one.ref,
                one.state.value,
                str(one.attempt),
                one.holder,
                output.time(one.due_time),
                output.or_dash(one.failure),
            )
            for one in found.claims
        ]
        output.print_table(_COLUMNS, rows, expendable=("HOLDER", "DUE"), is_plain=is_plain)
