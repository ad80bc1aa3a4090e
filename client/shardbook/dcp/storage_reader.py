"""``ShardbookReader``: torch's own ``load``, of a checkpoint by name or from a directory.

Its metadata is fetched as it is looked at (``dcp/lazy.py``). ``ShardbookLoadPlanner`` asks for the rank's own boxes;
DCP's planner looks at every name, and so at everything.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardbook._elsewhere import is_absent, read_elsewhere
from shardbook._targets import checkpoint_named
from shardbook.core.names import CheckpointName
from shardbook.dcp._torch import storage_reader_for
from shardbook.dcp.lazy import LazyMetadata
from shardbook.dcp.loading import lazy_directory_metadata, repair_directory, source_of
from shardbook.dcp.runtime import current, current_config
from shardbook.dcp.telling import ToldOrigins, origin_kind, tell_loaded
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, ShardbookError
from shardbook.sources import ManifestSource, ServiceSource


@dataclass(frozen=True)
class _Marked:
    """What a rank's plan says besides: which checkpoint it was made for.

    Attributes:
        checkpoint: Name of the checkpoint, or what tells one save of a directory from another.
        storage_data: The other reader's.
    """

    checkpoint: str
    storage_data: Any


class ShardbookReader(StorageReader):
    """A storage reader for ``torch.distributed.checkpoint.load``.

    Neither ``init`` nor, for a directory, a service is needed. Pass ``planner=ShardbookLoadPlanner()`` too: then a rank
    costs what it loads, everything that does not fit is told at once, and entries load with ``weights_only=True``.
    What the service answers, or that it does not, is in torch's CheckpointException. May be used again for another
    checkpoint, by one load at a time.

    Args:
        checkpoint_id: ``project/run@1500``, ``@latest``, ...; or a directory or URL, also of a plain DCP checkpoint.
            May be left to ``load``.
        storage_reader: Reads the bytes; by default the one that fits the checkpoint's location.
        weights_only: False has torch unpickle a ``.metadata`` that holds more than DCP's metadata, which can run any
            code. Entries are the planner's business.
        lineage: As for ``shardbook.dcp.load``; needs ``init`` before the load.

    Raises:
        InvalidArgumentError: ``lineage`` names no kind of origin.
    """

    def __init__(
        self,
        checkpoint_id: str | os.PathLike[str] | CheckpointName | None = None,
        *,
        storage_reader: StorageReader | None = None,
        weights_only: bool = True,
        lineage: str | None = None,
    ) -> None:
        super().__init__()
        self._kind = None if lineage is None else origin_kind(lineage)
        self._told: ToldOrigins | None = None
        self._given: Any = storage_reader
        self._weights_only = weights_only
        self._target: str | os.PathLike[str] | CheckpointName | None = checkpoint_id
        self.reset()

    def reset(self, checkpoint_id: str | os.PathLike[str] | CheckpointName | None = None) -> None:
        """Turns to another load; another checkpoint may be named."""
        if checkpoint_id is not None:
            self._target = checkpoint_id
        self._reader: Any = None
        self._metadata: Metadata | None = None
        self._place: tuple[bool, tuple[Any, ...], dict[str, Any]] = (False, (), {})
        self._is_ready = False

    def read_metadata(self, *_arguments: Any, **_options: Any) -> Metadata:
        """Returns the checkpoint's metadata, fetched as it is looked at where Shardbook saved it.

        Raises:
            NotFoundError: There is no such directory.
            FailedPreconditionError: ``.metadata`` is not DCP's metadata alone (reason ``UNSAFE_METADATA``).
            CorruptManifestError: What Shardbook left is damaged.
        """
        name = checkpoint_named(self._target)
        if name is not None:
            return LazyMetadata(source_of(name, current_config()))
        if self._target is None and self._given is None:
            raise InvalidArgumentError("pass a ref, a path or a storage_reader", field="checkpoint_id")
        self._reader = storage_reader_for(self._given, self._target)
        metadata = lazy_directory_metadata(self._reader, trusted=not self._weights_only)
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = getattr(self._reader, "load_id", None)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Notes what is loaded; the other reader is set up once the planner has asked where it lies.

        Raises:
            FailedPreconditionError: ``lineage`` was given, and there is no session (reason ``NO_SESSION``).
        """
        self._told = None if self._kind is None else current().origins
        self._metadata, self._place, self._is_ready = metadata, (is_coordinator, args, kwargs), False

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Sets up the other reader, and marks the plan with the checkpoint that it was made for."""
        plan = self._set_up().prepare_local_plan(plan)
        checkpoint = _identity(self._metadata)
        if checkpoint is None:
            return plan
        return dataclasses.replace(plan, storage_data=_Marked(checkpoint, plan.storage_data))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Looks whether all ranks mean the same checkpoint.

        Raises:
            FailedPreconditionError: Something was saved between two ranks' looks at ``@latest``, or at the directory
                (reason ``CHECKPOINT_MOVED``).
        """
        marked = {plan.storage_data.checkpoint for plan in plans if isinstance(plan.storage_data, _Marked)}
        if len(marked) > 1:
            raise FailedPreconditionError(
                f"the ranks would load different checkpoints, {' and '.join(sorted(marked))}: one was saved meanwhile. "
                "Load again, or name the step",
                reason="CHECKPOINT_MOVED",
                field="checkpoint_id",
            )
        bare = [
            dataclasses.replace(plan, storage_data=plan.storage_data.storage_data)
            if isinstance(plan.storage_data, _Marked)
            else plan
            for plan in plans
        ]
        prepared: list[LoadPlan] = self._set_up().prepare_global_plan(bare)
        return prepared

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Has the other reader read; rank 0 finishes what a killed coordinator left undone in the directory.

        Then the session is told where its next checkpoint comes from. A file that is missing wherever the checkpoint is
        is told to the catalogue.
        """
        reader, metadata = self._set_up(), self._metadata
        done = self._read(reader, plan, planner)
        is_coordinator, _, _ = self._place
        repairs = is_coordinator and checkpoint_named(self._target) is None
        if repairs or self._told is not None:
            done.wait()
        if repairs:
            repair_directory(reader)
        if self._told is not None and self._kind is not None and metadata is not None:
            tell_loaded(self._told, self._kind, metadata, self.checkpoint_id)
        return done

    def _read(self, reader: Any, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads from where the checkpoint is first; where a file is missing, from where else it is."""
        source = self._metadata.source if isinstance(self._metadata, LazyMetadata) else None
        try:
            done: Future[None] = reader.read_data(plan, planner)
            if source is not None:
                done.wait()
        except Exception as error:
            if self._given is not None or source is None or not is_absent(error):
                raise
            return read_elsewhere(
                error,
                str(self.checkpoint_id),
                source.locations,
                partial(self._read_at, plan, planner),
                tell_lost=getattr(source, "tell_lost", lambda: None),
            )
        return done

    def _read_at(self, plan: LoadPlan, planner: LoadPlanner, place: str) -> Future[None]:
        reader = storage_reader_for(None, place)
        self._set_up_one(reader, self._metadata)
        done: Future[None] = reader.read_data(reader.prepare_local_plan(plan), planner)
        done.wait()
        return done

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """As it was named; that of the other reader where nobody has."""
        if self._target is None:
            return getattr(self._given, "checkpoint_id", None)
        return self._target.ref if isinstance(self._target, CheckpointName) else self._target

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns True for refs, and for what one of DCP's readers can read."""
        try:
            if checkpoint_named(checkpoint_id) is None:
                storage_reader_for(None, checkpoint_id)
        except (RuntimeError, ValueError, ShardbookError):
            return False
        return True

    def _set_up(self) -> Any:
        """The other reader, set up once a load."""
        metadata = self._metadata
        if self._is_ready:
            return self._reader
        if metadata is None:
            raise FailedPreconditionError("set_up_storage_reader comes before a plan", reason="NOT_SET_UP")
        if self._reader is None:
            location = metadata.source.location if isinstance(metadata, LazyMetadata) else self._target
            self._reader = storage_reader_for(self._given, location)
        self._set_up_one(self._reader, metadata)
        self._is_ready = True
        return self._reader

    def _set_up_one(self, reader: Any, metadata: Any) -> None:
        is_coordinator, args, kwargs = self._place
        if "kwargs" in inspect.signature(reader.set_up_storage_reader).parameters:
            reader.set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        else:
            reader.set_up_storage_reader(metadata, is_coordinator)


def _identity(metadata: Metadata | None) -> str | None:
    """What tells this checkpoint from the next one under the same name; None where nothing does."""
    if not isinstance(metadata, LazyMetadata):
        meta = getattr(metadata, "storage_meta", None)
        return None if meta is None else meta.save_id
    source = metadata.source
    if isinstance(source, ServiceSource):
        return source.found_name
    return source.prefix if isinstance(source, ManifestSource) else None


__all__ = ["ShardbookReader"]
