"""The calls of CatalogService that say things of checkpoints: labels, metrics, notes, aliases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardbook._targets import etag_of, resource_name
from shardbook._transport import Rpc, Transport
from shardbook.catalog import Checkpoint
from shardbook.core.description import check_labels, check_metrics, check_name, encode_note
from shardbook.core.limits import MAX_PAGE_SIZE
from shardbook.core.names import AliasName, CheckpointName, PartName, RunName
from shardbook.descriptions import Alias, Direction, Project, RankInfo
from shardbook.errors import InvalidArgumentError
from shardbook.v1 import catalog_pb2

LIST_PROJECTS = Rpc("ListProjects", lambda on: on.catalog.ListProjects)
UPDATE_CHECKPOINT = Rpc("UpdateCheckpoint", lambda on: on.catalog.UpdateCheckpoint)
LIST_RANKS = Rpc("ListRanks", lambda on: on.catalog.ListRanks)
LIST_ALIASES = Rpc("ListAliases", lambda on: on.catalog.ListAliases)
SET_ALIAS = Rpc("SetAlias", lambda on: on.catalog.SetAlias)
DELETE_ALIAS = Rpc("DeleteAlias", lambda on: on.catalog.DeleteAlias)

#: Says nothing of a note, which ``None`` removes.
_UNCHANGED: Final = object()
_DIRECTIONS = {Direction.MIN: catalog_pb2.Alias.DIRECTION_MIN, Direction.MAX: catalog_pb2.Alias.DIRECTION_MAX}


class DescribingCalls:
    """What is said of checkpoints. Every call may be made again: the same again changes nothing. Thread-safe."""

    _transport: Transport

    def list_projects(self, *, page_size: int = MAX_PAGE_SIZE, deadline_s: float | None = None) -> Iterator[Project]:
        """Yields projects by name."""
        request = catalog_pb2.ListProjectsRequest(page_size=page_size)
        for page in self._transport.pages(LIST_PROJECTS, request, deadline_s=deadline_s):
            yield from map(Project.of, page.projects)

    def update_checkpoint(
        self,
        name: CheckpointName | str,
        *,
        labels: Mapping[str, str | None] | None = None,
        metrics: Mapping[str, float | None] | None = None,
        note: Any = _UNCHANGED,
        etag: str | None = None,
        deadline_s: float | None = None,
    ) -> Checkpoint:
        """Changes what is said of a checkpoint, and returns it.

        Args:
            name: The checkpoint.
            labels: Labels to set, by key; None removes one. The others stay.
            metrics: Metrics to set, by name; None removes one. The others stay.
            note: Any JSON value to keep with it; None removes it.
            etag: The checkpoint's as it was read; where it is another by now, nothing is done. None: however it is.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: There is no such checkpoint.
            InvalidArgumentError: A name or value cannot be stored, or there would be too many.
            AbortedError: It has another etag by now.
        """
        request = catalog_pb2.UpdateCheckpointRequest()
        request.checkpoint.name, request.checkpoint.etag = resource_name(name), etag_of(etag)
        request.checkpoint.labels.update(check_labels({k: v for k, v in (labels or {}).items() if v is not None}))
        request.checkpoint.metrics.update(check_metrics({k: v for k, v in (metrics or {}).items() if v is not None}))
        paths = request.update_mask.paths
        paths.extend(f"labels.{check_name(key, 'labels')}" for key in labels or {})
        paths.extend(f"metrics.{check_name(key, 'metrics')}" for key in metrics or {})
        if note is not _UNCHANGED:
            request.checkpoint.note = encode_note(note)
            paths.append("note")
        if not paths:
            raise InvalidArgumentError("nothing to change: give labels, metrics or a note", field="labels")
        return Checkpoint.of(self._transport.write(UPDATE_CHECKPOINT, request, deadline_s=deadline_s).checkpoint)

    def list_ranks(
        self, name: CheckpointName | str, *, page_size: int = MAX_PAGE_SIZE, deadline_s: float | None = None
    ) -> Iterator[RankInfo]:
        """Yields what the ranks of a committed checkpoint took and wrote, by rank; nothing where it is not known.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not committed.
        """
        parent = resource_name(name)
        request = catalog_pb2.ListRanksRequest(parent=parent, page_size=page_size)
        for page in self._transport.pages(LIST_RANKS, request, deadline_s=deadline_s):
            yield from map(RankInfo.of, page.ranks)

    def list_aliases(
        self,
        run: RunName | str,
        *,
        part: str | None = None,
        page_size: int = MAX_PAGE_SIZE,
        deadline_s: float | None = None,
    ) -> Iterator[Alias]:
        """Yields the aliases of a run by part and name, ``latest`` among them.

        Raises:
            NotFoundError: There is no such run or part.
        """
        name = run if isinstance(run, RunName) else RunName.parse(run)
        parent = f"{name}/parts/-" if part is None else str(PartName(name, part))
        request = catalog_pb2.ListAliasesRequest(parent=parent, page_size=page_size)
        for page in self._transport.pages(LIST_ALIASES, request, deadline_s=deadline_s):
            yield from map(Alias.of, page.aliases)

    def set_alias(
        self,
        name: AliasName | str,
        checkpoint: CheckpointName | str,
        *,
        protected: bool = False,
        force: bool = False,
        etag: str | None = None,
        deadline_s: float | None = None,
    ) -> Alias:
        """Makes an alias or moves it.

        Args:
            name: ``project/run@production``.
            checkpoint: What it is to mean, a committed checkpoint of the same part.
            protected: It is not to be moved or deleted, nor its checkpoint deleted, without force.
            force: Move one that is protected.
            etag: The alias as it was read has it; where it is another by now, nothing is done. None: however it is.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not committed, or the alias is protected (``ALIAS_PROTECTED``).
            AbortedError: It has another etag by now.
        """
        meant = checkpoint if isinstance(checkpoint, CheckpointName) else CheckpointName.parse(checkpoint)
        alias = catalog_pb2.Alias(name=_alias(name), checkpoint=str(meant), protected=protected, etag=etag_of(etag))
        request = catalog_pb2.SetAliasRequest(alias=alias, force=force)
        return Alias.of(self._transport.write(SET_ALIAS, request, deadline_s=deadline_s).alias)

    def follow_metric(
        self,
        name: AliasName | str,
        metric: str,
        direction: str,
        *,
        force: bool = False,
        etag: str | None = None,
        deadline_s: float | None = None,
    ) -> Alias:
        """Makes an alias mean the checkpoint with the best value of a metric, now and after every commit and update.

        Args:
            name: ``project/run@best``.
            metric: Name of the metric.
            direction: ``min`` or ``max``.
            force: Take a name that is protected.
            etag: As for ``set_alias``.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: There is no such run or part.
            FailedPreconditionError: The alias is protected (``ALIAS_PROTECTED``).
            AbortedError: It has another etag by now.
        """
        if direction not in set(Direction):
            raise InvalidArgumentError(f"direction is {direction!r}, not min or max", field="direction")
        alias = catalog_pb2.Alias(
            name=_alias(name),
            metric=check_name(metric, "metric"),
            direction=_DIRECTIONS[Direction(direction)],
            etag=etag_of(etag),
        )
        request = catalog_pb2.SetAliasRequest(alias=alias, force=force)
        return Alias.of(self._transport.write(SET_ALIAS, request, deadline_s=deadline_s).alias)

    def delete_alias(
        self, name: AliasName | str, *, force: bool = False, etag: str | None = None, deadline_s: float | None = None
    ) -> None:
        """Deletes an alias; the checkpoint stays.

        Raises:
            NotFoundError: There is no such alias.
            FailedPreconditionError: It is protected (``ALIAS_PROTECTED``).
            AbortedError: It has another etag than ``etag``.
        """
        request = catalog_pb2.DeleteAliasRequest(name=_alias(name), force=force, etag=etag_of(etag))
        self._transport.write(DELETE_ALIAS, request, deadline_s=deadline_s)


def _alias(name: AliasName | str) -> str:
    return str(name if isinstance(name, AliasName) else AliasName.parse(name))
