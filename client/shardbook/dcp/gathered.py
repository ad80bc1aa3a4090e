"""The end of a save by torch's own ``save``: the coordinator has all that its collectives gathered, describes the
directory and records the whole attempt in one go.

Nothing that the service says, or does not say, raises here: the data is on storage, and the directory is enough.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from shardbook.breaker import is_outage
from shardbook.core import directory as names
from shardbook.core.columns import Int64Array
from shardbook.core.description import with_origins
from shardbook.core.extents import NO_CHECKSUM
from shardbook.core.fold import FoldedAttempt, fold_decoded
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.structure import RankStructure
from shardbook.dcp._torch import CURRENT_DCP_VERSION, StorageInfo
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.catching_up import Waiting, catch_up
from shardbook.dcp.describing import milliseconds
from shardbook.dcp.directory import exporter, publish
from shardbook.dcp.ending import result_of, tell_outage, unregistered
from shardbook.dcp.importing import encode_slices
from shardbook.dcp.items import plan_columns, structure_columns
from shardbook.dcp.results import SaveResult, SaveState, SaveStats
from shardbook.dcp.runtime import Runtime
from shardbook.dcp.slices import MetadataSlice, slice_metadata
from shardbook.dcp.submission import Submitter, connect
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import (
    SessionFencedError,
    SessionUnknownError,
    ShardbookError,
    UnsupportedMetadataError,
)
from shardbook.recording import record_attempt
from shardbook.stores import check_location, encodable
from shardbook.v1.types_pb2 import Checkpoint

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredResult(WriteResult):
    """What a storage writer reported of an item, and what was measured meanwhile.

    Attributes:
        checksum: CRC32C of the item's bytes, or NO_CHECKSUM.
        took_ms: What the rank took to plan and to write everything, milliseconds; on its first result alone.
    """

    checksum: int = NO_CHECKSUM
    took_ms: tuple[int, ...] = ()


class GatheredSave:
    """Ends a save on its coordinator. Used once, by one thread.

    Args:
        runtime: The session of this process.
        attempt: The attempt.
        writer: The storage writer.
        plans: Every rank's part of the global plan.
        is_dcps: The global plan is DCP's own, so that plans and results say all that the metadata does.
        said: What is said of the checkpoint, see ``shardbook.core.description``.
    """

    def __init__(
        self,
        runtime: Runtime,
        attempt: Attempt,
        writer: FileSystemWriter,
        plans: Sequence[SavePlan],
        *,
        is_dcps: bool,
        said: bytes = b"",
    ) -> None:
        self._runtime = runtime
        self._attempt = attempt
        self._writer = writer
        self._files = CheckpointFiles.of(writer)
        self._plans = plans
        self._is_dcps = is_dcps
        self._said = said
        self._phase_ms: list[tuple[int, ...]] = []
        self._budget = runtime.breaker.start_save()
        self._origins = runtime.origins_of(attempt.part)
        #: Why the catalogue does not have the save, as it was raised where it was.
        self._error: Exception | None = None
        self._reason = ""
        self._checkpoint: Checkpoint | None = None

    def finish(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]], *, strict: bool) -> SaveResult:
        """Describes the directory, then records the attempt.

        Args:
            metadata: The planner's; completed as DCP's writers do.
            results: What every rank's storage writer reported.
            strict: Raise where the catalogue does not have the save.

        Raises:
            OSError: Nothing could be written that says where the data lies.
            SessionFencedError: ``strict``, and a later session holds the run.
            UnregisteredError: ``strict``, and the service did not record the save.
        """
        began_s = time.monotonic()
        self._complete(metadata, results)
        submitter = self._connect()
        try:
            folded = self._folded(metadata, results, 0 if submitter is None else submitter.session)
            problems = self._publish(folded)
            self._phase_ms = _phases_of_ranks(results, describing_ms=milliseconds(began_s, time.monotonic())[0])
        except Exception as error:  # noqa: BLE001 - plain DCP would have saved what cannot be described here
            self._write_plainly(metadata, error)
            problems = ()
        else:
            if submitter is not None:
                self._record(submitter, folded)
        self._note_end()
        result = self._result(problems, SaveStats(sent_bytes=self._budget.sent_bytes, finish_s=_since(began_s)))
        if strict:
            self._raise_unregistered(result)
        return result

    def _complete(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
        """Does to the planner's metadata what DCP's writers do; ``save`` returns it."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {one.index: one.storage_data for of_rank in results for one in of_rank}
        metadata.storage_meta = self._writer.storage_meta()

    def _connect(self) -> Submitter | None:
        """The way to the service, with the number of the session; None when there is none now."""
        try:
            check_location(self._attempt.location)
            submitter = connect(self._runtime, self._attempt, self._budget)
        except Exception as error:  # noqa: BLE001 - whatever it is, the data is on storage
            self._go_without(error)
            return None
        if submitter is None:
            self._reason = f"mode {self._runtime.session.mode}"
        self._runtime.start_keeping(self._attempt.part)
        return submitter

    def _folded(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]], session: int) -> FoldedAttempt:
        """The attempt as columns: rank by rank where that says all, else cut from the metadata as an import is.

        Raises:
            ShardbookError: It cannot be described exactly.
        """
        identity = self._attempt.identity(session)
        said = with_origins(self._said, self._origins) if self._origins else self._said
        if self._is_dcps:
            return _fold(identity, _slices_of_ranks(self._plans, results, self._attempt.prefix), said=said)
        sliced = slice_metadata(_below(metadata, self._attempt.prefix))
        return _fold(identity, sliced.slices, sliced.header, said=said)

    def _publish(self, folded: FoldedAttempt) -> tuple[str, ...]:
        attempt = self._attempt
        export = exporter(attempt.path, attempt.prefix, self._writer.storage_meta)
        return publish(self._files, folded, export)

    def _write_plainly(self, metadata: Metadata, error: Exception) -> None:
        """Leaves what plain DCP would have left, of what has no manifest."""
        _LOG.warning(
            "step %d is loadable with DCP's own .metadata, and cannot be in the catalogue: %s",
            self._attempt.step,
            encodable(str(error)),
            exc_info=not isinstance(error, (OSError, ShardbookError)),
        )
        self._fail(error)
        self._files.write(names.DCP_METADATA, pickle.dumps(metadata))

    def _record(self, submitter: Submitter, folded: FoldedAttempt) -> None:
        """Records the attempt; under the session's new number where the service has forgotten it."""
        try:
            try:
                self._send(submitter, folded)
            except SessionUnknownError:
                self._runtime.forget_session(self._attempt.part, submitter.session)
                again = connect(self._runtime, self._attempt, self._budget) or submitter
                manifest = replace(folded.manifest, identity=self._attempt.identity(again.session))
                folded = replace(folded, manifest=manifest)
                self._publish(folded)
                self._send(again, folded)
        except Exception as error:  # noqa: BLE001 - the directory is enough
            self._go_without(error)

    def _send(self, submitter: Submitter, folded: FoldedAttempt) -> None:
        location = self._attempt.location
        # Of metadata that is cut anew no registration is a rank's.
        phase_ms = self._phase_ms if self._is_dcps else ()
        self._checkpoint = record_attempt(
            submitter.client, folded.manifest, location, recovered=False, phase_ms=phase_ms
        )
        self._runtime.outage_told = False
        self._runtime.origins.note_recorded(self._origins)

    def _go_without(self, error: Exception) -> None:
        """Notes why the catalogue lacks the save; an outage is told once."""
        self._fail(error)
        if not is_outage(error):
            is_ours = isinstance(error, ShardbookError)
            _LOG.warning("step %d is on storage only: %s", self._attempt.step, self._reason, exc_info=not is_ours)
        else:
            tell_outage(_LOG, logging.WARNING, self._runtime, self._attempt, error)

    def _fail(self, error: Exception) -> None:
        name = error.reason if isinstance(error, ShardbookError) else type(error).__name__
        self._error, self._reason = error, encodable(f"{name}: {error}")

    def _note_end(self) -> None:
        """Has later saves record this one, or does what is left to do for earlier ones."""
        attempt, left = self._attempt, self._runtime.catching_up.unregistered
        is_committed = self._checkpoint is not None
        if is_committed:
            left.pop((attempt.part, attempt.step), None)
        else:
            left[attempt.part, attempt.step] = Waiting(attempt.path, attempt.prefix)
        catch_up(self._runtime, self._files, attempt.step, is_committed=is_committed, exports=True)

    def _result(self, problems: Sequence[str], stats: SaveStats) -> SaveResult:
        state = SaveState.UNREGISTERED if self._checkpoint is None else SaveState.COMMITTED
        reason = "; ".join(filter(None, (self._reason, *problems)))
        return result_of(self._attempt, state, self._checkpoint, reason, stats)

    def _raise_unregistered(self, result: SaveResult) -> None:
        if result.state is SaveState.COMMITTED:
            return
        if isinstance(self._error, SessionFencedError):
            raise self._error
        raise unregistered(self._attempt, result.reason) from self._error


