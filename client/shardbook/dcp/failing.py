"""How a rank that cannot finish says so: to the service, and on storage for those who have no route to it.

Always both: whoever waits for the rank may have only one of them.
"""

from __future__ import annotations

import re
from typing import Final

from shardbook.core import directory as names
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.directory import write_failure
from shardbook.dcp.runtime import Runtime
from shardbook.dcp.submission import REPORT_S, Submitter, connect
from shardbook.dcp.verdicts import rank_failed
from shardbook.dcp.writer import CheckpointFiles
from shardbook.v1.types_pb2 import RankFailure

_FAILED: Final = re.compile(r"rank-(0|[1-9][0-9]{0,9})\.failed")
#: A note's text: what :func:`_text` makes.
_NOTE: Final = re.compile(r"(\w+)(?: on (\S+))?: (.*)", re.DOTALL)
#: Longest reason that is told, characters.
_REASON_CHARS: Final = 2000


def tell_failure(
    attempt: Attempt, submitter: Submitter | None, files: CheckpointFiles | None, phase: str, error: BaseException
) -> None:
    """Says that this rank cannot finish, so that nobody waits for it. Never raises.

    Args:
        attempt: The attempt.
        submitter: The way to the service; None when there is none.
        files: The checkpoint's directory; None when it cannot be had.
        phase: ``plan``, ``write`` or ``register``.
        error: Why.
    """
    rank = attempt.member.rank
    failure = attempt.failure(phase, f"{type(error).__name__}: {error}"[:_REASON_CHARS])
    if submitter is not None:
        with best_effort(f"tell the service that rank {rank} failed"):
            submitter.report(failure, REPORT_S)
    if files is not None and attempt.member.world_size > 1:
        with best_effort(f"leave word that rank {rank} failed"):  # the disk that made it fail, as a rule
            write_failure(files, attempt.prefix, rank, _text(failure))


def give_up(
    runtime: Runtime,
    attempt: Attempt,
    files: CheckpointFiles | None,
    phase: str,
    error: BaseException,
    *,
    has_begun: bool = False,
) -> None:
    """Says that this rank's save ended where it has no way to the service of its own. Never raises.

    Args:
        runtime: The session of this process.
        attempt: The attempt.
        files: The checkpoint's directory; None when it cannot be had.
        phase: ``plan``, ``write`` or ``register``.
        error: Why.
        has_begun: The service may know of the attempt. Otherwise one rank alone tells nobody: nothing is left behind.
    """
    if attempt.member.world_size == 1 and not has_begun:
        return
    submitter = None
    with best_effort("reach the service to tell of a failure"):
        submitter = connect(runtime, attempt, runtime.breaker.start_save())
    tell_failure(attempt, submitter, files, phase, error)


def others_failure(listed: list[str], files: CheckpointFiles, prefix: str) -> RankFailure | None:
    """Returns what a rank left on storage about its failure; None when none did.

    Args:
        listed: Names of the files in the attempt's directory of records.
        files: The checkpoint's directory.
        prefix: The attempt's.
    """
    ranks = sorted(int(match[1]) for match in map(_FAILED.fullmatch, listed) if match)
    if not ranks:
        return None
    text = "write: its reason cannot be read"
    with best_effort("read why a rank failed"):
        content = files.read(names.failure_path(prefix, ranks[0])) or b""
        text = content.decode("utf-8", "replace")
    return failure_of(ranks[0], text)


def raise_failure_of_others(files: CheckpointFiles, prefix: str, submitter: Submitter | None) -> list[str]:
    """Looks whether a rank left word that it failed; returns the names of the files in the directory of records.

    Raises:
        RankFailedError: One did; the service is told on its behalf, for it may have had no route.
    """
    listed: list[str] = []
    with best_effort("look for what other ranks left"):
        listed = files.names(names.attempt_path(prefix))
    failure = others_failure(listed, files, prefix)
    if failure is None:
        return listed
    if submitter is not None:
        with best_effort(f"tell the service that rank {failure.rank} failed"):
            submitter.report(failure, REPORT_S)
    raise rank_failed(failure)


def failure_of(rank: int, text: str) -> RankFailure:
    """Returns what a note says."""
    match = _NOTE.fullmatch(text)
    phase, host, reason = match.groups() if match else ("write", "", text)
    return RankFailure(rank=rank, host=host or "", phase=phase, reason=reason)


def _text(failure: RankFailure) -> str:
    where = f" on {failure.host}" if failure.host else ""
    return f"{failure.phase}{where}: {failure.reason}"
