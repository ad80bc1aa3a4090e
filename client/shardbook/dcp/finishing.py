"""The end of a save: commit, manifest, ``.metadata``; and what takes their place while the service is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch.distributed.checkpoint.metadata import StorageMeta

from shardbook.core import directory as names
from shardbook.core.fold import FoldedAttempt, fold, missing_ranks
from shardbook.core.manifest import RegistrationRecord
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.catching_up import Waiting, catch_up
from shardbook.dcp.directory import (
    Absence,
    MakeMetadata,
    await_records,
    exporter,
    go_alone,
    is_alone,
    publish,
    read_records,
)
from shardbook.dcp.failing import failure_of, raise_failure_of_others
from shardbook.dcp.results import SaveState
from shardbook.dcp.runtime import Runtime
from shardbook.dcp.standing_in import OtherRanks
from shardbook.dcp.submission import Submitter
from shardbook.dcp.verdicts import explain, is_verdict, rank_failed
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import (
    CheckpointClosedError,
    InvalidGeometryError,
    RanksMissingError,
    SessionFencedError,
    ShardbookError,
)
from shardbook.recording import description_of
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2

_LOG = logging.getLogger(__name__)

#: How long a coordinator without the service waits for the other ranks' records, seconds.
RECORDS_WAIT_S: Final = 300.0
#: How long the coordinator waits for registrations before it looks for records of ranks that have no route, seconds.
_FIRST_LOOK_S: Final = 2.0
_LOOK_EVERY_S: Final = 10.0
_LONGEST_SLICE_S: Final = 20.0
#: Pause between two looks at an attempt whose lease has ended, or at a directory that cannot be read, seconds.
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0
#: A coordinator that has left its record and lives commits, or leaves word that it goes on alone, within as long as the
#: service may be silent; this many times that is waited for it once the lease has ended.
_OUTAGES_WAITED: Final = 3.0


@dataclass(frozen=True)
class Outcome:
    """How a save ended on one rank.

    Attributes:
        state: How far it has come.
        reason: Why it is not further, or what was left undone.
        checkpoint: As the catalogue has it; None unless committed.
    """

    state: SaveState
    reason: str = ""
    checkpoint: types_pb2.Checkpoint | None = None


class Finisher:
    """Ends one rank's save. Used once, by one thread.

    Args:
        runtime: The session of this process.
        attempt: The attempt.
        files: The checkpoint's directory.
        submitter: The way to the service; None when there is none.
        timeout_s: How long to wait for the other ranks, seconds.
    """

    def __init__(
        self,
        runtime: Runtime,
        attempt: Attempt,
        files: CheckpointFiles,
        submitter: Submitter | None,
        *,
        timeout_s: float,
    ) -> None:
        self._runtime = runtime
        self._attempt = attempt
        self._files = files
        self._submitter = submitter
        self._timeout_s = timeout_s

    def follow(
        self, unregistered: str, closed: types_pb2.Checkpoint | None = None, *, until_committed: bool
    ) -> Outcome:
        """Ends the save of a rank that does not coordinate.

        Args:
            unregistered: Why this rank could not register; empty when it is.
            closed: The checkpoint when the answer to its registration brought it.
            until_committed: Wait for the coordinator's commit.

        Raises:
            RankFailedError, RanksMissingError, CheckpointClosedError: The attempt was closed without a commit.
        """
        if self._submitter is None or unregistered:
            return Outcome(SaveState.UNREGISTERED, unregistered)
        if not until_committed:
            return Outcome(SaveState.REGISTERED)
        if closed is not None and closed.state == types_pb2.CHECKPOINT_STATE_COMMITTED:
            return Outcome(SaveState.COMMITTED, checkpoint=closed)
        try:
            answer = self._await_close(self._submitter)
        except ShardbookError as error:
            if is_verdict(error):
                raise
            # It is registered, but whether that became a checkpoint nobody can say now.
            return Outcome(SaveState.UNREGISTERED, f"registered, the commit was not seen: {error.reason}: {error}")
        if answer is None:
            return Outcome(SaveState.UNREGISTERED, "registered, but the coordinator went on without the service")
        progress = answer.progress
        if progress.state == types_pb2.CHECKPOINT_STATE_COMMITTED:
            return Outcome(SaveState.COMMITTED, checkpoint=answer.checkpoint)
        raise self._not_committed(progress, answer.checkpoint)

    def _await_close(self, submitter: Submitter) -> pb.GetCheckpointProgressResponse | None:
        """Waits until the attempt is closed, or the time is over; None when the coordinator went on alone.

        A coordinator that cannot reach the service leaves word on storage: else those who can would wait for its
        commit, and it for them in the next save. One that was cut off for longer than its lease may come back and
        commit all the same, so an attempt that is EXPIRED counts as open for a while.

        Raises:
            RankFailedError: The coordinator is alone, and a rank left word that it failed.
            SessionFencedError: A later session has taken the part.
        """
        end_s = time.monotonic() + self._timeout_s
        slice_s, pause_s = self._attempt.first_wait_s, _FIRST_PAUSE_S
        expired_end_s: float | None = None
        while True:
            remaining_s = max(0.0, end_s - time.monotonic())
            answer = submitter.client.wait_until_closed(submitter.key, timeout_s=min(slice_s, remaining_s))
            is_expired = answer.progress.state == types_pb2.CHECKPOINT_STATE_EXPIRED
            if answer.HasField("checkpoint") and not is_expired:
                return answer
            if self._is_alone():
                raise_failure_of_others(self._files, self._attempt.prefix, submitter)
                return None
            if not is_expired:
                if remaining_s <= slice_s:
                    return answer
                expired_end_s, pause_s = None, _FIRST_PAUSE_S
                slice_s = min(2 * slice_s, _LONGEST_SLICE_S)
                continue
            if answer.progress.registered_count == 0:  # this rank had registered: somebody emptied the staging
                raise SessionFencedError(
                    f"a later session has taken {self._attempt.run}:{self._attempt.part} before step "
                    f"{self._attempt.step} was committed"
                )
            if expired_end_s is None and self._has_coordinators_record():
                expired_end_s = time.monotonic() + _OUTAGES_WAITED * self._runtime.config.outage_first_s
            left_s = min(end_s, expired_end_s or end_s) - time.monotonic()
            if left_s <= 0:
                return answer
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _is_alone(self) -> bool:
        with best_effort("look whether the coordinator is alone"):
            return is_alone(self._files, self._attempt.prefix)
        return False

    def _has_coordinators_record(self) -> bool:
        with best_effort("look for the coordinator's record"):
            return self._files.exists(names.record_path(self._attempt.prefix, 0))
        return False

    def _not_committed(self, progress: types_pb2.AttemptProgress, checkpoint: types_pb2.Checkpoint) -> ShardbookError:
        if progress.HasField("failure"):
            return rank_failed(progress.failure)
        if progress.state == types_pb2.CHECKPOINT_STATE_OPEN:
            ranks = ", ".join(f"{one.rank} ({one.host})" if one.host else str(one.rank) for one in progress.missing)
            return RanksMissingError(
                f"step {self._attempt.step} was not committed within {self._timeout_s:.0f} s; "
                f"{progress.world_size - progress.registered_count} ranks have not registered: {ranks}"
            )
        state = types_pb2.CheckpointState.Name(progress.state).removeprefix("CHECKPOINT_STATE_")
        why = f": {checkpoint.failure}" if checkpoint.failure else ""
        if progress.state == types_pb2.CHECKPOINT_STATE_EXPIRED:
            why = ": the coordinator, rank 0, has given no sign of life since its lease ended, and has not committed"
        return CheckpointClosedError(f"step {self._attempt.step} is {state}{why}", metadata={"state": state})

    def coordinate(
        self,
        record: RegistrationRecord,
        storage_meta: Callable[[], StorageMeta | None] | None,
        unregistered: str,
    ) -> Outcome:
        """Ends the save of rank 0: commits, then makes the directory enough on its own.

        Args:
            record: Rank 0's own.
            storage_meta: Makes DCP's storage meta for ``.metadata``; None writes no such file.
            unregistered: Why this rank could not register; empty when it is.

        Raises:
            RankFailedError, RanksMissingError, InvalidGeometryError, SessionFencedError, CheckpointClosedError: As
                the service, or the directory, says.
        """
        running = self._files.place, self._attempt.prefix
        self._runtime.catching_up.running.add(running)
        try:
            outcome = self._coordinate(record, storage_meta, unregistered)
        finally:
            self._runtime.catching_up.running.discard(running)
        is_committed = outcome.state is SaveState.COMMITTED
        exports = storage_meta is not None
        catch_up(self._runtime, self._files, self._attempt.step, is_committed=is_committed, exports=exports)
        return outcome

    def _coordinate(
        self,
        record: RegistrationRecord,
        storage_meta: Callable[[], StorageMeta | None] | None,
        unregistered: str,
    ) -> Outcome:
        checkpoint = None
        if self._submitter is not None and not unregistered:
            try:
                checkpoint = self._commit(self._submitter, record.said)
            except ShardbookError as error:
                if is_verdict(error):
                    raise explain(self._submitter, error) from error
                _LOG.warning("step %d was not committed, it stays on storage: %s", self._attempt.step, error)
                unregistered = f"{error.reason}: {error}"
        place = self._attempt.part, self._attempt.step
        missed = self._runtime.catching_up.unregistered
        if checkpoint is None:
            missed[place] = Waiting(self._attempt.path, self._attempt.prefix)
            return Outcome(SaveState.UNREGISTERED, self._describe_alone(record, storage_meta, unregistered))
        missed.pop(place, None)
        return Outcome(SaveState.COMMITTED, self._describe(record, storage_meta), checkpoint)

    def _commit(self, submitter: Submitter, said: bytes) -> types_pb2.Checkpoint:
        """Commits once every rank is registered, by itself or by the record it left."""
        request = pb.CommitCheckpointRequest(key=submitter.key, description=description_of(said))
        others = OtherRanks(submitter, self._attempt, self._files)
        end_s = time.monotonic() + self._timeout_s
        look_s = _FIRST_LOOK_S
        while True:
            limit_s = max(0.0, min(look_s, end_s - time.monotonic()))
            try:
                return submitter.client.commit_when_complete(request, timeout_s=limit_s).checkpoint
            except RanksMissingError:
                if not others.register() and time.monotonic() >= end_s:
                    raise
            look_s = min(2 * look_s, _LOOK_EVERY_S)

    def _describe(self, record: RegistrationRecord, storage_meta: Callable[[], StorageMeta | None] | None) -> str:
        """Writes manifest and ``.metadata`` of a committed attempt; returns what went wrong, which undoes nothing."""
        try:
            return "; ".join(publish(self._files, self._fold(record), self._exporter(storage_meta)))
        except Exception as error:  # noqa: BLE001 - filesystems raise what they like, and the checkpoint is committed
            _LOG.exception("step %d is committed, but its directory was not described", self._attempt.step)
            return f"the manifest was not written: {error}"

    def _describe_alone(
        self, record: RegistrationRecord, storage_meta: Callable[[], StorageMeta | None] | None, unregistered: str
    ) -> str:
        """Makes the directory enough without the service; returns why the save is unregistered, and what is missing.

        Raises:
            RankFailedError: A rank left word that it gave up.
            InvalidGeometryError: The ranks' chunks do not make whole tensors.
        """
        attempt = self._attempt
        if attempt.member.world_size > 1 and self._runtime.plain_client is not None:
            with best_effort("leave word that the coordinator goes on alone"):
                go_alone(self._files, attempt.prefix)
        absence = self._await_records(min(self._timeout_s, RECORDS_WAIT_S))
        if isinstance(absence, str):
            return f"{unregistered}; {absence}"
        if absence.failed:
            rank = min(absence.failed)
            raise rank_failed(failure_of(rank, absence.failed[rank]))
        if not absence.is_empty:
            self._runtime.catching_up.look_again_at(self._files)
            return f"{unregistered}; {absence}: the next load, save or sync that finds their records goes on"
        try:
            folded = self._fold(record)
            if folded.written_bytes and folded.unique_bytes and attempt.member.world_size > 1:
                _LOG.info(
                    "step %d was saved without the service, so nothing was deduplicated: %d bytes for %d, factor %.2f",
                    attempt.step,
                    folded.written_bytes,
                    folded.unique_bytes,
                    folded.written_bytes / folded.unique_bytes,
                )
            problems = publish(self._files, folded, self._exporter(storage_meta))
        except InvalidGeometryError:
            raise
        except Exception as error:  # noqa: BLE001 - filesystems raise what they like, and the data is on storage
            _LOG.exception("the directory of step %d was not described", attempt.step)
            problems = (f"the manifest was not written: {error}",)
        return "; ".join((unregistered, *problems))

    def _await_records(self, limit_s: float) -> Absence | str:
        """Waits for the other ranks' records; returns who is absent, or why that cannot be said."""
        end_s = time.monotonic() + limit_s
        pause_s = _FIRST_PAUSE_S
        prefix, world_size = self._attempt.prefix, self._attempt.member.world_size
        while True:
            told = "the directory was not looked at"
            with best_effort("look for the other ranks' records"):
                try:
                    return await_records(self._files, prefix, world_size, max(0.0, end_s - time.monotonic()))
                except Exception as error:
                    told = f"the directory cannot be looked at: {error}"
                    raise
            if time.monotonic() + pause_s > end_s:
                return told
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _fold(self, record: RegistrationRecord) -> FoldedAttempt:
        world_size = self._attempt.member.world_size
        records = [record] if world_size == 1 else read_records(self._files, self._attempt.prefix, world_size)
        absent = missing_ranks(records)
        if absent:
            raise RanksMissingError(f"records of ranks {absent[:10]} are gone from {self._attempt.path}")
        return fold(records)

    def _exporter(self, storage_meta: Callable[[], StorageMeta | None] | None) -> MakeMetadata | None:
        return None if storage_meta is None else exporter(self._attempt.path, self._attempt.prefix, storage_meta)
