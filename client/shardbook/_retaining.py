"""The calls of CatalogService about what is kept: deletion, holds, retention policies, lost data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from shardbook import _reading
from shardbook._targets import etag_of, resource_name
from shardbook._times import datetime_of
from shardbook._transport import Rpc, Transport
from shardbook.catalog import Checkpoint
from shardbook.core.limits import MAX_PAGE_SIZE, MAX_PRUNED
from shardbook.core.names import CheckpointName, PartName, RunName
from shardbook.core.retention import KeepBest, RetentionPolicy
from shardbook.descriptions import Hold, PruneDecision, StoredPolicy
from shardbook.errors import NotFoundError
from shardbook.v1 import catalog_pb2
from shardbook.v1 import retention_pb2 as pb

DELETE_CHECKPOINT = Rpc("DeleteCheckpoint", lambda on: on.catalog.DeleteCheckpoint)
UNDELETE_CHECKPOINT = Rpc("UndeleteCheckpoint", lambda on: on.catalog.UndeleteCheckpoint)
HOLD_CHECKPOINT = Rpc("HoldCheckpoint", lambda on: on.catalog.HoldCheckpoint)
RELEASE_CHECKPOINT = Rpc("ReleaseCheckpoint", lambda on: on.catalog.ReleaseCheckpoint)
GET_RETENTION_POLICY = Rpc("GetRetentionPolicy", lambda on: on.catalog.GetRetentionPolicy)
SET_RETENTION_POLICY = Rpc("SetRetentionPolicy", lambda on: on.catalog.SetRetentionPolicy)
PREVIEW_PRUNE = Rpc("PreviewPrune", lambda on: on.catalog.PreviewPrune)
PRUNE = Rpc("Prune", lambda on: on.catalog.Prune)
REPORT_MISSING_DATA = Rpc("ReportMissingData", lambda on: on.catalog.ReportMissingData)
RECORD_FILE_DELETION = Rpc("RecordFileDeletion", lambda on: on.catalog.RecordFileDeletion)


class RetainingCalls:
    """What is kept and what is deleted. Every call may be made again: the same again changes nothing. Thread-safe.

    No call touches a data file: see ``shardbook.deleting``.
    """

    _transport: Transport

    def delete_checkpoint(
        self,
        name: CheckpointName | str,
        *,
        force: bool = False,
        delete_files: bool = False,
        etag: str | None = None,
        deadline_s: float | None = None,
    ) -> tuple[Checkpoint, tuple[str, ...]]:
        """Deletes a committed checkpoint from the catalogue; until it is purged it can be brought back.

        Args:
            name: The checkpoint.
            force: Delete one, too, that ``latest`` or a protected alias means.
            delete_files: The caller goes on to delete its data files, see ``shardbook.deleting``: it cannot be brought
                back.
            etag: The checkpoint's as it was read; where it is another by now, nothing is done. None: however it is.
            deadline_s: Seconds for the call.

        Returns:
            The checkpoint, and the names of the aliases that went with it.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not committed, or it is held (``CHECKPOINT_HELD``), what ``latest`` means
                (``LATEST_CHECKPOINT``), or a protected alias (``ALIAS_PROTECTED``).
            AbortedError: It has another etag by now.
        """
        full_name = self._full_name(name, deadline_s)
        request = pb.DeleteCheckpointRequest(name=full_name, force=force, delete_files=delete_files, etag=etag_of(etag))
        answer = self._transport.write(DELETE_CHECKPOINT, request, deadline_s=deadline_s)
        return Checkpoint.of(answer.checkpoint), tuple(answer.deleted_aliases)

    def _full_name(self, name: CheckpointName | str, deadline_s: float | None) -> str:
        """Returns the name that means the same checkpoint for ever, deleted or not.

        A deletion changes what ``latest``, or a step, means: made again by another name after its answer was lost, it
        would take the next checkpoint.
        """
        parsed = name if isinstance(name, CheckpointName) else CheckpointName.parse(name)
        if parsed.id.attempt is not None and (parsed.id.session or parsed.id.incarnation):
            return str(parsed)
        request = catalog_pb2.GetCheckpointRequest(name=str(parsed))
        try:
            found = self._transport.call(_reading.GET_CHECKPOINT, request, deadline_s=deadline_s).checkpoint
        except NotFoundError as error:
            if error.reason != "CHECKPOINT_DELETED":
                raise
            return error.metadata["name"]
        return found.name

    def undelete_checkpoint(self, name: CheckpointName | str, *, deadline_s: float | None = None) -> Checkpoint:
        """Brings a deleted checkpoint back.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: Its files were deleted (``FILES_DELETED``), or it was purged
                (``CHECKPOINT_PURGED``).
        """
        request = pb.UndeleteCheckpointRequest(name=resource_name(name))
        return Checkpoint.of(self._transport.write(UNDELETE_CHECKPOINT, request, deadline_s=deadline_s).checkpoint)

    def hold_checkpoint(
        self, name: CheckpointName | str, holder: str, ttl_s: float, *, deadline_s: float | None = None
    ) -> tuple[Checkpoint, Hold]:
        """Keeps a checkpoint from being deleted for some time from now; extends a hold of the same holder.

        Args:
            name: The checkpoint; an alias is held as what it means now, which the answer says.
            holder: Who needs it, such as ``eval-7``.
            ttl_s: For how long, seconds; at most 30 days.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: There is no such checkpoint, or it was deleted.
            FailedPreconditionError: It is not committed.
            InvalidArgumentError: The time or the holder is not valid.
        """
        request = pb.HoldCheckpointRequest(name=resource_name(name), holder=holder)
        request.ttl.FromMicroseconds(round(ttl_s * 1e6))
        answer = self._transport.write(HOLD_CHECKPOINT, request, deadline_s=deadline_s)
        return Checkpoint.of(answer.checkpoint), Hold.of(answer.hold)

    def release_checkpoint(
        self, name: CheckpointName | str, holder: str, *, deadline_s: float | None = None
    ) -> Checkpoint:
        """Ends a hold; one that is not there is no error.

        Raises:
            NotFoundError: There is no such checkpoint.
        """
        request = pb.ReleaseCheckpointRequest(name=resource_name(name), holder=holder)
        return Checkpoint.of(self._transport.write(RELEASE_CHECKPOINT, request, deadline_s=deadline_s).checkpoint)

    def get_retention_policy(
        self, run: RunName | str, *, part: str | None = None, deadline_s: float | None = None
    ) -> RetentionPolicy | None:
        """Returns what is kept of a part, or of the parts of a run without a policy of their own; None for nothing.

        Raises:
            NotFoundError: There is no such run.
        """
        return self.get_stored_policy(run, part=part, deadline_s=deadline_s).policy

    def get_stored_policy(
        self, run: RunName | str, *, part: str | None = None, deadline_s: float | None = None
    ) -> StoredPolicy:
        """Returns what ``get_retention_policy`` does, where it is from, and its etag.

        Raises:
            NotFoundError: There is no such run.
        """
        request = pb.GetRetentionPolicyRequest(name=_parent(run, part))
        answer = self._transport.call(GET_RETENTION_POLICY, request, deadline_s=deadline_s)
        policy = _policy(answer.policy) if answer.HasField("policy") else None
        return StoredPolicy(policy, answer.inherited, datetime_of(answer.update_time), answer.etag)

    def set_retention_policy(
        self,
        run: RunName | str,
        policy: RetentionPolicy | None,
        *,
        part: str | None = None,
        etag: str | None = None,
        deadline_s: float | None = None,
    ) -> RetentionPolicy | None:
        """Stores what ``prune`` keeps of a part, or of a run, when it is told nothing; None removes it.

        Raises:
            NotFoundError: There is no such run or part.
            InvalidArgumentError: The policy is not valid.
            AbortedError: ``get_stored_policy`` of the same place gives another etag than ``etag``.
        """
        request = pb.SetRetentionPolicyRequest(name=_parent(run, part), policy=_message(policy), etag=etag_of(etag))
        answer = self._transport.write(SET_RETENTION_POLICY, request, deadline_s=deadline_s)
        return _policy(answer.policy) if answer.HasField("policy") else None

    def preview_prune(
        self,
        run: RunName | str,
        policy: RetentionPolicy | None = None,
        *,
        part: str | None = None,
        page_size: int = MAX_PAGE_SIZE,
        deadline_s: float | None = None,
    ) -> Iterator[PruneDecision]:
        """Yields what becomes of each checkpoint under a policy, part by part, newest session and step first.

        Args:
            run: The run.
            policy: What to keep; None for the stored policies.
            part: One part; None for all.
            page_size: Decisions a call, at most 1,000.
            deadline_s: Seconds for each page.

        Raises:
            NotFoundError: There is no such run or part.
            FailedPreconditionError: No policy is stored (``NO_POLICY``).
            InvalidArgumentError: The policy has no rule.
        """
        request = pb.PreviewPruneRequest(parent=_parent(run, part), page_size=page_size, policy=_message(policy))
        for page in self._transport.pages(PREVIEW_PRUNE, request, deadline_s=deadline_s):
            yield from map(PruneDecision.of, page.decisions)

    def prune(
        self,
        run: RunName | str,
        names: Iterable[str],
        policy: RetentionPolicy | None = None,
        *,
        part: str | None = None,
        delete_files: bool = False,
        deadline_s: float | None = None,
    ) -> Iterator[PruneDecision]:
        """Deletes those of some checkpoints that a policy still does not keep; yields what became of each.

        Args:
            run: The run.
            names: Names of checkpoints, as ``preview_prune`` yielded them.
            policy: As for ``preview_prune``.
            part: As for ``preview_prune``.
            delete_files: As for ``delete_checkpoint``.
            deadline_s: Seconds for each 500 of them.

        Raises:
            As ``preview_prune`` does.
        """
        every = list(names)
        for at in range(0, len(every), MAX_PRUNED):
            request = pb.PruneRequest(
                parent=_parent(run, part),
                policy=_message(policy),
                names=every[at : at + MAX_PRUNED],
                delete_files=delete_files,
            )
            answer = self._transport.write(PRUNE, request, deadline_s=deadline_s)
            yield from map(PruneDecision.of, answer.decisions)

    def report_missing_data(
        self, name: CheckpointName | str, *, missing: bool, deadline_s: float | None = None
    ) -> Checkpoint:
        """Notes that data files of a committed checkpoint are lost, or that all were found again.

        Raises:
            NotFoundError: There is no such checkpoint, or it was deleted.
            FailedPreconditionError: It is not committed.
        """
        request = pb.ReportMissingDataRequest(name=resource_name(name), missing=missing)
        return Checkpoint.of(self._transport.write(REPORT_MISSING_DATA, request, deadline_s=deadline_s).checkpoint)

    def record_file_deletion(
        self,
        name: CheckpointName | str,
        *,
        locations: Sequence[str] = (),
        done: bool,
        deadline_s: float | None = None,
    ) -> tuple[Checkpoint, tuple[str, ...]]:
        """Notes that the data files of a deleted checkpoint are about to be deleted, or are gone.

        Args:
            name: Full name of the checkpoint.
            locations: What else means its directory on this machine.
            done: False before the first file goes, True after the last one.
            deadline_s: Seconds for the call.

        Returns:
            The checkpoint, and the names of others there whose files are needed.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not deleted (``NOT_DELETED``), or was purged (``CHECKPOINT_PURGED``).
        """
        request = pb.RecordFileDeletionRequest(name=resource_name(name), locations=locations, done=done)
        answer = self._transport.call(RECORD_FILE_DELETION, request, deadline_s=deadline_s)
        return Checkpoint.of(answer.checkpoint), tuple(answer.sharing)


def _parent(run: RunName | str, part: str | None) -> str:
    name = run if isinstance(run, RunName) else RunName.parse(run)
    return f"{name}/parts/-" if part is None else str(PartName(name, part))


def _message(policy: RetentionPolicy | None) -> pb.RetentionPolicy | None:
    if policy is None:
        return None
    message = pb.RetentionPolicy(
        keep_last=policy.keep_last,
        keep_every=policy.keep_every,
        keep_best=[pb.KeepBest(**vars(one)) for one in policy.keep_best],
    )
    if policy.newer_than_s:
        message.newer_than.FromSeconds(policy.newer_than_s)
    return message


def _policy(message: pb.RetentionPolicy) -> RetentionPolicy:
    return RetentionPolicy(
        keep_last=message.keep_last,
        keep_every=message.keep_every,
        keep_best=tuple(KeepBest(one.metric, one.count, one.largest) for one in message.keep_best),
        newer_than_s=message.newer_than.ToSeconds(),
    )
