"""A save before it begins: arguments checked, attempt counted, nothing written."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, SupportsFloat

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from shardbook._steps import step_of
from shardbook.config import Checksum
from shardbook.core.names import PartName
from shardbook.dcp._torch import storage_writer_for
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.checksums import check_available
from shardbook.dcp.describing import NOTHING_SAID, Said, said_by
from shardbook.dcp.failing import give_up
from shardbook.dcp.planner import check_planner
from shardbook.dcp.results import SaveState
from shardbook.dcp.runtime import Member, Runtime, current
from shardbook.dcp.writer import CheckpointFiles, check_writer
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
        checksum: ``crc32c`` or ``none``; None for what the client's settings say.
        labels: Labels of the checkpoint, as the caller gave them.
        metrics: Its metrics, likewise.
        note: Its note, likewise.
    """

    strict: bool = False
    wait: str = "committed"
    export_metadata: bool = True
    timeout_s: float = DEFAULT_TIMEOUT_S
    checksum: str | None = None
    labels: Mapping[str, str] | None = None
    metrics: Mapping[str, SupportsFloat] | None = None
    note: Any = None

    def __post_init__(self) -> None:
        if self.wait not in _WAITS:
            raise InvalidArgumentError(f"wait is {self.wait!r}, not one of {', '.join(_WAITS)}", field="wait")
        if self.checksum is not None and self.checksum not in set(Checksum):
            raise InvalidArgumentError(
                f"checksum is {self.checksum!r}, not one of {', '.join(Checksum)}", field="checksum"
            )
        if not self.timeout_s > 0:
            raise InvalidArgumentError(f"timeout_s is {self.timeout_s}, not above 0", field="timeout_s")
        if not self.export_metadata:
            warnings.warn(
                "export_metadata=False: plain torch.distributed.checkpoint cannot load the checkpoint, and tools that "
                "look for .metadata, such as torchtitan's purge, take its directory for an unfinished one",
                stacklevel=4,
            )


def _nothing() -> None:
    """Tells nobody."""


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
        files: The checkpoint's directory, for word of a failure; None when it cannot be had.
        claim: Keeps writer and planner from other saves.
        on_registered: Called when the service has this rank's registration.
        said: What the caller says of the checkpoint.
    """

    runtime: Runtime
    attempt: Attempt
    writer: FileSystemWriter
    checkpoint_id: str | os.PathLike[str] | None
    planner: DefaultSavePlanner
    options: SaveOptions
    files: CheckpointFiles | None
    claim: Claim
    on_registered: Callable[[], None] = _nothing
    said: Said = NOTHING_SAID

    @property
    def checksum(self) -> Checksum:
        """What is kept of every item's bytes."""
        return self.runtime.config.checksum if self.options.checksum is None else Checksum(self.options.checksum)

    def record_said(self) -> bytes:
        """Returns what the coordinator's record says of the checkpoint; nothing on other ranks."""
        if not self.attempt.member.is_coordinator:
            return b""
        return said_by(self.said, self.runtime.session, self.runtime.config.git_commit)

    def note_end(self, state: SaveState) -> None:
        """Notes what need not be said again: the checkpoint that has said it is committed."""
        if state is SaveState.COMMITTED and self.said.origins:
            self.runtime.origins.note_recorded(self.said.origins)

    def give_up(self, error: BaseException) -> None:
        """Says that this rank's save ended before it began, so that nobody waits for it. Never raises."""
        give_up(self.runtime, self.attempt, self.files, "plan", error)

    def release(self) -> None:
        """Lets other saves have the writer and the planner; once this one needs them no more. Twice is once."""
        self.claim.release()


#: Writers and planners of saves that are not over, by ``id``; their saves keep them alive.
_in_use: Final[set[int]] = set()
_in_use_lock: Final = threading.Lock()


class Claim:
    """A save's hold on the objects that no other save may use meanwhile. Thread-safe.

    Args:
        held: The objects by the names of the arguments they were passed for.

    Raises:
        FailedPreconditionError: A save in the background still uses one: each holds the state of one checkpoint, and
            its bytes would go into the other one.
    """

    def __init__(self, **held: object) -> None:
        self._ids = frozenset(map(id, held.values()))
        with _in_use_lock:
            for name, one in held.items():
                if id(one) in _in_use:
                    raise FailedPreconditionError(
                        f"this {name} is still used by a save in the background: wait for its result, or give each "
                        f"save a {name} of its own",
                        reason="STILL_IN_USE",
                        field=name,
                    )
            _in_use.update(self._ids)

    def release(self) -> None:
        """Lets go, once: another save may hold them by now."""
        with _in_use_lock:
            _in_use.difference_update(self._ids)
            self._ids = frozenset()


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
    """Counts the attempt of a save and checks its arguments; every rank of a save counts the same.

    Counted first: a rank that cannot go on, of all ranks perhaps the only one, must count like the others, and has to
    name the attempt when it tells them.

    Raises:
        ShardbookError: The save cannot be made so.
    """
    runtime = current()
    member = runtime.member(process_group, no_dist=no_dist)
    path = getattr(storage_writer, "checkpoint_id", None) if checkpoint_id is None else checkpoint_id
    if path is None:
        if storage_writer is not None:
            check_writer(storage_writer)
        raise InvalidArgumentError("pass checkpoint_id or storage_writer", field="checkpoint_id")
    attempt = _counted(runtime, member, path, step, part)
    try:
        return _prepared(runtime, attempt, checkpoint_id, storage_writer, planner, options)
    except BaseException as error:
        give_up(runtime, attempt, files_of(storage_writer, path), "plan", error)
        raise


def _counted(
    runtime: Runtime, member: Member, path: str | os.PathLike[str], step: int | None, part: str | None
) -> Attempt:
    session = runtime.session
    part = session.part if part is None else PartName(session.run_name, part).part
    number_of_step = step_of(step, path)
    location = runtime.config.location_of(path)
    return Attempt(
        run=session.run,
        part=part,
        step=number_of_step,
        incarnation=session.incarnation,
        number=runtime.next_attempt(part, number_of_step, location),
        member=member,
        path=os.fspath(path),
        location=location,
    )


def _prepared(
    runtime: Runtime,
    attempt: Attempt,
    checkpoint_id: str | os.PathLike[str] | None,
    storage_writer: StorageWriter | None,
    planner: SavePlanner | None,
    options: SaveOptions,
) -> PreparedSave:
    checked = check_planner(DefaultSavePlanner() if planner is None else planner)
    writer = check_writer(storage_writer_for(None, checkpoint_id) if storage_writer is None else storage_writer)
    origins = runtime.origins_of(attempt.part) if attempt.member.is_coordinator else ()
    said = Said.of(options.labels, options.metrics, options.note, origins)
    claim = Claim(storage_writer=writer, planner=checked)
    files = files_of(writer, attempt.path)
    prepared = PreparedSave(runtime, attempt, writer, checkpoint_id, checked, options, files, claim, said=said)
    try:
        check_available(prepared.checksum)
    except BaseException:
        claim.release()
        raise
    return prepared


def files_of(writer: StorageWriter | None, path: str | os.PathLike[str]) -> CheckpointFiles | None:
    """Returns the directory of a checkpoint, for word of a failure; None when it cannot be had.

    The writer is not reset to it: it may still serve another save.
    """
    with best_effort("open the checkpoint's directory"):
        if isinstance(writer, FileSystemWriter):
            return CheckpointFiles(writer.fs, writer.fs.init_path(path))
        return CheckpointFiles.of(storage_writer_for(None, path))
    return None
