"""Mode ``disabled``: torch's own save, collectives and all, in the place of Shardbook's."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint import state_dict_saver

from shardbook.config import Mode
from shardbook.dcp.results import SaveResult, SaveState
from shardbook.dcp.runtime import current
from shardbook.errors import UnregisteredError


def stands_aside() -> bool:
    """Returns True when the session's mode is ``disabled``."""
    return current().session.mode is Mode.DISABLED


def save_by_torch(state_dict: dict[str, Any], *, strict: bool, **arguments: Any) -> SaveResult:
    """Saves with ``torch.distributed.checkpoint.save``; ``arguments`` are its own.

    Raises:
        UnregisteredError: ``strict``; nothing was written.
    """
    result = _result(arguments, strict=strict)
    state_dict_saver.save(state_dict, **arguments)
    return result


def async_save_by_torch(
    state_dict: dict[str, Any], *, strict: bool, **arguments: Any
) -> tuple[Future[None], Future[SaveResult]]:
    """Saves with ``torch.distributed.checkpoint.async_save``; returns the futures of the copy and of the save.

    Raises:
        UnregisteredError: ``strict``; nothing was written.
    """
    result = _result(arguments, strict=strict)
    response = state_dict_saver.async_save(state_dict, **arguments)
    if isinstance(response, state_dict_saver.AsyncSaveResponse):
        staged, saved = response.staging_completion, response.upload_completion
    else:
        staged, saved = Future[None](), response
        staged.set_result(None)
    told: Future[SaveResult] = Future()

    def tell(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            told.set_result(result)
        else:
            told.set_exception(error)

    saved.add_done_callback(tell)
    return staged, told


def _result(arguments: dict[str, Any], *, strict: bool) -> SaveResult:
    checkpoint_id, writer = arguments.get("checkpoint_id"), arguments.get("storage_writer")
    path = os.fspath(checkpoint_id if checkpoint_id is not None else getattr(writer, "checkpoint_id", ""))
    if strict:
        raise UnregisteredError(f"{path}: mode disabled registers nothing", metadata={"path": path})
    return SaveResult(SaveState.UNREGISTERED, ref=path, reason="mode disabled", path=path)
