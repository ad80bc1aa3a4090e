"""A save before it begins: arguments checked, attempt counted, nothing written."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass
from typing import Final

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from shardbook.core.names import PartName
from shardbook.dcp._torch import storage_writer_for
from shardbook.dcp.attempt import Attempt, step_of
from shardbook.dcp.planner import check_planner
from shardbook.dcp.runtime import Member, Runtime, current
from shardbook.dcp.writer import check_writer
from shardbook.errors import FailedPreconditionError, InvalidArgumentError

#: Longest that ranks wait for each other's data before ranks count as missing, seconds.
DEFAULT_TIMEOUT_S: Final = 1800.0
_WAITS: Final = ("committed", "registered")


@dataclass(frozen=True)
class SaveOptions:
    """How a save is to end.

    Attributes:
        strict: Raise rather than return UNREGISTERED.
        wait: ``committed``, or ``registered`` for ranks that need not know of the commit.
        export_metadata: Write DCP's own ``.metadata`` too.
        timeout_s: How long ranks wait for each other's data, seconds.
    """

    strict: bool = False
    wait: str = "committed"
    export_metadata: bool = True
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if self.wait not in _WAITS:
            raise InvalidArgumentError(f"wait is {self.wait!r}, not one of {', '.join(_WAITS)}", field="wait")
        if not self.timeout_s > 0:
            raise InvalidArgumentError(f"timeout_s is {self.timeout_s}, not above 0", field="timeout_s")
        if not self.export_metadata:
            warnings.warn(
                "export_metadata=False: plain torch.distributed.checkpoint cannot load the checkpoint, and tools that "
                "look for .metadata, such as torchtitan's purge, take its directory for an unfinished one",
                stacklevel=4,
            )


@dataclass(frozen=True, eq=False)
class PreparedSave:
    """A save whose attempt is counted and whose arguments are checked; nothing has been written.

    Attributes:
        runtime: The session of this process.
        attempt: The attempt.
        writer: The storage writer; reset to the checkpoint when the save runs, as DCP does.
        checkpoint_id: As the user gave it.
        planner: The save planner.
        options: How the save is to end.
    """

    runtime: Runtime
    attempt: Attempt
    writer: FileSystemWriter
    checkpoint_id: str | os.PathLike[str] | None
    planner: DefaultSavePlanner
    options: SaveOptions

    def release(self) -> None:
        """Lets other saves have the writer and the planner; once this one is over."""
        with _in_use_lock:
            _in_use.difference_update((id(self.writer), id(self.planner)))


#: Writers and planners of saves that are not over, by ``id``; their saves keep them alive.
_in_use: Final[set[int]] = set()
_in_use_lock: Final = threading.Lock()


def _claim(writer: FileSystemWriter, planner: DefaultSavePlanner) -> None:
    """Takes a writer and a planner for one save.

    Raises:
        FailedPreconditionError: A save in the background still uses one: both hold the state of one checkpoint, and
            its bytes would go into the other one.
    """
    with _in_use_lock:
        for name, one in (("storage_writer", writer), ("planner", planner)):
            if id(one) in _in_use:
                raise FailedPreconditionError(
                    f"this {name} is still used by a save in the background: wait for its result, or give each save a "
                    f"{name} of its own",
                    reason="STILL_IN_USE",
                    field=name,
                )
        _in_use.update((id(writer), id(planner)))


def prepare(
    checkpoint_id: str | os.PathLike[str] | None,
    storage_writer: StorageWriter | None,
    planner: SavePlanner | None,
    process_group: dist.ProcessGroup | None,
    no_dist: bool,
    step: int | None,
    part: str | None,
    options: SaveOptions,
) -> PreparedSave:
    """Checks the arguments of a save and counts its attempt; every rank of a save counts the same.

    Raises:
        ShardbookError: The save cannot be made so.
    """
    runtime = current()
    member = runtime.member(process_group, no_dist=no_dist)
    checked = check_planner(DefaultSavePlanner() if planner is None else planner)
    if storage_writer is None and checkpoint_id is None:
        raise InvalidArgumentError("pass checkpoint_id or storage_writer", field="checkpoint_id")
    writer = check_writer(storage_writer_for(None, checkpoint_id) if storage_writer is None else storage_writer)
    _claim(writer, checked)
    try:
        return _prepared(runtime, member, writer, checkpoint_id, checked, step, part, options)
    except BaseException:
        with _in_use_lock:
            _in_use.difference_update((id(writer), id(checked)))
        raise


def _prepared(
    runtime: Runtime,
    member: Member,
    writer: FileSystemWriter,
    checkpoint_id: str | os.PathLike[str] | None,
    planner: DefaultSavePlanner,
    step: int | None,
    part: str | None,
    options: SaveOptions,
) -> PreparedSave:
    path = writer.checkpoint_id if checkpoint_id is None else checkpoint_id
    session = runtime.session
    part = session.part if part is None else PartName(session.run_name, part).part
    number_of_step = step_of(step, path)
    location = runtime.config.location_of(path)
    attempt = Attempt(
        run=session.run,
        part=part,
        step=number_of_step,
        incarnation=session.incarnation,
        number=runtime.next_attempt(part, number_of_step, location),
        member=member,
        path=os.fspath(path),
        location=location,
    )
    return PreparedSave(runtime, attempt, writer, checkpoint_id, planner, options)
