"""Puts the commands together. No command's own code stands here, and none is imported before it is called."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from shardbook._version import __version__
from shardbook.cli import completing, failures
from shardbook.cli.registry import COMMANDS

_EPILOG = """\b
Exit codes: 0 ok, 1 negative answer, 2 usage, 3 not found, 4 unavailable, 5 denied.
A REF is project/run@1500, @1500.s3 (of session 3), @latest, @best or another alias, or project/run:part@...
Commands that read a checkpoint take a directory or URL in place of a REF.
SHARDBOOK_SERVER=host:port says where the server is; `shardbook-server serve` starts one."""


class _Commands(typer.core.TyperGroup):
    """The commands: listed by name and summary, and imported one by one, when they are called or completed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for one in COMMANDS.values():
            self.add_command(typer.core.TyperCommand(one.name, help=one.summary, rich_markup_mode=None))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Returns the name of the command that is called, the command, and what is left for it."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, found if name is None else COMMANDS[name].load(), rest


app = typer.Typer(
    name="shardbook",
    cls=_Commands,
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
