"""``shardbook rm``, ``undelete``, ``hold`` and ``release``."""

from __future__ import annotations

import getpass
import re
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from shardbook.catalog import Checkpoint, FileDeletion
from shardbook.cli import completing, durations, names, output, previewing, progress
from shardbook.cli.describing import Ref
from shardbook.cli.failures import NEGATIVE, asking_storage
from shardbook.cli.options import AsJson, Etag, Plain, Server, Timeout, client_of
from shardbook.core.names import CheckpointName
from shardbook.errors import InvalidArgumentError

if TYPE_CHECKING:
    from shardbook.deleting import DeletedFiles

RM_EXAMPLES = """\b
Examples:
  shardbook rm llm/8b-v3@1500
  shardbook rm llm/8b-v3@1500 --delete-files --dry-run
  shardbook rm llm/8b-v3@1500 --delete-files"""
UNDELETE_EXAMPLES = """\b
Examples:
  shardbook undelete llm/8b-v3@1500
  shardbook undelete llm/8b-v3@1500.s3.a1"""
HOLD_EXAMPLES = """\b
Examples:
  shardbook hold llm/8b-v3@latest --ttl 2h
  shardbook hold llm/8b-v3@1500 --ttl 7d --name eval-mmlu"""
RELEASE_EXAMPLES = """\b
Examples:
  shardbook release llm/8b-v3@1500
  shardbook release llm/8b-v3@1500 --name eval-mmlu"""
#: Deadline of one call, seconds: the metadata of a large checkpoint takes its time.
_TIMEOUT_S = 60.0

Deleted = Annotated[
    str,
    typer.Argument(metavar="REF", help="project/run@1500, @1500.s3, @1500.s3.a1.", autocompletion=completing.deleted),
]
Holder = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Who holds it. [default: the user and host]")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")]
DeleteFiles = Annotated[
    bool, typer.Option("--delete-files", help="Delete its data files too: then nothing brings it back.")
]


