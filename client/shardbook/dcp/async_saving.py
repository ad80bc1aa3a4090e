"""``async_save``: the state dict is copied, then saved by a thread or a process while training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, SupportsFloat

import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import StorageWriter

from shardbook.dcp.prepared import DEFAULT_TIMEOUT_S, PreparedSave, SaveOptions, prepare
from shardbook.dcp.process_saving import await_end, check_executor, hand_over
from shardbook.dcp.rank_save import RankSave
from shardbook.dcp.results import SaveResult
from shardbook.dcp.saving import state_of
from shardbook.dcp.standing_aside import async_save_by_torch, stands_aside
from shardbook.errors import InvalidArgumentError

_LOG = logging.getLogger(__name__)


@dataclass
class AsyncSaveResponse(state_dict_saver.AsyncSaveResponse):
    """Two futures of a save that goes on; also usable where DCP returns one future.

    Attributes:
        staging_completion: Done when the state dict is copied and may be changed.
        upload_completion: Done when the save is: committed, or whatever ``save`` would have returned or raised. A
            failure is logged as an error too, for those who never ask.
    """

    upload_completion: Future[SaveResult]  # type: ignore[assignment] # DCP's promises less

    def result(self, timeout: float | None = None) -> SaveResult:
        """Waits for the save, at most ``timeout`` seconds; returns or raises what ``save`` would have."""
        return self.upload_completion.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits for the save, at most ``timeout`` seconds; returns what it raised."""
        return self.upload_completion.exception(timeout)

    def done(self) -> bool:
        """Returns True when the save is over."""
        return self.upload_completion.done()

    def add_done_callback(self, callback: Callable[[Future[SaveResult]], object]) -> None:
        """Calls ``callback`` with the save's future when it is done."""
        self.upload_completion.add_done_callback(callback)


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    step: int | None = None,
    part: str | None = None,
    strict: bool = False,
    wait: str = "committed",
    export_metadata: bool = True,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    checksum: str | None = None,
    labels: Mapping[str, str] | None = None,
    metrics: Mapping[str, SupportsFloat] | None = None,
    note: Any = None,
) -> AsyncSaveResponse:
    """Copies a state dict and saves the copy in the background, without collectives.

    Arguments are those of ``save``, and DCP's two: ``async_checkpointer_type`` says who saves, and ``async_stager``
    copies the state dict, by default the storage writer where it is a stager, else DCP's DefaultStager with copies in
    main memory. A stager of the caller's is the caller's to close. The process group needs no CPU backend.

    With THREAD a thread saves. With PROCESS a process of Shardbook's own does, one a rank, which is started by the
    first such save and kept: training's interpreter lock is left alone, and a save in flight outlives a trainer that is
    killed. The process is in no process group, sees no GPU, and does not run the training script, which needs no
    ``if __name__ == "__main__"`` for it; so what is defined in the script itself cannot be saved by it. Without a
    stager of the caller's the state dict is copied once, into memory that both processes see, of which ``/dev/shm`` is
    no part. Writer and planner travel as copies, and may be used again at once. In mode ``disabled`` PROCESS is THREAD.

    Returns:
        Futures of the copy and of the save.

    Raises:
        InvalidArgumentError: Arguments are wrong, or with PROCESS cannot be pickled (reason ``UNPICKLABLE``, the name
            of the entry in the message); nothing was written. What ``save`` raises later is in the future, and
            SaveProcessError when the process is gone.
    """
    if async_checkpointer_type not in _TYPES:
        raise InvalidArgumentError(
            f"async_checkpointer_type is {async_checkpointer_type!r}, not one of AsyncCheckpointerType's",
            reason="UNSUPPORTED_EXECUTOR",
            field="async_checkpointer_type",
        )
    if stands_aside():
        futures = async_save_by_torch(
            state_dict,
            strict=strict,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner,
            process_group=process_group,
            async_stager=async_stager,
            no_dist=no_dist,
        )
        return AsyncSaveResponse(*futures)
    options = SaveOptions(strict, wait, export_metadata, timeout_s, checksum, labels, metrics, note)
    prepared = prepare(checkpoint_id, storage_writer, planner, process_group, no_dist, step, part, options)
    begin = _begin_in_process if async_checkpointer_type is AsyncCheckpointerType.PROCESS else _begin
    try:
        return begin(prepared, state_dict, storage_writer, async_stager)
    except BaseException:
        prepared.release()
        raise


_TYPES: Final = tuple(AsyncCheckpointerType)


