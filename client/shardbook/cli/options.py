"""Options that several commands share, and the client that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from shardbook.config import ClientConfig
from shardbook.errors import InvalidArgumentError

if TYPE_CHECKING:
    from shardbook.client import Client

_T = TypeVar("_T")

#: Deadline of one call, seconds: a person waits.
DEFAULT_TIMEOUT_S = 5.0

Server = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help="Address of the server. [default: SHARDBOOK_SERVER]"),
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.01, help="Longest time that one call may take.")
]
#: Somebody sits at the terminal: a server that does not answer is named soon.
_OUTAGE_S: Final = 2.0
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object (docs/cli.md) instead of a table.")]
Trusted = Annotated[
    bool,
    typer.Option("--trusted", help="Unpickle a .metadata that holds more than DCP's metadata: it can run any program."),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Print text for other programs: no colours, no folded cells, no progress.")
]


def _quoted(etag: str | None) -> str | None:
    """Returns an etag with the quotes that are part of it, which a shell takes away; none has quotes inside."""
    return f'"{etag}"' if etag and '"' not in etag else etag


Etag = Annotated[
    str | None,
    typer.Option(
        "--etag",
        metavar="ETAG",
        callback=_quoted,
        help="Only while it is as --json showed it with this etag; else exit 1.",
    ),
]
#: Rows that a command shows which is told no number.
DEFAULT_LIMIT: Final = 50
Limit = Annotated[
    int | None,
    typer.Option("--limit", "-n", min=0, metavar="N", help=f"Rows at most; 0 for all. [default: {DEFAULT_LIMIT}]"),
]


def client_of(server: str | None, timeout_s: float) -> tuple[Client, ClientConfig]:
    """Returns a client of the server that options or settings name, and the settings.

    Raises:
        InvalidArgumentError: Neither names one, or a setting is wrong.
    """
    # gRPC with it: nobody waits for that who asks for help, or has a shell complete an option.
    from shardbook.client import Client

    config = ClientConfig.from_env()
    address = address_of(server, config)
    return Client(address, token=config.token, timeout_s=timeout_s, outage_s=_OUTAGE_S), config


def address_of(server: str | None, config: ClientConfig) -> str:
    """Returns the server that an option or the settings name.

    Raises:
        InvalidArgumentError: Neither names one.
    """
    address = server or config.server
    if address is None:
        raise InvalidArgumentError(
            "no Shardbook server is named: pass --server HOST:PORT or set SHARDBOOK_SERVER; "
            "`shardbook-server serve` starts one and prints the line to export",
            reason="NO_SERVER",
            field="server",
        )
    return address


def rows_at_most(limit: int | None) -> int:
    """Returns how many rows to show, 0 for all. Who chose the number is not told that there are more."""
    return DEFAULT_LIMIT if limit is None else limit


def page_size(limit: int) -> int:
    """Returns rows to ask for in one call: what is shown and one more, which says whether more exist."""
    from shardbook.core.limits import MAX_PAGE_SIZE

    return min(limit + 1, MAX_PAGE_SIZE) if limit else MAX_PAGE_SIZE


def counted(rows: Iterable[_T], tell: Callable[[int, int, str], None], unit: str) -> Iterator[_T]:
    """Yields rows, and tells ``progress.shown`` now and then how many there were."""
    for number, row in enumerate(rows, 1):
        if number % 1000 == 0:
            tell(number, number, unit)
        yield row


def take(rows: Iterable[_T], limit: int) -> tuple[list[_T], bool]:
    """Returns the first ``limit`` rows (all for 0), and whether there are more."""
    if not limit:
        return list(rows), False
    source: Iterator[_T] = iter(rows)
    taken = list(islice(source, limit))
    return taken, next(source, None) is not None
