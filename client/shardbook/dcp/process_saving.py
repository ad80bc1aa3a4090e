"""The trainer's side of a save by a process: what is handed over, and who is told when the process is gone."""

from __future__ import annotations

import copy
import os
from typing import Any, Final

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from shardbook.dcp.failing import give_up
from shardbook.dcp.handover import Packed, pack
from shardbook.dcp.planner import unused_planner
from shardbook.dcp.prepared import PreparedSave
from shardbook.dcp.results import SaveResult
from shardbook.dcp.save_process_handle import HandedOver, end_save_process, save_process_of
from shardbook.errors import InvalidArgumentError, SaveProcessError

#: How many processes are tried for one save.
_TRIES: Final = 2


def check_executor(prepared: PreparedSave) -> None:
    """Refuses a save that another process cannot do.

    Raises:
        ForkedClientError: This process was forked from the one that called ``init``.
        InvalidArgumentError: Only this process sees the filesystem (reason ``UNSUPPORTED_EXECUTOR``).
    """
    prepared.runtime.check_not_forked()
    if prepared.files is not None and prepared.files.is_in_process:
        raise InvalidArgumentError(
            f"{prepared.attempt.path} lies in this process's memory, which a save process does not see: use "
            "AsyncCheckpointerType.THREAD",
            reason="UNSUPPORTED_EXECUTOR",
            field="async_checkpointer_type",
        )


def hand_over(prepared: PreparedSave, state_dict: dict[str, Any]) -> HandedOver:
    """Copies a state dict into memory of the save process, which saves it; returns at once.

    When this returns, state dict, writer and planner are the caller's again.

    Raises:
        InvalidArgumentError: Something cannot be pickled (reason ``UNPICKLABLE``).
        SaveProcessError: There is no such process, and it cannot be started.
    """
    save_process_of(prepared.runtime)  # starts while the state dict is copied
    writer, planner = _unused_writer(prepared.writer), unused_planner(prepared.planner)
    packed = pack({"storage_writer": writer, "planner": planner, "state_dict": state_dict})
    try:
        handed = _send(prepared, packed)
    except BaseException:
        os.close(packed.descriptor)
        raise
    prepared.release()
    return handed


def _send(prepared: PreparedSave, packed: Packed) -> HandedOver:
    """Sends a save to the save process, to a new one where that has ended."""
    runtime = prepared.runtime
    try:
        for _ in range(_TRIES):
            handed = save_process_of(runtime).send(prepared, packed)
            if handed is not None:
                return handed
    finally:
        if runtime.is_closed:  # while a stager was still copying
            end_save_process(runtime)
    raise SaveProcessError("the save process ends as soon as it is started: look for its traceback in stderr")


def _unused_writer(writer: FileSystemWriter) -> FileSystemWriter:
    """Returns a writer without the copy of a state dict that it may keep as a stager."""
    if getattr(writer, "state_dict_cache", None) is None:
        return writer
    unused = copy.copy(writer)
    unused.state_dict_cache = None
    return unused


def await_end(prepared: PreparedSave, handed: HandedOver) -> SaveResult:
    """Waits for a save; where its process ended, the other ranks are told, unless they need no more of this one.

    A process that ended before it had the save, having been idle perhaps, is replaced, and nobody notices.

    Raises:
        SaveProcessError: The process ended.
        Exception: What ``save`` would have raised.
    """
    try:
        try:
            result = handed.future.result()
        except SaveProcessError:
            if handed.is_taken:
                raise
            handed = _send(prepared, handed.packed)
            result = handed.future.result()
    except SaveProcessError as error:
        if not handed.is_taken:
            handed.take()  # nobody else will
        if not handed.is_registered or prepared.attempt.member.is_coordinator:
            phase = "register" if handed.is_registered else "write"
            give_up(prepared.runtime, prepared.attempt, prepared.files, phase, error, has_begun=True)
        raise
    prepared.note_end(result.state)
    return result
