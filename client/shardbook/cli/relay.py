"""``shardbook relay``."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated

import typer

from shardbook.cli.options import Server, address_of
from shardbook.config import ClientConfig

EXAMPLES = """\b
Examples:
  shardbook relay --server shardbook.example:7070 &
  shardbook relay --listen unix:///run/user/1000/relay.sock"""


def relay(
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="unix:///PATH",
            help="Socket for the ranks, made for this user alone. [default: in XDG_RUNTIME_DIR, else in /tmp]",
        ),
    ] = None,
    server: Server = None,
) -> None:
    """Pass the calls of this host's ranks on over one connection, until SIGTERM or Ctrl-C.

    For jobs of thousands of ranks: one relay on each host, and its ranks with the line that it prints. Saves are what
    they are without it, and cost the server less. It sends each caller's own token, never one of its own.
    """
    from shardbook.relay.listening import default_address
    from shardbook.relay.service import Relay, serve

    upstream = address_of(server, ClientConfig.from_env())

    def ready(started: Relay) -> None:
        typer.echo(f"upstream  {upstream}")
        typer.echo(f"address   {started.address}")
        typer.echo(f"export SHARDBOOK_SERVER={started.address}")
        # Output to a file or a pipe is buffered, and somebody waits for these lines.
        typer.get_text_stream("stdout").flush()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(serve(upstream, listen or default_address(), ready))
