"""``shardbook export``."""

from __future__ import annotations

from typing import Annotated

import typer

from shardbook._targets import checkpoint_named
from shardbook.cli import completing, output, progress
from shardbook.cli.failures import asking_storage
from shardbook.cli.options import AsJson, Plain, Server, Timeout, client_of

EXAMPLES = """\b
Examples:
  shardbook export llm/8b-v3@1500 -o /tmp/step-1500.metadata
  shardbook export /lustre/ckpt/8b-v3/step-1500 -o /lustre/ckpt/8b-v3/step-1500/.metadata"""
#: Deadline of one call, seconds: the metadata of a large checkpoint takes its time.
_TIMEOUT_S = 60.0


def export(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="project/run@1500, @1500.s3, @latest; or a directory or URL.",
            autocompletion=completing.refs,
        ),
    ],
    target: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Path or URL of the file; its directory is there.")
    ],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Write DCP's own .metadata of a checkpoint, as plain torch.distributed.checkpoint reads it.

    Data files stay where they are: in their directory, the file makes them loadable without Shardbook.
    """
    from shardbook.exporting import export_metadata

    client, config = client_of(server, timeout_s) if checkpoint_named(ref) is not None else (None, None)
    with asking_storage(), progress.shown("exporting", is_wanted=not (is_plain or as_json)):
        size_bytes = export_metadata(ref, target, force=force, config=config, client=client)
    if as_json:
        output.print_json({"output": target, "size_bytes": size_bytes})
        return
    output.print_line(f"{target}: {output.size(size_bytes)}", is_plain=is_plain)


__all__ = ["EXAMPLES", "export"]
