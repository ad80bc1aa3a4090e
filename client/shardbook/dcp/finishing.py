"""The end of a save: commit, manifest, ``.metadata``; and what takes their place while the service is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from shardbook.core.fold import FoldedAttempt, fold, missing_ranks
from shardbook.core.manifest import RegistrationRecord
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.catching_up import Waiting, catch_up
from shardbook.dcp.directory import await_records, go_alone, is_alone, publish, read_record, read_records
from shardbook.dcp.metadata import build_metadata, default_header
from shardbook.dcp.results import SaveState
from shardbook.dcp.runtime import Runtime
from shardbook.dcp.submission import Submitter
from shardbook.dcp.writer import CheckpointFiles
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
from shardbook.v1 import types_pb2

_LOG = logging.getLogger(__name__)

#: How long a coordinator without the service waits for the other ranks' records, seconds.
RECORDS_WAIT_S: Final = 300.0
#: How long the coordinator waits for registrations before it looks for records of ranks that have no route, seconds.
_FIRST_LOOK_S: Final = 2.0
_LOOK_EVERY_S: Final = 10.0
#: How long a rank waits for the commit before it looks whether the coordinator went on alone, seconds.
_FIRST_SLICE_S: Final = 2.0
_LONGEST_SLICE_S: Final = 20.0

#: What telling the service about a failure may take, seconds.
_REPORT_S: Final = 5.0

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
    try:
        submitter.report(phase, error.message, _REPORT_S, about=error)
    except ShardbookError as failure:
        _LOG.warning("the other ranks could not be told that they disagree: %s", failure)


def explain(submitter: Submitter, error: ShardbookError) -> ShardbookError:
    """Returns the error that says why an attempt is closed, where the service knows it: the rank that failed."""
    if not isinstance(error, CheckpointClosedError):
        return error
    try:
        answer = submitter.client.get_progress(pb.GetCheckpointProgressRequest(key=submitter.key))
    except ShardbookError:
        return error
    return _rank_failed(answer.progress.failure) if answer.progress.HasField("failure") else error


def _rank_failed(failure: types_pb2.RankFailure) -> RankFailedError:
    where = f" on {failure.host}" if failure.host else ""
    return RankFailedError(
        f"rank {failure.rank}{where} failed to {failure.phase}: {failure.reason}",
        metadata={"rank": str(failure.rank), "host": failure.host, "phase": failure.phase},
    )


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

    def follow(self, unregistered: str, *, until_committed: bool) -> Outcome:
        """Ends the save of a rank that does not coordinate.

        Args:
            unregistered: Why this rank could not register; empty when it is.
            until_committed: Wait for the coordinator's commit.

        Raises:
            RankFailedError, RanksMissingError, CheckpointClosedError: The attempt was closed without a commit.
        """
        if self._submitter is None or unregistered:
            return Outcome(SaveState.UNREGISTERED, unregistered)
        if not until_committed:
            return Outcome(SaveState.REGISTERED)
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
        commit, and it for them in the next save.
        """
        end_s = time.monotonic() + self._timeout_s
        slice_s = _FIRST_SLICE_S
        while True:
            remaining_s = max(0.0, end_s - time.monotonic())
            answer = submitter.client.wait_until_closed(submitter.key, timeout_s=min(slice_s, remaining_s))
            if answer.HasField("checkpoint") or remaining_s <= slice_s:
                return answer
            if is_alone(self._files, self._attempt.prefix):
                return None
            slice_s = min(2 * slice_s, _LONGEST_SLICE_S)

    def _not_committed(self, progress: types_pb2.AttemptProgress, checkpoint: types_pb2.Checkpoint) -> ShardbookError:
        if progress.HasField("failure"):
            return _rank_failed(progress.failure)
        if progress.state == types_pb2.CHECKPOINT_STATE_OPEN:
            ranks = ", ".join(f"{one.rank} ({one.host})" if one.host else str(one.rank) for one in progress.missing)
            return RanksMissingError(
                f"step {self._attempt.step} was not committed within {self._timeout_s:.0f} s; "
                f"{progress.world_size - progress.registered_count} ranks have not registered: {ranks}"
            )
        state = types_pb2.CheckpointState.Name(progress.state).removeprefix("CHECKPOINT_STATE_")
        why = f": {checkpoint.failure}" if checkpoint.failure else ""
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
                checkpoint = self._commit(self._submitter)
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

    def _commit(self, submitter: Submitter) -> types_pb2.Checkpoint:
        """Commits once every rank is registered, by itself or by the record it left."""
        request = pb.CommitCheckpointRequest(key=submitter.key)
        end_s = time.monotonic() + self._timeout_s
        look_s = _FIRST_LOOK_S
        while True:
            limit_s = max(0.0, min(look_s, end_s - time.monotonic()))
            try:
                return submitter.client.commit_when_complete(request, timeout_s=limit_s).checkpoint
            except RanksMissingError:
                if not self._register_for_others(submitter) and time.monotonic() >= end_s:
                    raise
            look_s = _LOOK_EVERY_S

    def _register_for_others(self, submitter: Submitter) -> int:
        """Registers missing ranks whose record is on storage: they have no route to the service. Returns how many.

        DESIGN §7 records the whole for that. What is missing is enough: a registration is the same whoever sends it,
        and stays the same when its own rank sends it again.
        """
        answer = submitter.client.get_progress(pb.GetCheckpointProgressRequest(key=submitter.key))
        count = 0
        for missing in answer.progress.missing:
            try:
                record = read_record(self._files, self._attempt.prefix, missing.rank)
            except OSError as error:  # looked at again with the next round
                _LOG.warning("cannot look for the record of rank %d: %s", missing.rank, error)
                continue
            if record is not None:
                self._require_same(submitter, record)
                submitter.register(record)
                count += 1
        if count:
            _LOG.warning("%d ranks had no route to the service and were registered by the coordinator", count)
        return count

    def _require_same(self, submitter: Submitter, record: RegistrationRecord) -> None:
        """Refuses a record that a rank left for another save: both together would be a torn checkpoint."""
        own, other = self._attempt.identity(submitter.session), record.identity
        for name in ("run", "part", "step", "incarnation", "attempt", "world_size"):
            mine, its = getattr(own, name), getattr(other, name)
            if mine != its:
                error = InvalidArgumentError(
                    f"the ranks of this save disagree: rank {record.rank} said {name} {its!r}, this one says {mine!r}",
                    reason="ATTEMPT_MISMATCH",
                    field=name,
                )
                report_mismatch(submitter, "register", error)
                raise error

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
            go_alone(self._files, attempt.prefix)
        limit_s = min(self._timeout_s, RECORDS_WAIT_S)
        absence = await_records(self._files, attempt.prefix, attempt.member.world_size, limit_s)
        if absence.failed:
            raise RankFailedError(f"step {attempt.step}: {absence}", metadata={"rank": str(min(absence.failed))})
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
        except Exception as error:  # noqa: BLE001 - the records are there, so the save is not lost
            _LOG.exception("the directory of step %d was not described", attempt.step)
            problems = (f"the manifest was not written: {error}",)
        return "; ".join((unregistered, *problems))

    def _fold(self, record: RegistrationRecord) -> FoldedAttempt:
        world_size = self._attempt.member.world_size
        records = [record] if world_size == 1 else read_records(self._files, self._attempt.prefix, world_size)
        absent = missing_ranks(records)
        if absent:
            raise RanksMissingError(f"records of ranks {absent[:10]} are gone from {self._attempt.path}")
        return fold(records)

    def _exporter(
        self, storage_meta: Callable[[], StorageMeta | None] | None
    ) -> Callable[[FoldedAttempt], Metadata] | None:
        if storage_meta is None:
            return None
        make_meta = storage_meta

        def export(folded: FoldedAttempt) -> Metadata:
            prefix = folded.manifest.identity.prefix
            header = default_header(self._attempt.path, prefix)
            metadata = build_metadata(folded.structure, folded.located, prefix, header)
            if prefix == self._attempt.prefix:  # a newer attempt of somebody else's has an id of its own
                metadata.storage_meta = make_meta()
            return metadata

        return export
