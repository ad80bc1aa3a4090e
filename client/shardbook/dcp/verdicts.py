"""What the service says about one save, as opposed to what is wrong with the service."""

from __future__ import annotations

from typing import Final

from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.submission import REPORT_S, Submitter
from shardbook.errors import (
    CheckpointClosedError,
    InvalidArgumentError,
    InvalidGeometryError,
    RankFailedError,
    RanksMissingError,
    SessionFencedError,
    ShardbookError,
)
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import RankFailure

_VERDICTS: Final = (
    CheckpointClosedError,
    InvalidGeometryError,
    RankFailedError,
    RanksMissingError,
    SessionFencedError,
)


def is_verdict(error: BaseException) -> bool:
    """True for what the service says about this very save; anything else is no reason to lose it."""
    return isinstance(error, _VERDICTS) or is_mismatch(error)


def is_mismatch(error: BaseException) -> bool:
    """True when the ranks of a save disagree about what they save: its step, its directory, how many they are."""
    return isinstance(error, InvalidArgumentError) and error.reason == "ATTEMPT_MISMATCH"


def report_mismatch(submitter: Submitter, phase: str, error: ShardbookError) -> None:
    """Says so to the ranks that the service believed, else they would wait for this one."""
    with best_effort("tell the other ranks that they disagree"):
        submitter.report(submitter.failure(phase, error.message), REPORT_S, about=error)


def explain(submitter: Submitter, error: ShardbookError) -> ShardbookError:
    """Returns the error that says why an attempt is closed, where the service knows it: the rank that failed."""
    if not isinstance(error, CheckpointClosedError):
        return error
    with best_effort("ask why the checkpoint is closed"):
        answer = submitter.client.get_progress(pb.GetCheckpointProgressRequest(key=submitter.key))
        if answer.progress.HasField("failure"):
            return rank_failed(answer.progress.failure)
    return error


def rank_failed(failure: RankFailure) -> RankFailedError:
    """Returns the error that a rank's failure is to the others."""
    where = f" on {failure.host}" if failure.host else ""
    return RankFailedError(
        f"rank {failure.rank}{where} failed to {failure.phase}: {failure.reason}",
        metadata={"rank": str(failure.rank), "host": failure.host, "phase": failure.phase},
    )
