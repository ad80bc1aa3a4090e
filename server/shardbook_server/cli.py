"""The ``shardbook-server`` command: serve, and look after the database.

Exit codes: 0 done, 1 refused or failed with a message, 2 a command line that does not parse.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from shardbook.errors import FailedPreconditionError, ShardbookError
from shardbook_server import loops
from shardbook_server.print_config import as_toml
from shardbook_server.settings import Settings, load_settings, load_with_sources
from shardbook_server.storage.urls import shown_url

app = typer.Typer(
    name="shardbook-server",
    help="The Shardbook metadata service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain text: markup would eat what stands in brackets, such as [ipv6].
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
database = typer.Typer(name="db", help="Look after the database's schema.", no_args_is_help=True)
app.add_typer(database)

Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.", metavar="FILE")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database-url", help="Where the data is, such as sqlite:////absolute/path.")
]


def main() -> None:
    """Entry point of the command."""
    # gRPC's own lines, of an address that is taken, say, are told again in the server's words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardbook-server {version('shardbook')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The Shardbook metadata service."""


@app.command()
def serve(
    listen: Annotated[str | None, typer.Option(help="Address: host:port, [ipv6]:port or unix:/path.")] = None,
    database_url: DatabaseUrl = None,
    http_listen: Annotated[
        str | None, typer.Option(help="Address for /healthz, /readyz and /metrics: host:port, or off.")
    ] = None,
    config: Config = None,
    reflection: Annotated[
        bool | None, typer.Option("--reflection/--no-reflection", help="Serve gRPC reflection, for grpcurl.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every setting and where it comes from, as TOML, and exit.")
    ] = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Needs no options: data lies in one place below your home, which is printed."""
    with _reported():
        flags = {
            "listen": listen,
            "http_listen": http_listen,
            "database_url": database_url,
            "reflection": reflection,
            "log_level": log_level,
        }
        loaded = load_with_sources(flags, config=config)
        if print_config:
            typer.echo(as_toml(loaded), nl=False)
            return
        settings = loaded.settings
        # What serving needs is heavy; `--help` and `--version` answer without it.
        from shardbook_server import app as server
        from shardbook_server.logs import configure_logging

        configure_logging(settings)
        schema = server.prepare_database(settings)
        announce = partial(_announce, settings)
        loops.run(server.serve(settings, lambda one: announce(one.address, one.http_address), schema=schema))


def _announce(settings: Settings, address: str, http_address: str) -> None:
    """Says where the data is, where the server answers, and the line for the shells of its users."""
    typer.echo(f"data      {_shown(settings.database_url)}")
    typer.echo(f"address   {address}")
    if http_address:
        typer.echo(f"http      http://{_reachable(http_address)}")
    typer.echo(f"export SHARDBOOK_SERVER={_reachable(address)}")
    # Output to a file or a pipe is buffered, and somebody waits for these lines.
    typer.get_text_stream("stdout").flush()


def _shown(url: str) -> str:
    """Returns a database's path, or its URL without the password."""
    if url.startswith("sqlite:///"):
        return str(Path(url.removeprefix("sqlite:///")).absolute())
    return shown_url(url)


def _reachable(address: str) -> str:
    """Returns an address that a client on this machine can use for one that means every interface."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address  # noqa: S104 - compared, not bound


@database.command()
def upgrade(database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Create the schema, or bring it to the revision of this release."""
    with _reported():
        url = _migrated(database_url, config)
        from shardbook_server.storage import migrate

        typer.echo(f"{_shown(url)}: schema is at {migrate.upgrade(url)}")


@database.command()
def downgrade(
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="One that `db history` lists; base drops everything.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Drop what that revision has no place for.")] = False,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Take the schema back to an earlier revision. What that one has no place for is lost."""
    with _reported():
        url = _migrated(database_url, config)
        if not yes:
            raise FailedPreconditionError(
                f"going back to {revision} drops data of {_shown(url)}: make a backup, then say --yes"
            )
        from shardbook_server.storage import migrate

        typer.echo(f"{_shown(url)}: schema is at {migrate.downgrade(url, revision)}")


@database.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.", show_default=False)],
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Copy the SQLite database to a file, while it is served. Postgres has tools of its own: see deploy/README.md."""
    with _reported():
        settings = load_settings({"database_url": database_url}, config=config)
        from shardbook_server.storage.backup import backup as copy

        size_bytes = copy(settings.database_url, file)
        typer.echo(f"{file}: {size_bytes:,} bytes")


@database.command("mark-restored")
def mark_restored(
    yes: Annotated[bool, typer.Option("--yes", help="It was put back, and no server is running on it.")] = False,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Tell a database that it was put back from a backup, before it is served: a new epoch, later session numbers."""
    with _reported():
        url = _migrated(database_url, config)
        if not yes:
            raise FailedPreconditionError(
                f"sessions and cursors of {_shown(url)} will not go on as they were: stop its servers, then say --yes"
            )
        from shardbook_server.storage.backup import mark_restored as mark

        mark(url)
        typer.echo(f"{_shown(url)}: marked as restored; `shardbook sync DIR...` brings back what was saved since")


@database.command()
def gc(
    older_than: Annotated[
        int, typer.Option("--older-than", min=0, max=36_500, metavar="DAYS", help="Drop what was not used for so long.")
    ] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be dropped, and drop nothing.")] = False,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Drop structures that no checkpoint refers to and no save uses, and what expired attempts left. Servers go on."""
    with _reported():
        settings = load_settings({"database_url": database_url}, config=config)
        # With what this needs, help need not wait.
        from shardbook_server.app import open_database
        from shardbook_server.service.garbage import GarbageService
        from shardbook_server.storage import migrate

        migrate.check(settings.database_url)
        with closing(open_database(settings, connections=1)) as opened:
            collected = GarbageService(opened).collect(older_than_days=older_than, dry_run=dry_run)
        total = sum(one.count for one in collected), sum(one.size_bytes for one in collected)
        for kind, count, size_bytes in (
            *((one.kind, one.count, one.size_bytes) for one in collected),
            ("would be dropped" if dry_run else "dropped", *total),
        ):
            typer.echo(f"{kind:<21}  {count:>12,}  {size_bytes:>18,} bytes")


@database.command()
def current(database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Print the revision of the schema."""
    with _reported():
        url = _migrated(database_url, config)
        from shardbook_server.storage import migrate

        typer.echo(migrate.current(url))


@database.command()
def check(database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Exit 1 unless this release can serve the schema; say which command helps."""
    with _reported():
        url = _migrated(database_url, config)
        from shardbook_server.storage import migrate

        typer.echo(f"{_shown(url)}: schema is at {migrate.check(url)}, which this release serves")


@database.command()
def history() -> None:
    """List the revisions that this release knows, oldest first. Needs no database."""
    from shardbook_server.storage import migrate

    for revision, what in migrate.history():
        typer.echo(f"{revision}  {what}")


def _migrated(database_url: str | None, config: Path | None) -> str:
    """Returns the database whose schema a command is about: the flag's, else that for migrations, else the server's."""
    settings = load_settings({"database_url": database_url}, config=config)
    return database_url or settings.migration_url or settings.database_url


@contextmanager
def _reported() -> Iterator[None]:
    """Prints a refusal as one line and exits 1; a bug keeps its traceback."""
    try:
        yield
    except ShardbookError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    main()