def rm(
    ref: Ref,
    force: Annotated[
        bool, typer.Option("--force", help="Also what @latest or a protected alias means. Never what is held.")
    ] = False,
    delete_data: DeleteFiles = False,
    dry_run: DryRun = False,
    etag: Etag = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Delete a checkpoint from the catalogue, and with --delete-files its data.

    Its data stays where it is unless it is told otherwise, and until it is purged `shardbook undelete` brings it back.
    A deletion of files that was interrupted is ended by the same command: --delete-files takes no alias, which would
    mean another checkpoint by then.
    """
    from shardbook.deleting import check_reach, delete_files

    name = names.checkpoint_of(ref)
    if delete_data and name.id.alias is not None and not dry_run:
        raise InvalidArgumentError(
            f"{name.ref} may mean another checkpoint when this is made again: name the one it means now, which "
            f"`shardbook show {name.ref}` says, by its step",
            field="name",
        )
    client, config = client_of(server, timeout_s)
    if dry_run:
        looked = previewing.look(name, client, config, etag=etag, force=force)
        previewing.print_preview(looked, delete_data=delete_data, as_json=as_json, is_plain=is_plain)
        if looked.refusals:
            raise typer.Exit(NEGATIVE)
        return
    if delete_data:
        with asking_storage():
            name = CheckpointName.parse(check_reach(name, client=client, config=config).name)
    checkpoint, aliases = client.delete_checkpoint(name, force=force, delete_files=delete_data, etag=etag)
    files = None
    if delete_data:
        with asking_storage(), progress.shown("deleting", is_wanted=not is_plain) as tell:
            files = delete_files(checkpoint.name, client=client, config=config, progress=tell)
        checkpoint = client.get_checkpoint(checkpoint.name)
    if as_json:
        answer = {"checkpoint": checkpoint.to_json(), "deleted_aliases": list(aliases)}
        output.print_json(answer | {"files": None if files is None else files.to_json()})
        return
    gone = f", and the aliases {', '.join(aliases)}" if aliases else ""
    output.print_line(f"deleted {checkpoint.ref}{gone}", is_plain=is_plain)
    here = config.stores.here(checkpoint.location) or checkpoint.location
    output.print_line(_left(checkpoint, here) if files is None else told(files), is_plain=is_plain)


def told(files: DeletedFiles) -> str:
    """Returns what became of the files of a checkpoint, for people."""
    left = f"{files.ref}: {output.size(files.size_bytes)} of data left in {files.directory}"
    if files.waits_for:
        return (
            f"{left}: {_ref_of(files.waits_for[0])} is not over and may have it, too; "
            f"`shardbook rm {files.ref} --delete-files` goes on after that"
        )
    if files.shared_with:
        return f"{left}: {_ref_of(files.shared_with[0])} has it, too"
    gone = output.counted(files.file_count, "file")
    verb = "is" if files.file_count == 1 else "are"
    return f"{files.ref}: {gone}, {output.size(files.size_bytes)}, {verb} gone from {files.directory}"


def _ref_of(name: str) -> str:
    """Returns the ref of a checkpoint; what is none, such as a save that nobody recorded, as it is."""
    try:
        return CheckpointName.parse(name).ref
    except InvalidArgumentError:
        return name


def _left(checkpoint: Checkpoint, directory: str) -> str:
    if checkpoint.file_deletion is not FileDeletion.NONE:
        return f"its data files were deleted, or begun to be: `shardbook rm {checkpoint.ref} --delete-files` ends that"
    return (
        f"{output.size(checkpoint.size_bytes)} of data left in {directory}: "
        f"`shardbook rm {checkpoint.ref} --delete-files` deletes it, "
        f"`shardbook undelete {checkpoint.ref}` brings it back until {output.time(checkpoint.purge_time)}"
    )


def undelete(
    ref: Deleted,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Bring a deleted checkpoint back, with all that was said of it but its aliases."""
    client, _ = client_of(server, timeout_s)
    checkpoint = client.undelete_checkpoint(names.checkpoint_of(ref))
    if as_json:
        output.print_json({"checkpoint": checkpoint.to_json()})
        return
    means = f", which {', '.join(checkpoint.aliases)} means" if checkpoint.aliases else ""
    output.print_line(f"{checkpoint.ref} is back{means}", is_plain=is_plain)


def hold(
    ref: Ref,
    ttl_s: Annotated[
        float,
        typer.Option(
            "--ttl",
            metavar="DURATION",
            parser=durations.option,
            help="For how long from now: 30m, 2h, 7d; at most 30d.",
        ),
    ],
    holder: Holder = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Keep a checkpoint from being deleted while it is read. Again with the same name extends it.

    An alias is held as what it means now.
    """
    client, _ = client_of(server, timeout_s)
    who = holder or _me()
    checkpoint, held = client.hold_checkpoint(names.checkpoint_of(ref), who, ttl_s)
    if as_json:
        output.print_json({"checkpoint": checkpoint.to_json(), "hold": held.to_json()})
        return
    output.print_line(
        f"{checkpoint.ref} is held by {held.holder} until {output.time(held.expire_time)}; "
        f"`shardbook release {checkpoint.ref} --name {held.holder}` ends that",
        is_plain=is_plain,
    )


def release(
    ref: Ref,
    holder: Holder = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """End a hold; one that is not there is no error."""
    client, _ = client_of(server, timeout_s)
    who = holder or _me()
    checkpoint = client.release_checkpoint(names.checkpoint_of(ref), who)
    if as_json:
        output.print_json({"checkpoint": checkpoint.to_json()})
        return
    left = ", ".join(one.holder for one in checkpoint.holds)
    output.print_line(
        f"{checkpoint.ref} is not held by {who}" + (f", but by {left}" if left else ""), is_plain=is_plain
    )


def _me() -> str:
    """Returns who runs this, as a name may be."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number without a name
        user = "someone"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{user}-{socket.gethostname()}").lstrip("._-")[:128] or "someone"
