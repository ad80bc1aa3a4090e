"""``async_save``: the state dict is copied, then saved by a thread while training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import StorageWriter

from shardbook.dcp.prepared import DEFAULT_TIMEOUT_S, PreparedSave, SaveOptions, prepare
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
) -> AsyncSaveResponse:
    """Copies a state dict and saves the copy in the background, without collectives.

    Arguments are those of ``save``, and DCP's two: ``async_checkpointer_type`` is THREAD (a later release brings
    PROCESS); ``async_stager`` copies the state dict, by default the storage writer where it is a stager, else DCP's
    DefaultStager with copies in main memory. A stager of the caller's is the caller's to close. The process group
    needs no CPU backend.

    Returns:
        Futures of the copy and of the save.

    Raises:
        InvalidArgumentError: Arguments are wrong; nothing was copied or written. What ``save`` raises later is in the
            future.
    """
    if async_checkpointer_type is not AsyncCheckpointerType.THREAD:
        raise InvalidArgumentError(
            f"async_checkpointer_type={async_checkpointer_type} comes with a later release of shardbook; use "
            "AsyncCheckpointerType.THREAD",
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
    options = SaveOptions(strict, wait, export_metadata, timeout_s)
    prepared = prepare(checkpoint_id, storage_writer, planner, process_group, no_dist, step, part, options)
    try:
        return _begin(prepared, state_dict, storage_writer, async_stager)
    except BaseException:
        prepared.release()
        raise


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
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardbook-save")
        upload = executor.submit(_upload, prepared, staged)
    except BaseException as error:
        prepared.give_up(error)
        _close(owned)
        raise
    executor.shutdown(wait=False)
    upload.add_done_callback(lambda done: _ended(done, prepared, owned))
    if not isinstance(staged, Future) and async_stager.should_synchronize_after_execute:
        async_stager.synchronize_staging()
    return AsyncSaveResponse(_staging_future(staged), upload)


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
