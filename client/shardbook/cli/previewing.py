"""What ``shardbook rm --dry-run`` says: what would go, and why it would not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.cli import output
from shardbook.config import ClientConfig
from shardbook.core import refusals
from shardbook.core.names import LATEST, AliasName, CheckpointName
from shardbook.errors import AbortedError

if TYPE_CHECKING:
    from shardbook.client import Client
    from shardbook.deleting import FileList
    from shardbook.descriptions import Alias


@dataclass(frozen=True)
class Preview:
    """What a deletion would do.

    Attributes:
        checkpoint: What would be deleted, or is already.
        files: Its data files.
        aliases: Names of the aliases that would go with it.
        refusals: Why it would not be deleted, for people; empty when it would be.
    """

    checkpoint: Checkpoint
    files: FileList
    aliases: tuple[str, ...]
    refusals: tuple[str, ...]


def look(name: CheckpointName, client: Client, config: ClientConfig, *, etag: str | None, force: bool) -> Preview:
    """Returns what a deletion would do; changes nothing. Watchers at work on it, which refuse it too, are not seen.

    Raises:
        NotFoundError: There is no such checkpoint.
        FailedPreconditionError: It is not committed.
        AbortedError: It has another etag by now.
    """
    from shardbook.deleting import list_files

    checkpoint = client.get_checkpoint(name, show_deleted=True)
    if etag is not None and etag != checkpoint.etag:
        raise AbortedError(refusals.changed_since(name.ref), field="etag")
    # What it means now: an alias may move between two questions.
    files = list_files(checkpoint.name, client=client, config=config)
    if checkpoint.state is CheckpointState.DELETED:
        return Preview(checkpoint, files, (), ())
    part = CheckpointName.parse(checkpoint.name).part
    meaning = [one for one in client.list_aliases(part.run, part=part.part) if one.checkpoint == checkpoint.name]
    # Those that follow a metric go on to the next best one.
    going = [one for one in meaning if one.direction is None and _alias(one) != LATEST]
    against = (*_held(checkpoint), *(() if force else _meant(checkpoint, going)))
    return Preview(checkpoint, files, tuple(map(_alias, going)), against)


def print_preview(found: Preview, *, delete_data: bool, as_json: bool, is_plain: bool) -> None:
    """Prints it; why it would be refused goes to standard error."""
    if as_json:
        answer = {"deleted_aliases": list(found.aliases), "refusals": list(found.refusals)}
        output.print_json({"files": found.files.to_json()} | answer)
    else:
        if delete_data:
            output.print_table((("FILE", False),), ((path,) for path in found.files.files), is_plain=is_plain)
        output.print_line(_told(found, delete_data=delete_data), is_plain=is_plain)
    for one in found.refusals:
        output.print_error(f"error: {one}")


def _told(found: Preview, *, delete_data: bool) -> str:
    ref, files = found.checkpoint.ref, found.files
    data = f"{output.counted(len(files.files), 'file')}, {output.size(files.size_bytes)} in {files.directory}"
    if found.checkpoint.state is CheckpointState.DELETED:
        rest = f"would delete its data, {data}" if delete_data else f"its data would stay: {data}"
        return f"{ref} is deleted already; {rest}"
    gone = f", and the aliases {', '.join(found.aliases)}" if found.aliases else ""
    rest = f"with its data, {data}" if delete_data else f"its data would stay: {data}"
    return f"would delete {ref}{gone}{', ' if delete_data else '; '}{rest}"


def _held(checkpoint: Checkpoint) -> list[str]:
    return [
        f"{checkpoint.ref} is held by {one.holder} until {output.time(one.expire_time)}: "
        f"`shardbook release {checkpoint.ref} --name {one.holder}` ends that"
        for one in checkpoint.holds
    ]


def _meant(checkpoint: Checkpoint, aliases: list[Alias]) -> list[str]:
    """Returns what speaks against it that ``--force`` overrules."""
    latest = [refusals.is_latest(checkpoint.ref)] if LATEST in checkpoint.aliases else []
    return latest + [refusals.is_protected(checkpoint.ref, _alias(one)) for one in aliases if one.protected]


def _alias(one: Alias) -> str:
    return AliasName.parse(one.name).alias


__all__ = ["Preview", "look", "print_preview"]
