"""One rank's save, phase by phase: plan, write, register, finish. No collective, no barrier, no store.

Only what the service says about this very save (a failed or missing rank, a later session, wrong geometry) is an
error; whatever else goes wrong with it, the save goes on without it, and the directory alone is enough.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from shardbook.config import Checksum
from shardbook.core import directory as names
from shardbook.core import limits
from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.extents import NO_CHECKSUM
from shardbook.core.manifest import RegistrationRecord
from shardbook.dcp._torch import StoragePrefix, silent_overwrite
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.checksums import WrittenChecksums
from shardbook.dcp.describing import milliseconds
from shardbook.dcp.directory import write_record
from shardbook.dcp.ending import result_of, tell_outage, unregistered
from shardbook.dcp.failing import raise_failure_of_others, tell_failure
from shardbook.dcp.finishing import Finisher, Outcome
from shardbook.dcp.items import PlannedItems, kept_items, plan_columns, structure_columns
from shardbook.dcp.planner import set_up_planner, warn_of_unsafe_entries
from shardbook.dcp.prepared import PreparedSave
from shardbook.dcp.results import SaveResult, SaveState, SaveStats
from shardbook.dcp.submission import EncodedPlan, Submitter, connect, make_record
from shardbook.dcp.verdicts import explain, is_mismatch, is_verdict, report_mismatch
from shardbook.dcp.writer import CheckpointFiles, reported
from shardbook.errors import (
    FailedPreconditionError,
    ForkedClientError,
    InvalidArgumentError,
    SessionFencedError,
    SessionUnknownError,
    ShardbookError,
)
from shardbook.stores import check_location
from shardbook.v1.types_pb2 import Checkpoint

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Written:
    """What was given to the storage writer and what it reported."""

    items: PlannedItems
    encoded: EncodedPlan
    kept: Int64Array
    final: SavePlan
    results: list[WriteResult]
    checksums: Int64Array | None


class RankSave:
    """One rank's save. Used once, by one thread.

    Args:
        prepared: The save; its attempt is counted.
    """

    #: The checkpoint's directory, once the writer is reset to it.
    _files: CheckpointFiles

    def __init__(self, prepared: PreparedSave) -> None:
        self._prepared = prepared
        self._runtime = prepared.runtime
        self._attempt = prepared.attempt
        self._writer = prepared.writer
        self._planner = prepared.planner
        self._early_files = prepared.files
        self._budget = self._runtime.breaker.start_save()
        self._submitter: Submitter | None = None
        #: The checkpoint, when the answer to the registration brought it.
        self._closed: Checkpoint | None = None
        #: When this rank began to register, and to wait for the others.
        self._registering_s = 0.0
        #: What this rank took to plan, to write and to leave its record, milliseconds.
        self._phase_ms: tuple[int, ...] = ()
        #: Why the service does not know of this save; empty while it does.
        self._unregistered = ""
        #: The session was found fenced before the data was written; raised once the data is on storage.
        self._fenced: SessionFencedError | None = None

    def run(self, state_dict: dict[str, Any]) -> SaveResult:
        """Saves a plain state dict; see ``shardbook.dcp.save`` for results and errors."""
        began_s = time.monotonic()
        self._submitter = self._connect()
        with self._reporting("plan"):
            if self._prepared.checkpoint_id is not None:
                self._writer.reset(self._prepared.checkpoint_id)
            self._files = self._early_files = CheckpointFiles.of(self._writer)
            local = self._local_plan(state_dict)
            items = plan_columns(local.items, local.planner_data)
            encoded = EncodedPlan.of(items.plan)
            dropped = self._decision(encoded)
        planned_s = time.monotonic()
        with self._reporting("write"):
            written = self._write(local, items, encoded, dropped)
            record = self._record(written)
        written_s = time.monotonic()
        with self._reporting("register"):
            write_record(self._files, record)
        self._phase_ms = milliseconds(began_s, planned_s, written_s, time.monotonic())
        if self._fenced is not None:
            raise self._fenced
        record = self._register(record)
        outcome = self._finish(record)
        stats = SaveStats(
            planned_count=items.plan.item_count,
            written_count=len(written.final.items),
            written_bytes=sum(result.size_in_bytes for result in written.results),
            sent_bytes=self._budget.sent_bytes,
            plan_s=planned_s - began_s,
            write_s=written_s - planned_s,
            finish_s=time.monotonic() - written_s,
        )
        return self._result(outcome, stats)

    def _connect(self) -> Submitter | None:
        """The way to the service, with the number of the session; None when there is none now."""
        try:
            check_location(self._attempt.location)
        except InvalidArgumentError as error:
            self._unregistered = f"{error.reason}: {error}"
            return None
        try:
            submitter = connect(self._runtime, self._attempt, self._budget)
        except ForkedClientError:
            raise
        except SessionFencedError as error:
            self._fenced = error
            return None
        except ShardbookError as error:
            self._go_without(error)
            submitter = None
        else:
            if submitter is None:
                self._unregistered = f"mode {self._runtime.session.mode}"
        if self._attempt.member.is_coordinator:
            self._runtime.start_keeping(self._attempt.part)
        return submitter

    def _reconnect(self, lost: Submitter) -> Submitter:
        """The way to the service after it has forgotten the session: under another number, the same incarnation's.

        Raises:
            ShardbookError: There is none.
        """
        self._runtime.forget_session(self._attempt.part, lost.session)
        self._submitter = connect(self._runtime, self._attempt, self._budget) or lost
        return self._submitter

    def _go_without(self, error: ShardbookError) -> None:
        """Notes that the save goes on without the service, at least for this call.

        Said once an outage, and aloud by one rank: thousands of them would say the same, save after save.
        """
        level = logging.WARNING if self._attempt.member.is_coordinator else logging.INFO
        tell_outage(_LOG, level, self._runtime, self._attempt, error)
        self._unregistered = f"{error.reason}: {error}"

    @contextmanager
    def _reporting(self, phase: str) -> Iterator[None]:
        """Says on behalf of the other ranks' patience that this rank cannot finish, then lets the error pass."""
        try:
            yield
        except BaseException as error:
            if not is_verdict(error):
                tell_failure(self._attempt, self._submitter, self._early_files, phase, error)
            raise

    def _local_plan(self, state_dict: dict[str, Any]) -> SavePlan:
        member = self._attempt.member
        set_up_planner(self._planner, state_dict, self._writer.storage_meta(), is_coordinator=member.is_coordinator)
        self._writer.set_up_storage_writer(member.is_coordinator, rank=member.rank, use_collectives=True)
        with silent_overwrite(self._writer):
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _decision(self, encoded: EncodedPlan) -> BoolArray | None:
        """Which items other ranks write; None when nobody decided: then this rank writes them all, never fewer."""
        if self._attempt.member.world_size == 1 or self._submitter is None:
            return None
        try:
            try:
                dropped = self._await_decision(self._submitter, encoded)
            except SessionUnknownError:
                dropped = self._await_decision(self._reconnect(self._submitter), encoded)
        except SessionFencedError as error:
            self._fenced = error
            return None
        except ShardbookError as error:
            self._raise_verdict("plan", self._submitter, error)
            self._go_without(error)
            return None
        if dropped is None:
            _LOG.warning(
                "not every rank planned step %d: this rank writes its whole plan, duplicates included",
                self._attempt.step,
            )
        return dropped

    def _await_decision(self, submitter: Submitter, encoded: EncodedPlan) -> BoolArray | None:
        """Waits for the other ranks' plans; no longer once a rank has left its record without having planned.

        Raises:
            RankFailedError: A rank left word that it failed.
            ShardbookError: What the server answered, or that it did not.
        """
        end_s = time.monotonic() + min(self._runtime.config.plan_wait_s, self._prepared.options.timeout_s)
        slice_s = self._attempt.first_wait_s
        to_lowest_rank = bool(self._planner.dedup_save_to_lowest_rank)
        while True:
            remaining_s = max(0.0, end_s - time.monotonic())
            dropped = submitter.plan(encoded, to_lowest_rank=to_lowest_rank, timeout_s=min(slice_s, remaining_s))
            if dropped is not None or remaining_s <= slice_s:
                return dropped
            left = raise_failure_of_others(self._files, self._attempt.prefix, submitter)
            if any(names.rank_of_record(name) is not None for name in left):
                return dropped
            slice_s = min(2 * slice_s, limits.MAX_WAIT_S)

    def _write(self, local: SavePlan, items: PlannedItems, encoded: EncodedPlan, dropped: BoolArray | None) -> _Written:
        member, prefix = self._attempt.member, self._attempt.prefix
        kept = np.arange(len(local.items)) if dropped is None else np.flatnonzero(~dropped)
        plan = dataclasses.replace(
            local,
            items=[local.items[row] for row in kept.tolist()],
            storage_data=StoragePrefix(f"{prefix}/__{member.rank}_"),
        )
        final = self._planner.finish_plan(plan)
        found = kept_items(local.items, final.items)
        if found is None:  # the planner gave the writer items that it had not planned: they are a plan of their own
            items = plan_columns(final.items, final.planner_data)
            encoded = EncodedPlan.of(items.plan)
            found = np.arange(len(final.items), dtype=np.int64)
        else:
            final = dataclasses.replace(final, items=[local.items[row] for row in found.tolist()])
        self._refuse_another_ones_files()
        results: list[WriteResult] = []
        checksums = None
        if final.items:  # a rank without items writes no file
            self._files.make_directory(prefix)
            warn_of_unsafe_entries(self._planner, final.items, self._runtime.checked_entries)
            results, checksums = self._write_data(final)
            self._files.sync_directory(prefix)
        return _Written(items, encoded, found.astype(np.int64), final, results, checksums)

    def _write_data(self, plan: SavePlan) -> tuple[list[WriteResult], Int64Array | None]:
        """Returns what the writer reports, and checksums of it in the same order where some are to be kept."""
        if self._prepared.checksum is Checksum.NONE:
            return reported(self._writer.write_data(plan, self._planner)), None
        written = WrittenChecksums(self._writer)
        with written.watching():
            results = reported(self._writer.write_data(plan, self._planner))
        checksums = written.of(results)
        unchecked_count = int((checksums == NO_CHECKSUM).sum())
        if unchecked_count and not self._runtime.unchecked_told:
            self._runtime.unchecked_told = True
            _LOG.warning(
                "step %d: %d of %d items have no checksum: %s does not write them one by one into streams of its "
                "filesystem. Said once",
                self._attempt.step,
                unchecked_count,
                len(results),
                type(self._writer).__qualname__,
            )
        return results, checksums

    def _refuse_another_ones_files(self) -> None:
        """A session that was carried over a restart would count its attempts anew and overwrite its own files."""
        member, prefix = self._attempt.member, self._attempt.prefix
        for path in (f"{prefix}/__{member.rank}_0.distcp", names.record_path(prefix, member.rank)):
            if self._files.exists(path):
                raise FailedPreconditionError(
                    f"{path} is there already: this session was used before a restart. A restarted job calls "
                    "shardbook.dcp.init for a session of its own",
                    reason="ATTEMPT_EXISTS",
                )

    def _record(self, written: _Written) -> RegistrationRecord:
        structure, extents = structure_columns(
            written.items.plan,
            written.kept,
            written.final.items,
            written.results,
            rank=self._attempt.member.rank,
            prefix=self._attempt.prefix,
            checksums=written.checksums,
        )
        return make_record(
            self._attempt,
            0 if self._submitter is None else self._submitter.session,
            written.encoded,
            structure,
            extents,
            (written.items.requires_grad, written.items.pin_memory),
            self._prepared.record_said(),
        )

    def _register(self, record: RegistrationRecord) -> RegistrationRecord:
        """Registers what was written; returns the record, which says so under the session that it is registered in."""
        self._registering_s = time.monotonic()
        if self._submitter is None:
            return record
        # One call both registers and waits; the coordinator has the commit to make.
        waits = self._prepared.options.wait == "committed" and not self._attempt.member.is_coordinator
        wait_s = min(self._prepared.options.timeout_s, self._attempt.first_wait_s) if waits else 0.0
        try:
            try:
                self._closed = self._submitter.register(record, wait_s=wait_s, phase_ms=self._phase_ms)
            except SessionUnknownError:
                submitter = self._reconnect(self._submitter)
                self._closed = submitter.register(record, wait_s=wait_s, phase_ms=self._phase_ms)
                record = self._of_new_session(record, self._submitter.session)
            self._prepared.on_registered()
            self._runtime.outage_told = False
            self._unregistered = ""  # what went wrong before cost some duplicates, no more
        except ShardbookError as error:
            self._raise_verdict("register", self._submitter, error)
            self._go_without(error)
        return record

    def _of_new_session(self, record: RegistrationRecord, session: int) -> RegistrationRecord:
        """Replaces the record on storage by one of the session that took the lost one's place."""
        moved = dataclasses.replace(record, identity=dataclasses.replace(record.identity, session=session))
        with best_effort("say on storage which session the save belongs to"):
            write_record(self._files, moved)
            return moved
        return record

    def _raise_verdict(self, phase: str, submitter: Submitter, error: ShardbookError) -> None:
        """Raises what the service says about this very save; whatever else it is, the save goes on without it."""
        if is_mismatch(error):
            report_mismatch(submitter, phase, error)
        if is_verdict(error):
            raise explain(submitter, error) from error

    def _finish(self, record: RegistrationRecord) -> Outcome:
        options = self._prepared.options
        timeout_s = options.timeout_s
        if not self._attempt.member.is_coordinator:  # its registration has waited for the others already
            timeout_s = max(0.0, timeout_s - (time.monotonic() - self._registering_s))
        finisher = Finisher(self._runtime, self._attempt, self._files, self._submitter, timeout_s=timeout_s)
        if self._attempt.member.is_coordinator:
            export = self._writer.storage_meta if options.export_metadata else None
            return finisher.coordinate(record, export, self._unregistered)
        return finisher.follow(self._unregistered, self._closed, until_committed=options.wait == "committed")

    def _result(self, outcome: Outcome, stats: SaveStats) -> SaveResult:
        if outcome.state is SaveState.UNREGISTERED and self._prepared.options.strict:
            raise unregistered(self._attempt, outcome.reason)
        self._prepared.note_end(outcome.state)
        return result_of(self._attempt, outcome.state, outcome.checkpoint, outcome.reason, stats)
