"""``ShardbookWriter``: torch's own ``save`` and ``async_save``, with their checkpoints in the catalogue.

Coordination is DCP's, collectives and all, and no faster than it: ``shardbook.dcp.save`` is what does without. What is
added is a fenced directory for every attempt, a manifest, and the catalogue::

    all ranks     set_up_storage_writer, prepare_local_plan    DCP's
    coordinator   prepare_global_plan                          counts the attempt; torch's scatter carries its directory
    all ranks     write_data                                   make it, write into it
    coordinator   finish                                       manifest, .metadata, then one RecordCheckpoint
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, SupportsFloat, cast

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from shardbook._steps import step_of
from shardbook.config import Checksum, ClientConfig, Mode
from shardbook.core import directory as names
from shardbook.core.extents import NO_CHECKSUM
from shardbook.core.names import PartName
from shardbook.dcp._torch import StoragePrefix, silent_overwrite, storage_writer_for
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.carried import CarriedSession, carry, runtime_of
from shardbook.dcp.checksums import WrittenChecksums, check_available
from shardbook.dcp.describing import Said, milliseconds, said_by
from shardbook.dcp.gathered import GatheredSave, MeasuredResult
from shardbook.dcp.items import check_results
from shardbook.dcp.planner import check_no_caching, plans_as_dcp, warn_of_unsafe_entries
from shardbook.dcp.results import SaveResult
from shardbook.dcp.runtime import Runtime, current, current_or_none
from shardbook.dcp.staged import StagedByAnother
from shardbook.dcp.writer import CheckpointFiles, check_writer, reported
from shardbook.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    UnsupportedPlannerError,
    UnsupportedWriterError,
)
from shardbook.stores import encodable

#: Attempts of somebody else that are passed over before a directory is called confused.
_MOST_TAKEN: Final = 100


@dataclass(eq=False)
class _Save:
    """What a writer keeps while one checkpoint is written.

    Attributes:
        runtime: The session of this process.
        part: Part that is saved.
        step: Training step.
        location: What the catalogue records for the directory.
        attempt: On the coordinator, once it is counted.
        plans: On the coordinator, every rank's part of the global plan.
        is_dcps: The global plan is DCP's own.
        began_s: When it began here, by ``time.monotonic``.
    """

    runtime: Runtime
    part: str
    step: int
    location: str
    attempt: Attempt | None = None
    plans: list[SavePlan] = field(default_factory=list)
    is_dcps: bool = False
    began_s: float = field(default_factory=time.monotonic)


class ShardbookWriter(StagedByAnother, StorageWriter):
    """A storage writer for ``torch.distributed.checkpoint.save`` and ``async_save``, by a thread or a process.

    ``shardbook.dcp.init`` comes before it. The data is written by the writer it is made around, into a directory of the
    attempt's own; plain DCP loads the checkpoint as ever. With the service away, or a session that was replaced, the
    save ends all the same, and ``result`` says ``UNREGISTERED``; ``shardbook sync``, or the session's next save,
    records it. In mode ``disabled`` it is the other writer and nothing else. Like DCP's writers it may be used again
    for another checkpoint, and by one save at a time.

    Args:
        checkpoint_id: Directory or URL; may be left to ``save``.
        storage_writer: FileSystemWriter, FsspecWriter or a subclass; by default the one that fits ``checkpoint_id``.
            Its ``finish`` is not called.
        step: Training step; by default the last number in the last component of the path.
        part: Part of the step; by default the session's.
        strict: Have ``save`` raise where the catalogue does not have the save in the end. torch raises it on every
            rank, in a CheckpointException.
        checksum: ``crc32c`` or ``none``; by default what ``SHARDBOOK_CHECKSUM`` says.
        labels: What the catalogue is to call the checkpoint, by key; the coordinator's count.
        metrics: Measured values by name, likewise; those that are NaN or infinite are left out.
        note: Any JSON value to keep with the checkpoint, likewise.

    Attributes:
        result: What became of the last save, on its coordinator; None elsewhere, and where another process saved.

    Raises:
        UnsupportedWriterError: The writer's files cannot be fenced.
        FailedPreconditionError: ``init`` was not called (reason ``NO_SESSION``).
        InvalidArgumentError: A label, metric or note cannot be kept.
    """

    def __init__(
        self,
        checkpoint_id: str | os.PathLike[str] | None = None,
        *,
        storage_writer: StorageWriter | None = None,
        step: int | None = None,
        part: str | None = None,
        strict: bool = False,
        checksum: str | None = None,
        labels: Mapping[str, str] | None = None,
        metrics: Mapping[str, SupportsFloat] | None = None,
        note: Any = None,
    ) -> None:
        super().__init__()
        self._carried: CarriedSession | None = None
        self._reserved: int | None = None
        self._save: _Save | None = None
        self._step, self._part, self._strict, self._checksum = step, part, strict, checksum
        self._said = Said.of(labels, metrics, note)
        self.result: SaveResult | None = None
        runtime = self._runtime()
        if runtime is not None:
            _check(runtime, step, part, checksum)
        self._writer: Any = storage_writer
        if storage_writer is not None and runtime is not None:
            self._writer = check_writer(storage_writer)
        if checkpoint_id is not None:
            self.reset(checkpoint_id)

    # ------------------------------------------------------------ what DCP calls, in its order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Turns to another checkpoint; one may be named."""
        self._save = None
        if self._writer is not None:
            self._writer.reset(checkpoint_id)
        elif checkpoint_id is not None:
            self._writer = storage_writer_for(None, checkpoint_id)
            if self._runtime() is not None:
                check_writer(self._writer)

    def storage_meta(self) -> StorageMeta | None:
        """Returns what the other writer says of itself."""
        return cast("StorageMeta | None", self._inner.storage_meta())

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begins a save.

        Raises:
            InvalidArgumentError: There is no step to be seen, or ``use_collectives`` is False: that leaves neither a
                checkpoint of all ranks nor anybody who knows of it (reason ``NO_COLLECTIVES``).
        """
        self._save = self.result = None
        runtime, inner = self._runtime(), self._inner
        if runtime is not None:
            if not kwargs.get("use_collectives", True):
                raise InvalidArgumentError(
                    "use_collectives=False writes metadata for each rank, and nobody knows of the whole; "
                    "shardbook.dcp.save needs no collectives either, leaves duplicates out and can be resharded",
                    reason="NO_COLLECTIVES",
                    field="use_collectives",
                )
            path = inner.checkpoint_id
            self._save = _Save(
                runtime,
                runtime.session.part if self._part is None else self._part,
                step_of(self._step, path),
                runtime.config.location_of(path),
            )
        if "kwargs" in inspect.signature(inner.set_up_storage_writer).parameters:
            inner.set_up_storage_writer(is_coordinator, *args, **kwargs)
        else:
            inner.set_up_storage_writer(is_coordinator)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Has the other writer prepare; ``overwrite=False`` means what it means there."""
        with nullcontext() if self._save is None else silent_overwrite(self._inner):
            return cast("SavePlan", self._inner.prepare_local_plan(plan))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Counts the attempt, and sends every rank into its directory.

        Raises:
            InvalidArgumentError: One process saves, whose session has several ranks (reason ``NO_DIST``).
            FailedPreconditionError: The ranks have sessions of their own (reason ``SESSION_NOT_SHARED``).
        """
        prepared: list[SavePlan] = self._inner.prepare_global_plan(plans)
        save = self._save
        if save is None:
            return prepared
        attempt = self._counted(save, len(prepared))
        save.attempt = attempt
        save.plans = [dataclasses.replace(plan, storage_data=_inside(attempt.prefix, plan)) for plan in prepared]
        return save.plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's share into the attempt's directory.

        Raises:
            UnsupportedPlannerError: The planner keeps plans of earlier attempts.
            UnsupportedWriterError: The other writer puts files elsewhere.
            FailedPreconditionError: Not everything was written (reason ``WRITE_INCOMPLETE``).
        """
        if self._save is None:
            return cast("Future[list[WriteResult]]", self._inner.write_data(plan, planner))
        prefix = self._agreed(self._save, plan, planner)
        results: list[WriteResult] = []
        if plan.items:  # a rank without items writes no file
            files = CheckpointFiles.of(self._inner)
            if files.exists(f"{plan.storage_data.prefix}0.distcp"):
                raise FailedPreconditionError(
                    f"{plan.storage_data.prefix}0.distcp is there already: another save has this attempt's directory",
                    reason="ATTEMPT_EXISTS",
                )
            files.make_directory(prefix)
            warn_of_unsafe_entries(planner, plan.items, self._save.runtime.checked_entries)
            results = self._written(self._save, plan, planner)
            check_results(plan.items, results, prefix)
            files.sync_directory(prefix)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Makes the directory enough on its own, then records the whole; see the class for what it raises."""
        save = self._save
        if save is None:
            self._inner.finish(metadata, results)
            return
        assert save.attempt is not None  # noqa: S101 - the coordinator's, who has counted it
        said = said_by(self._said, save.runtime.session, save.runtime.config.git_commit)
        gathered = GatheredSave(save.runtime, save.attempt, self._inner, save.plans, is_dcps=save.is_dcps, said=said)
        self._save = None
        self.result = gathered.finish(metadata, results, strict=self._strict)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """Directory or URL; None while nobody has said."""
        return None if self._writer is None else cast("str | os.PathLike[str]", self._writer.checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns True for what one of DCP's writers can write to."""
        try:
            storage_writer_for(None, checkpoint_id)
        except RuntimeError:
            return False
        return True

    # ------------------------------------------------------------ parts of the above

    def __getstate__(self) -> dict[str, Any]:
        runtime = self._runtime()
        carried = None if runtime is None else carry(runtime)
        reserved = None if carried is None else carried.attempt
        own = {"_carried": carried, "_reserved": reserved, "_save": None, "_usual": None, "result": None}
        return {**vars(self), **own}

    def _runtime(self) -> Runtime | None:
        """The session of this process; None when Shardbook stands aside.

        Raises:
            FailedPreconditionError: There is none.
        """
        if self._carried is not None:
            runtime = runtime_of(self._carried)
        elif current_or_none() is None and ClientConfig.from_env().mode is Mode.DISABLED:
            return None
        else:
            runtime = current()
        return None if runtime.session.mode is Mode.DISABLED else runtime

    @property
    def _stager(self) -> AsyncStager | None:
        return self._writer if isinstance(self._writer, AsyncStager) else None

    @property
    def _inner(self) -> Any:
        if self._writer is None:
            raise InvalidArgumentError("pass checkpoint_id, here or to save", field="checkpoint_id")
        return self._writer

    def _counted(self, save: _Save, world_size: int) -> Attempt:
        """Counts an attempt whose directory is new: a session that was used before a restart counts anew."""
        runtime, files = save.runtime, CheckpointFiles.of(self._inner)
        path, member = os.fspath(self._inner.checkpoint_id), runtime.coordinator(world_size)
        for _ in range(_MOST_TAKEN):
            attempt = Attempt(
                run=runtime.session.run,
                part=save.part,
                step=save.step,
                incarnation=runtime.session.incarnation,
                number=self._next_number(save),
                member=member,
                path=path,
                location=save.location,
            )
            if not files.exists(attempt.prefix) and not files.exists(names.attempt_path(attempt.prefix)):
                return attempt
        raise FailedPreconditionError(
            f"{encodable(path)} holds {_MOST_TAKEN} attempts of this session already", reason="ATTEMPT_EXISTS"
        )

    def _next_number(self, save: _Save) -> int:
        """The next attempt's; in a process of torch's, the one that the trainer has kept for it."""
        if self._reserved is None:
            return save.runtime.next_attempt(save.part, save.step, save.location)
        number, self._reserved = self._reserved, None
        save.runtime.note_attempt(save.part, save.step, save.location, number)
        return number

    def _agreed(self, save: _Save, plan: SavePlan, planner: SavePlanner) -> str:
        """Directory of the attempt, as the coordinator has it, once this rank has counted it too."""
        check_no_caching(planner)
        save.is_dcps = plans_as_dcp(planner)
        storage = plan.storage_data
        prefix, slash, _ = storage.prefix.partition("/") if type(storage) is StoragePrefix else ("", "", "")
        head, dash, number = prefix.partition("-a")
        if not (slash and dash and names.is_prefix(prefix) and save.runtime.session.incarnation.hex().startswith(head)):
            raise UnsupportedPlannerError(
                f"{type(planner).__qualname__}.finish_plan returned a plan that was not made for this save: it has "
                f"storage_data {storage!r:.100}",
                field="planner",
            )
        save.runtime.note_attempt(save.part, save.step, save.location, int(number))
        return prefix

    def _written(self, save: _Save, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        """What the other writer reports, with checksums where some are to be kept, and what this rank took."""
        planned_s = time.monotonic()
        checksum = save.runtime.config.checksum if self._checksum is None else Checksum(self._checksum)
        if checksum is Checksum.NONE:
            results = reported(self._inner.write_data(plan, planner))
            sums = [NO_CHECKSUM] * len(results)
        else:
            summed = WrittenChecksums(self._inner)
            with summed.watching():
                results = reported(self._inner.write_data(plan, planner))
            sums = summed.of(results).tolist()
        took_ms = milliseconds(save.began_s, planned_s, time.monotonic())
        return [
            # torch gathers results and nothing else: the first one carries the rank's times.
            MeasuredResult(one.index, one.size_in_bytes, one.storage_data, value, () if at else took_ms)
            if value != NO_CHECKSUM or not at
            else one
            for at, (one, value) in enumerate(zip(results, sums, strict=True))
        ]


def _inside(prefix: str, plan: SavePlan) -> StoragePrefix:
    """The names that a rank's files begin with, in the attempt's directory.

    Raises:
        UnsupportedWriterError: The other writer says so in another way.
    """
    storage = plan.storage_data
    if type(storage) is not StoragePrefix:
        raise UnsupportedWriterError(
            f"the storage writer gives ranks {storage!r:.100}, not a prefix of their files' names",
            field="storage_writer",
        )
    return StoragePrefix(f"{prefix}/{storage.prefix}")


def _check(runtime: Runtime, step: int | None, part: str | None, checksum: str | None) -> None:
    """Refuses arguments that no save could have."""
    if step is not None:
        step_of(step, "")
    if part is not None:
        _ = PartName(runtime.session.run_name, part)
    if checksum is not None and checksum not in set(Checksum):
        raise InvalidArgumentError(f"checksum is {checksum!r}, not one of {', '.join(Checksum)}", field="checksum")
    check_available(runtime.config.checksum if checksum is None else Checksum(checksum))


__all__ = ["ShardbookWriter"]
