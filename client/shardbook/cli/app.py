"""Puts the commands together. No command's own code stands here."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from shardbook._version import __version__
from shardbook.cli import (
    aliases,
    cat,
    checkpoints,
    chunks,
    completing,
    deleting,
    demo,
    describing,
    diff,
    doctor,
    du,
    export,
    failures,
    gc,
    imports,
    lineage,
    projects,
    pruning,
    read,
    relay,
    runs,
    status,
    sync,
    tensors,
    verify,
    watch,
)

_EPILOG = """\b
Exit codes: 0 ok, 1 negative answer, 2 usage, 3 not found, 4 unavailable, 5 denied.
A REF is project/run@1500, @1500.s3 (of session 3), @latest, @best or another alias, or project/run:part@...
Commands that read a checkpoint take a directory or URL in place of a REF.
SHARDBOOK_SERVER=host:port says where the server is; `shardbook-server serve` starts one."""

app = typer.Typer(
    name="shardbook",
    help="Find, describe, check and recover the checkpoints that a Shardbook server knows.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardbook {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Finds, describes, checks and recovers checkpoints."""


app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.command("projects", epilog=projects.EXAMPLES)(projects.list_projects)
app.command("runs", epilog=runs.EXAMPLES)(runs.list_runs)
app.command("ls", epilog=checkpoints.LS_EXAMPLES)(checkpoints.list_checkpoints)
app.command("show", epilog=checkpoints.SHOW_EXAMPLES)(checkpoints.show_checkpoint)
app.command("label", epilog=describing.LABEL_EXAMPLES)(describing.label)
app.command("metric", epilog=describing.METRIC_EXAMPLES)(describing.metric)
app.command("note", epilog=describing.NOTE_EXAMPLES)(describing.note)
app.command("alias", epilog=aliases.EXAMPLES)(aliases.alias)
app.command("lineage", epilog=lineage.EXAMPLES)(lineage.lineage)
app.command("watch", epilog=watch.EXAMPLES)(watch.watch)
app.command("tensors", epilog=tensors.EXAMPLES)(tensors.list_tensors)
app.command("chunks", epilog=chunks.EXAMPLES)(chunks.list_chunks)
app.command("diff", epilog=diff.EXAMPLES)(diff.diff_checkpoints)
app.command("status", epilog=status.EXAMPLES)(status.show_status)
app.command("cat", epilog=cat.EXAMPLES)(cat.cat)
app.command("read", epilog=read.EXAMPLES)(read.read)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("du", epilog=du.EXAMPLES)(du.disk_usage)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify_checkpoint)
app.command("hold", epilog=deleting.HOLD_EXAMPLES)(deleting.hold)
app.command("release", epilog=deleting.RELEASE_EXAMPLES)(deleting.release)
app.command("prune", epilog=pruning.EXAMPLES)(pruning.prune)
app.command("policy", epilog=pruning.POLICY_EXAMPLES)(pruning.policy)
app.command("rm", epilog=deleting.RM_EXAMPLES)(deleting.rm)
app.command("undelete", epilog=deleting.UNDELETE_EXAMPLES)(deleting.undelete)
app.command("sync", epilog=sync.EXAMPLES)(sync.sync)
app.command("import", epilog=imports.EXAMPLES)(imports.import_checkpoints)
app.command("gc", epilog=gc.EXAMPLES)(gc.collect)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("relay", epilog=relay.EXAMPLES)(relay.relay)


def run() -> None:
    """Runs the command line of this process and exits."""
    try:
        with completing.mended():
            app(prog_name="shardbook")
    except failures.HANDLED as error:
        sys.exit(failures.report(error))
    finally:
        _let_go()


def _let_go() -> None:
    """Writes what is left to be written; who reads it may have seen enough (``| head``), and that is no failure."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # The interpreter flushes once more at its end, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