def _begin(
    prepared: PreparedSave,
    state_dict: dict[str, Any],
    storage_writer: StorageWriter | None,
    async_stager: AsyncStager | None,
) -> AsyncSaveResponse:
    """Copies the state dict and starts the thread that saves the copy."""
    owned = None
    plain = state_of(prepared, state_dict)
    try:
        if async_stager is None:
            own: object = storage_writer  # every FileSystemWriter is a stager too, which StorageWriter does not say
            if isinstance(own, AsyncStager):
                async_stager = own
            else:
                async_stager = owned = _usual_stager(plain)
        staged = async_stager.stage(plain)
        upload = _in_background(_upload, prepared, staged)
    except BaseException as error:
        prepared.give_up(error)
        _close(owned)
        raise
    upload.add_done_callback(lambda done: _ended(done, prepared, owned))
    if not isinstance(staged, Future) and async_stager.should_synchronize_after_execute:
        async_stager.synchronize_staging()
    return AsyncSaveResponse(_staging_future(staged), upload)


def _begin_in_process(
    prepared: PreparedSave,
    state_dict: dict[str, Any],
    storage_writer: StorageWriter | None,
    async_stager: AsyncStager | None,
) -> AsyncSaveResponse:
    """Copies the state dict into the save process, or starts the thread that does once the caller's stager has."""
    plain = state_of(prepared, state_dict)
    try:
        check_executor(prepared)
        stager = async_stager or _stager_with_a_way_of_its_own(storage_writer)
        staged = plain if stager is None else stager.stage(plain)
        if isinstance(staged, Future):
            upload = _in_background(_upload_by_process, prepared, staged)
        else:
            upload = _in_background(await_end, prepared, hand_over(prepared, staged))
    except BaseException as error:
        prepared.give_up(error)
        raise
    upload.add_done_callback(lambda done: _ended(done, prepared, None))
    if stager is not None and not isinstance(staged, Future) and stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return AsyncSaveResponse(_staging_future(staged), upload)


def _stager_with_a_way_of_its_own(writer: object) -> AsyncStager | None:
    """Returns a storage writer that stages as DCP's do not, or into pinned memory that it keeps; else None.

    What DCP's writers do otherwise is a copy, and handing over makes one.
    """
    if not isinstance(writer, AsyncStager):
        return None
    if not isinstance(writer, FileSystemWriter) or type(writer).stage is not FileSystemWriter.stage:
        return writer
    return writer if writer.cache_staged_state_dict else None


def _upload_by_process(prepared: PreparedSave, staged: Future[dict[str, Any]]) -> SaveResult:
    try:
        handed = hand_over(prepared, staged.result())
    except BaseException as error:
        prepared.give_up(error)
        raise
    return await_end(prepared, handed)


def _in_background(work: Callable[..., SaveResult], *arguments: object) -> Future[SaveResult]:
    """Runs something in a thread of its own, which the interpreter's exit waits for."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardbook-save")
    future = executor.submit(work, *arguments)
    executor.shutdown(wait=False)
    return future


def _ended(done: Future[SaveResult], prepared: PreparedSave, stager: AsyncStager | None) -> None:
    """Says what would go unseen where nobody asks for the result."""
    prepared.release()
    _close(stager)
    error = done.exception()
    if error is not None:
        _LOG.error(
            "the background save of step %d to %s failed on rank %d: %s: %s",
            prepared.attempt.step,
            prepared.attempt.path,
            prepared.attempt.member.rank,
            type(error).__name__,
            error,
        )


def _usual_stager(state_dict: dict[str, Any]) -> AsyncStager:
    """DCP's default stager; its older one for ShardedTensor, at which the default one fails."""
    if _holds_sharded_tensor(state_dict):
        return BlockingAsyncStager()
    return DefaultStager(StagingOptions(False, False, False, False))


def _holds_sharded_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_sharded_tensor, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_sharded_tensor, value))
    return isinstance(value, ShardedTensor)


def _upload(prepared: PreparedSave, staged: Future[dict[str, Any]] | dict[str, Any]) -> SaveResult:
    try:
        state_dict = staged.result() if isinstance(staged, Future) else staged
    except BaseException as error:
        prepared.give_up(error)
        raise
    return RankSave(prepared).run(state_dict)


def _staging_future(staged: Future[dict[str, Any]] | dict[str, Any]) -> Future[None]:
    """Returns a future that says when, not what: DCP's callers expect None."""
    told: Future[None] = Future()

    def tell(done: Future[dict[str, Any]]) -> None:
        error = done.exception()
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)

    if isinstance(staged, Future):
        staged.add_done_callback(tell)
    else:
        told.set_result(None)
    return told


def _close(stager: AsyncStager | None) -> None:
    if stager is not None:
        stager.close()