def _since(began_s: float) -> float:
    return time.monotonic() - began_s


def _slices_of_ranks(
    plans: Sequence[SavePlan], results: Sequence[Sequence[WriteResult]], prefix: str
) -> list[MetadataSlice]:
    """What every rank would have registered: what it wrote of its plan, which a planner may have had it leave out."""
    slices = []
    for rank, (plan, written) in enumerate(zip(plans, results, strict=True)):
        indices = {one.index for one in written}
        items = [item for item in plan.items if item.index in indices]
        columns = plan_columns(items, plan.planner_data)
        structure, extents = structure_columns(
            columns.plan,
            np.arange(len(items), dtype=np.int64),
            items,
            written,
            rank=rank,
            prefix=prefix,
            checksums=_checksums(written),
        )
        slices.append(MetadataSlice(structure, extents, columns.requires_grad, columns.pin_memory))
    return slices


def _checksums(written: Sequence[WriteResult]) -> Int64Array | None:
    """(len(written),) checksums; None when there is none."""
    sums = [one.checksum if isinstance(one, MeasuredResult) else NO_CHECKSUM for one in written]
    found = np.array(sums, dtype=np.int64)
    return found if (found != NO_CHECKSUM).any() else None


def _phases_of_ranks(results: Sequence[Sequence[WriteResult]], *, describing_ms: int) -> list[tuple[int, ...]]:
    """What every rank took to plan, to write and to describe; empty for who wrote nothing."""
    firsts = [next((one for one in of_rank if isinstance(one, MeasuredResult)), None) for of_rank in results]
    return [
        () if one is None or not one.took_ms else (*one.took_ms, 0 if rank else describing_ms)
        for rank, one in enumerate(firsts)
    ]


