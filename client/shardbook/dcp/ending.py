"""How a save ends, whichever way ranks agreed: what its caller gets, and what is said when the service is away."""

from __future__ import annotations

import logging

from shardbook.dcp.attempt import Attempt
from shardbook.dcp.results import SaveResult, SaveState, SaveStats
from shardbook.dcp.runtime import Runtime
from shardbook.errors import UnregisteredError
from shardbook.stores import encodable
from shardbook.v1.types_pb2 import Checkpoint


def result_of(
    attempt: Attempt, state: SaveState, checkpoint: Checkpoint | None, reason: str, stats: SaveStats
) -> SaveResult:
    """Returns what the caller of a save gets.

    Args:
        attempt: The attempt.
        state: How far it has come.
        checkpoint: As the catalogue has it; None while it does not.
        reason: Why it is not further, or what was left undone.
        stats: What this rank did and what it cost.
    """
    return SaveResult(
        state=state,
        ref=attempt.path if checkpoint is None else checkpoint.ref,
        reason=encodable(reason),
        path=attempt.path,
        step=attempt.step,
        name="" if checkpoint is None else checkpoint.name,
        attempt=attempt.number,
        prefix=attempt.prefix,
        stats=stats,
    )


def unregistered(attempt: Attempt, reason: str) -> UnregisteredError:
    """Returns what a strict save raises whose checkpoint is on storage only."""
    shown = encodable(attempt.path)
    return UnregisteredError(
        f"step {attempt.step} is in {shown}, but not in the catalogue ({encodable(reason)}): run `shardbook sync "
        f"{shown}` once the server is back",
        metadata={"path": attempt.path},
    )


def tell_outage(log: logging.Logger, level: int, runtime: Runtime, attempt: Attempt, error: Exception) -> None:
    """Says that saves go on without the service: once an outage, not save after save."""
    if runtime.outage_told:
        return
    runtime.outage_told = True
    log.log(
        level,
        "step %d and those to come are saved without the service until it answers: %s. The data is safe; the "
        "first save that reaches the service records what it missed, or run `shardbook sync %s`",
        attempt.step,
        encodable(str(error)),
        encodable(attempt.path),
    )


__all__ = ["result_of", "tell_outage", "unregistered"]
