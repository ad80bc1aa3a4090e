"""What the coordinator does for ranks that have no route to the service: it registers what they wrote.

DESIGN §7 records the whole for that. What is missing is enough (decision 0008): a registration is the same whoever
sends it, and stays the same when its own rank sends it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from shardbook.core.manifest import RegistrationRecord
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.directory import read_record
from shardbook.dcp.failing import raise_failure_of_others
from shardbook.dcp.submission import Submitter
from shardbook.dcp.verdicts import report_mismatch
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import InvalidArgumentError
from shardbook.v1 import registration_pb2 as pb

_LOG = logging.getLogger(__name__)

#: Records read, and registrations sent, at a time.
_AT_ONCE: Final = 16
_A = TypeVar("_A")
_B = TypeVar("_B")


class OtherRanks:
    """The ranks that the coordinator waits for, as the directory tells of them. Used by one thread.

    Args:
        submitter: The way to the service.
        attempt: The attempt.
        files: The checkpoint's directory.
    """

    def __init__(self, submitter: Submitter, attempt: Attempt, files: CheckpointFiles) -> None:
        self._submitter = submitter
        self._attempt = attempt
        self._files = files

    def register(self) -> int:
        """Registers missing ranks whose record is on storage, all there are; returns how many.

        Raises:
            RankFailedError: A rank left word that it failed; the service is told on its behalf.
            InvalidArgumentError: A rank left a record of another save; reason ``ATTEMPT_MISMATCH``.
            ShardbookError: What the server answered, or that it did not.
        """
        raise_failure_of_others(self._files, self._attempt.prefix, self._submitter)
        total = 0
        while True:
            # The service names the first ranks that are missing; those behind them are named once these are there.
            answer = self._submitter.client.get_progress(pb.GetCheckpointProgressRequest(key=self._submitter.key))
            progress = answer.progress
            found = each(self._read, [one.rank for one in progress.missing])
            records = [record for record in found if record is not None]
            for record in records:
                self._require_same(record)
            each(self._submitter.register, records)
            total += len(records)
            if not records or progress.registered_count + len(progress.missing) >= progress.world_size:
                break
        if total:
            _LOG.warning("%d ranks had no route to the service and were registered by the coordinator", total)
        return total

    def _read(self, rank: int) -> RegistrationRecord | None:
        """Returns a rank's record; None when there is none, or it cannot be read now: the next look finds it."""
        with best_effort(f"look for the record of rank {rank}"):
            return read_record(self._files, self._attempt.prefix, rank)
        return None

    def _require_same(self, record: RegistrationRecord) -> None:
        """Refuses a record that a rank left for another save: both together would be a torn checkpoint."""
        own, other = self._attempt.identity(self._submitter.session), record.identity
        for name in ("run", "part", "step", "incarnation", "attempt", "world_size"):
            mine, its = getattr(own, name), getattr(other, name)
            if mine != its:
                error = InvalidArgumentError(
                    f"the ranks of this save disagree: rank {record.rank} said {name} {its!r}, this one says {mine!r}",
                    reason="ATTEMPT_MISMATCH",
                    field=name,
                )
                report_mismatch(self._submitter, "register", error)
                raise error


def each(function: Callable[[_A], _B], arguments: Iterable[_A]) -> list[_B]:
    """Returns ``function`` of each, several at a time, in order; raises the first error."""
    wanted = list(arguments)
    if len(wanted) < 2:
        return list(map(function, wanted))
    try:
        pool = ThreadPoolExecutor(min(_AT_ONCE, len(wanted)), "shardbook-others")
        first = pool.submit(function, wanted[0])
    except RuntimeError:  # the interpreter ends, and a save in the background with it: no new threads any more
        return list(map(function, wanted))
    with pool:
        rest = pool.map(function, wanted[1:])
        return [first.result(), *rest]
