"""``shardbook gc``."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook.cli import completing, durations, names, output, progress
from shardbook.cli.failures import asking_storage
from shardbook.cli.options import AsJson, Plain, Server, Timeout, client_of
from shardbook.config import ClientConfig
from shardbook.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    from shardbook.collecting import LeftAttempt, Verdict
    from shardbook.collecting.known import Known

EXAMPLES = """\b
Examples:
  shardbook gc /lustre/ckpt/8b-v3 --dry-run
  shardbook gc lustre:ckpt/8b-v3 --run llm/8b-v3 --older-than 3d --yes
  shardbook gc s3://bucket/ckpt --offline --dry-run --json | jq '.orphans[].size_bytes'"""
_COLUMNS = (
    ("SIZE", True),
    ("FILES", True),
    ("RECORDS", False),
    ("LAST WRITE", False),
    ("CATALOGUE", False),
    ("DIRECTORY", False),
    ("ATTEMPT", False),
)
_KEPT_COLUMNS = (("KEPT", False), *_COLUMNS)
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("RECORDS", "FILES", "CATALOGUE", "LAST WRITE")
#: Deadline of one call, seconds: nobody waits at a prompt.
_TIMEOUT_S = 60.0


def collect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Checkpoint directories or URLs, or any above; a store, as in lustre: or lustre:ckpt.",
        ),
    ],
    is_dry: Annotated[bool, typer.Option("--dry-run", help="List what nobody needs; remove nothing.")] = False,
    is_sure: Annotated[bool, typer.Option("--yes", "-y", help="Remove it without asking.")] = False,
    older_than_s: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            metavar="DURATION",
            parser=durations.option,
            help="How long nothing of it may have been written: 12h, 3d. [default: 1d, 7d with --offline]",
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            "-r",
            metavar="RUN",
            help="The only run that saves there; else all are looked at.",
            autocompletion=completing.runs,
        ),
    ] = None,
    is_offline: Annotated[
        bool, typer.Option("--offline", help="Go by manifests, records and age alone; ask no server.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", "-a", help="What is kept, too, and why.")] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """List or remove the files of saves that were killed and never became checkpoints.

    Kept is whatever has a manifest, a record of every rank, or a name in .metadata, was written lately, or is open or
    committed in the catalogue. In doubt it is kept.
    """
    from shardbook.collecting import find_orphans

    if not (is_dry or is_sure or sys.stdin.isatty()):
        raise InvalidArgumentError("nobody is there to be asked: pass --dry-run, or --yes to remove", field="yes")
    known, config = _known(is_offline=is_offline, run=run, server=server, timeout_s=timeout_s)
    roots = [_root(path, config) for path in paths]
    with asking_storage(), progress.shown("looking", is_wanted=not (is_plain or as_json)) as tell:
        found: list[LeftAttempt] = []
        for one in find_orphans(roots, known=known, older_than_s=older_than_s):
            found.append(one)
            tell(len(found), len(found), "attempts")
    orphans = [one for one in found if one.is_orphan]
    if not as_json:
        _print(found, show_all=show_all, is_plain=is_plain, is_offline=is_offline)
    removed: list[LeftAttempt] = []
    if orphans and not is_dry and (is_sure or _confirmed(orphans)):
        with asking_storage(), progress.shown("removing", is_wanted=not (is_plain or as_json)) as tell:
            for one in orphans:
                removed += _removed(one, known, older_than_s)
                tell(len(removed), len(orphans), "attempts")
    if as_json:
        _print_json(found, removed, is_offline=is_offline)
    elif removed:
        output.print_line(f"removed {_counted(removed)}", is_plain=is_plain)


def _known(
    *, is_offline: bool, run: str | None, server: str | None, timeout_s: float
) -> tuple[Known | None, ClientConfig]:
    from shardbook.collecting.known import Known

    of_run = None if run is None else names.run_of(run)[0]
    if is_offline:
        return None, ClientConfig.from_env()
    client, config = client_of(server, timeout_s)
    return Known(client, of_run, config.stores), config


