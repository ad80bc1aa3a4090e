"""``shardbook stores``."""

from __future__ import annotations

import typer

from shardbook.cli import output
from shardbook.cli.failures import NEGATIVE
from shardbook.cli.options import AsJson, Plain
from shardbook.config import ClientConfig

EXAMPLES = """\b
Examples:
  SHARDBOOK_STORES=lustre=/lustre/ckpt,s3-eu=s3://bucket/eu shardbook stores
  shardbook stores --json | jq -r '.stores[] | select(.reachable | not).name'"""
_COLUMNS = (("STORE", False), ("REACHABLE", False), ("ROOT", False), ("WHAT", False))


def list_stores(as_json: AsJson = False, is_plain: Plain = False) -> None:
    """List the stores that are configured here, and whether each can be reached.

    A location in the catalogue is STORE:PATH; SHARDBOOK_STORES, or [stores] in the configuration file, says what root
    that is on this machine. Exits 1 when one cannot be listed. Asks no server.
    """
    from shardbook.doctor import Health, examine_store

    stores = ClientConfig.from_env().stores
    looked = [(name, root, examine_store(name, root)) for name, root in stores.roots.items()]
    if as_json:
        found = [
            {"name": name, "root": root, "reachable": one.health is Health.OK, "message": one.detail}
            for name, root, one in looked
        ]
        output.print_json({"stores": found})
    else:
        rows = [(name, "yes" if one.health is Health.OK else "NO", root, one.detail) for name, root, one in looked]
        if rows:
            output.print_table(_COLUMNS, rows, folded=("WHAT",), is_plain=is_plain)
        else:
            output.print_line("none: SHARDBOOK_STORES=NAME=ROOT,NAME=ROOT names them", is_plain=is_plain)
    if any(one.health is not Health.OK for _, _, one in looked):
        raise typer.Exit(NEGATIVE)
