"""``shardbook verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardbook._targets import checkpoint_named
from shardbook.cli import completing, output, progress
from shardbook.cli.failures import NEGATIVE, asking_storage
from shardbook.cli.options import AsJson, Plain, Server, Timeout, Trusted, client_of
from shardbook.errors import ShardbookError

if TYPE_CHECKING:
    from shardbook.client import Client
    from shardbook.verifying import FileFault, VerifyReport

EXAMPLES = """\b
Examples:
  shardbook verify llm/8b-v3@latest
  shardbook verify llm/8b-v3@1500 --checksums
  shardbook verify /lustre/ckpt/8b-v3/step-1500 --rank 17 --rank 18
  shardbook verify s3://bucket/ckpt/step-1500 --json | jq .report.faults"""
_COLUMNS = (
    ("RANK", True),
    ("FILE", False),
    ("WHAT", False),
    ("EXPECTED", True),
    ("FOUND", True),
    ("FROM BYTE", True),
    ("LOST", True),
    ("ENTRIES", False),
)
#: Deadline of one call, seconds: the metadata of a large checkpoint takes its time.
_TIMEOUT_S = 60.0


def verify_checkpoint(
    target: Annotated[
        str,
        typer.Argument(
            metavar="REF|DIR",
            help="project/run@1500, @latest; or a checkpoint directory or URL.",
            autocompletion=completing.refs,
        ),
    ],
    ranks: Annotated[
        list[int] | None, typer.Option("--rank", metavar="N", min=0, help="Only what this rank wrote; repeatable.")
    ] = None,
    checksums: Annotated[
        bool,
        typer.Option("--checksums", help="Read the bytes too, and compare them with the checksums that were kept."),
    ] = False,
    trusted: Trusted = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Check that every data file of a checkpoint is there, and long enough for all that lies in it.

    Sizes are compared; bytes are read with --checksums alone. A directory needs no server. Exits 1 when anything is
    lost, and names rank, file and what is missing of the first 50 files. What is in several places is all there when it
    is in one of them; the others are told. A checkpoint of the catalogue that lost files is flagged: @latest and @best
    pass over it, until it is verified and all there.
    """
    from shardbook.verifying import verify

    client, config = client_of(server, timeout_s) if checkpoint_named(target) is not None else (None, None)
    with asking_storage(), progress.shown("verifying", is_wanted=not (is_plain or as_json)) as tell:
        report = verify(
            target, ranks=ranks, checksums=checksums, trusted=trusted, config=config, client=client, progress=tell
        )
    told = _flagged(report, client)
    if as_json:
        output.print_json({"report": report.to_json()})
    else:
        _print(target, report, is_plain=is_plain)
    for line in told:
        output.print_error(line)
    if not report.is_ok:
        raise typer.Exit(NEGATIVE)


def _flagged(report: VerifyReport, client: Client | None) -> list[str]:
    """Tells the catalogue what was found of one of its checkpoints; what was found counts whatever it answers."""
    from shardbook.verifying import flag

    if client is None:
        return []
    try:
        told = flag(report, client)
    except ShardbookError as error:
        return [f"the catalogue was not told: {error.message}"]
    if told is None:
        return []
    return ["flagged in the catalogue: its data is missing" if told else "no longer flagged: its data is there again"]


def _print(target: str, report: VerifyReport, *, is_plain: bool) -> None:
    if report.faults:
        output.print_table(_COLUMNS, map(_row, report.faults), folded=("ENTRIES",), is_plain=is_plain)
        hidden = report.fault_count - len(report.faults)
        if hidden:
            output.print_line(f"and {output.count(hidden)} more", is_plain=is_plain)
    for line in _summary(target, report):
        output.print_line(line, is_plain=is_plain)


def _summary(target: str, report: VerifyReport) -> list[str]:
    from shardbook.verifying import FaultKind

    rank_count = report.world_size if report.ranks is None else len(report.ranks)
    where = "" if target == report.directory else f" in {report.directory}"
    looked = (
        f"{_counted(report.file_count, 'file')} of {_counted(rank_count, 'rank')}, "
        f"{output.size(report.size_bytes)} in {_counted(report.extent_count, 'extent')}{where}"
    )
    if report.checked_count is not None:
        looked += f"; {output.count(report.checked_count)} of them compared with their checksums"
    others = [f"NOT all there in {one}, where it should be too" for one in report.faulty_directories]
    others += [f"not looked at: {one}" for one in report.unknown_locations]
    if report.is_ok:
        return [f"{target}: all there: {looked}", *others]
    counts = report.fault_counts
    told = ", ".join(f"{output.count(counts[kind])} {kind.value}" for kind in FaultKind if counts[kind])
    of_ranks = f" of {_counted(report.faulty_rank_count, 'rank')}" if report.faulty_rank_count else ""
    return [
        f"{target}: NOT all there: {looked}",
        f"files{of_ranks}: {told}; {output.size(report.lost_bytes)} lost",
        *others,
    ]


def _counted(number: int, what: str) -> str:
    return f"{output.count(number)} {what}{'' if number == 1 else 's'}"


def _row(fault: FileFault) -> tuple[str, ...]:
    from shardbook.core.table import printable

    more = ", ..." if fault.extent_count > len(fault.fqns) else ""
    return (
        "-" if fault.rank is None else str(fault.rank),
        fault.file,
        fault.kind.value,
        output.count(fault.expected_bytes),
        "-" if fault.found_bytes is None else output.count(fault.found_bytes),
        output.count(fault.offset),
        output.count(fault.lost_bytes),
        ", ".join(map(printable, fault.fqns)) + more,
    )