def _root(path: str, config: ClientConfig) -> str:
    store, colon, relative = path.partition(":")
    if colon and not relative.startswith("//") and store in config.stores.roots:
        return config.stores.path_of(path)
    return path


def _confirmed(orphans: list[LeftAttempt]) -> bool:
    return typer.confirm(f"Remove {_counted(orphans)} for good?", err=True)


def _removed(one: LeftAttempt, known: Known | None, older_than_s: float | None) -> list[LeftAttempt]:
    from shardbook.collecting import remove_orphan

    try:
        return [remove_orphan(one, known=known, older_than_s=older_than_s)]
    except FailedPreconditionError as error:
        typer.echo(f"kept: {error.message}", err=True)
        return []


def _why_kept() -> dict[Verdict, str]:
    from shardbook.collecting import Verdict

    return {
        Verdict.MANIFEST: "has a manifest",
        Verdict.REFERENCED: "named by .metadata",
        Verdict.WHOLE: "whole: `shardbook sync` records it",
        Verdict.UNREADABLE: "its records are damaged",
        Verdict.YOUNG: "written lately",
        Verdict.UNDATED: "of unknown age",
        Verdict.OPEN: "open in the catalogue",
        Verdict.COMMITTED: "committed in the catalogue",
        Verdict.DELETED: "deleted in the catalogue, which can be undone",
        Verdict.REVIVABLE: "its session is alive",
    }


def _print(found: list[LeftAttempt], *, show_all: bool, is_plain: bool, is_offline: bool) -> None:
    orphans = [one for one in found if one.is_orphan]
    kept = Counter(one.verdict for one in found if not one.is_orphan)
    why_kept = _why_kept()
    if show_all and found:
        rows = [(("-" if one.is_orphan else why_kept[one.verdict]), *_row(one)) for one in found]
        output.print_table(_KEPT_COLUMNS, rows, expendable=_EXPENDABLE, folded=("DIRECTORY",), is_plain=is_plain)
    elif orphans:
        rows = list(map(_row, orphans))
        output.print_table(_COLUMNS, rows, expendable=_EXPENDABLE, folded=("DIRECTORY",), is_plain=is_plain)
    output.print_line(f"nobody needs {_counted(orphans)}" if orphans else "no orphans", is_plain=is_plain)
    if kept:
        told = ", ".join(f"{output.count(kept[one])} {why}" for one, why in why_kept.items() if kept[one])
        output.print_line(f"kept: {told}", is_plain=is_plain)
    if is_offline:
        output.print_line("no server was asked: by manifests, records and age alone", is_plain=is_plain)


def _print_json(found: list[LeftAttempt], removed: list[LeftAttempt], *, is_offline: bool) -> None:
    from shardbook.collecting import Verdict

    kept = Counter(one.verdict for one in found if not one.is_orphan)
    output.print_json(
        {
            "orphans": [one.to_json() for one in found if one.is_orphan],
            "kept": {verdict.value: kept[verdict] for verdict in Verdict if verdict is not Verdict.ORPHAN},
            "removed": [one.to_json() for one in removed],
            "offline": is_offline,
        }
    )


def _counted(orphans: list[LeftAttempt]) -> str:
    size_bytes, files = sum(one.size_bytes for one in orphans), sum(one.file_count for one in orphans)
    attempts = output.counted(len(orphans), "attempt")
    return f"{output.size(size_bytes)} in {output.counted(files, 'file')} of {attempts}"


def _row(one: LeftAttempt) -> tuple[str, ...]:
    records = str(one.record_count) if one.world_size is None else f"{one.record_count} of {one.world_size}"
    return (
        output.size(one.size_bytes),
        output.count(one.file_count),
        records,
        output.table_time(one.last_write_time),
        output.or_dash(one.state.lower()),
        one.directory,
        one.prefix,
    )


__all__ = ["EXAMPLES", "collect"]