def _below(metadata: Metadata, prefix: str) -> Metadata:
    """Returns metadata whose paths are relative to the attempt's directory, so that its structure stays the same."""
    moved = Metadata.__new__(type(metadata))
    vars(moved).update(vars(metadata))
    moved.storage_data = {}
    for index, info in (metadata.storage_data or {}).items():
        if not info.relative_path.startswith(f"{prefix}/"):
            raise UnsupportedMetadataError(f"{info.relative_path!a} is not in {prefix}", field="metadata")
        # Attributes as the info's pickle has them, which leaves out descriptors that are None.
        kept = {name: value for name, value in vars(info).items() if value is not None}
        inside = moved.storage_data[index] = StorageInfo.__new__(StorageInfo)
        vars(inside).update(kept, relative_path=info.relative_path[len(prefix) + 1 :])
    return moved


def _fold(
    identity: AttemptIdentity, slices: Sequence[MetadataSlice], header: bytes = b"", *, said: bytes = b""
) -> FoldedAttempt:
    content = encode_slices(slices, header)
    distinct: dict[bytes, RankStructure] = {}
    for digest, one in zip(content.structure_digests, slices, strict=True):
        distinct.setdefault(digest, one.structure)
    return fold_decoded(
        identity, list(distinct.values()), content.structure_digests, content.pairs, content.blobs, header, said=said
    )


__all__ = ["GatheredSave", "MeasuredResult"]
