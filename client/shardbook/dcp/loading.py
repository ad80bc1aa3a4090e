"""``load``: from a ref or a path, at any world size, without collectives.

Each rank asks for the metadata itself, plans for its own boxes and reads its own bytes; nobody waits for anybody.
"""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner import LoadPlanner as TorchLoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader

from shardbook._answers import Answers
from shardbook._attempts import FoundAttempt, list_attempts
from shardbook._elsewhere import is_absent, read_elsewhere
from shardbook._newest import read_newest
from shardbook._publishing import export_dcp_metadata, fold_sets, settle
from shardbook._targets import METADATA_S, checkpoint_named
from shardbook.config import ClientConfig
from shardbook.core.directory import DCP_METADATA, MANIFEST
from shardbook.core.names import CheckpointName
from shardbook.dcp._torch import flat_names, storage_reader_for
from shardbook.dcp.directory import incomplete_attempts
from shardbook.dcp.lazy import LazyMetadata
from shardbook.dcp.load_planner import ShardbookLoadPlanner
from shardbook.dcp.load_report import LoadReport
from shardbook.dcp.metadata import CheckpointColumns
from shardbook.dcp.pickled import read_pickled_metadata
from shardbook.dcp.runtime import current, current_config, is_distributed
from shardbook.dcp.telling import origin_kind, tell_loaded
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook.sources import ManifestSource, ServiceSource
from shardbook.stored_metadata import StoredMetadata
from shardbook.stores import encodable

_LOG = logging.getLogger(__name__)


def load(
    state_dict: dict[str, Any],
    ref_or_path: str | os.PathLike[str] | CheckpointName | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: TorchLoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    weights_only: bool = True,
    strict: bool = True,
    allow_dtype_change: bool = False,
    lineage: str | None = None,
) -> LoadReport:
    """Loads a checkpoint into a state dict in place, as ``torch.distributed.checkpoint.load`` does.

    No rank waits for another one, so ranks may load different keys, and a single process may load what many saved.
    Neither ``init`` nor a process group is needed. From a directory whose coordinator was killed before it had
    described it, rank 0 writes the manifest and ``.metadata`` that lack, where it may.

    Args:
        state_dict: Tensors to fill; other values are replaced.
        ref_or_path: ``project/run@1500``, ``@latest``, ...; or a directory or URL, also of a plain DCP checkpoint.
        checkpoint_id: The same, under DCP's name for it.
        storage_reader: Reads the bytes; by default the one that fits the checkpoint's location.
        planner: By default ``shardbook.dcp.ShardbookLoadPlanner``, with the arguments below.
        process_group: Tells this process its rank, for planners that ask; nothing is sent over it.
        no_dist: Load as rank 0 of 1.
        weights_only: False unpickles entries that are not plain data, and ``.metadata`` files that hold more than
            DCP's metadata, which can run any code in them: only for checkpoints that you trust as you trust your own
            programs. Planners of your own decide for themselves.
        strict: False loads what fits: names that the checkpoint lacks, tensors of another shape and values that are
            tensors there are left as they are, tensors of another dtype are converted, and all of them are reported.
        lineage: ``resumed_from``, ``fine_tuned_from`` or ``converted_from``: the next checkpoint that this session
            commits to its part says that it comes from what was loaded. Nothing that comes of it fails a load.
        allow_dtype_change: True converts tensors of another dtype although ``strict``, as DCP does.

    Returns:
        What did not fit. An empty report for planners that make none.

    Raises:
        CheckpointMismatchError: The checkpoint does not fit the state dict; everything that does not is told at once,
            and nothing was read. A RuntimeError and ValueError too, as DCP's planner raises them.
        NotFoundError: There is no such checkpoint.
        FailedPreconditionError: An entry is not plain data (reason ``UNSAFE_ENTRY``), or ``.metadata`` is not
            DCP's metadata alone (``UNSAFE_METADATA``); or ``lineage`` without a session (``NO_SESSION``).
        ShardbookError: The service could not be asked; loading by path needs no service.
    """
    if ref_or_path is not None and checkpoint_id is not None:
        raise InvalidArgumentError("pass the checkpoint once, not as checkpoint_id too", field="checkpoint_id")
    kind = None if lineage is None else origin_kind(lineage)
    told = None if kind is None else current().origins
    target = checkpoint_id if ref_or_path is None else ref_or_path
    if target is None and storage_reader is None:
        raise InvalidArgumentError("pass a ref, a path or a storage_reader", field="checkpoint_id")
    name = checkpoint_named(target)
    metadata: Metadata
    if name is not None:
        metadata, reader = LazyMetadata(source_of(name, current_config())), storage_reader
    else:
        reader = storage_reader_for(storage_reader, target)
        metadata = lazy_directory_metadata(reader, trusted=not weights_only)
    if planner is None:
        planner = ShardbookLoadPlanner(weights_only=weights_only, strict=strict, allow_dtype_change=allow_dtype_change)
    rank = 0 if no_dist or not is_distributed() else dist.get_rank(process_group)
    absent: Exception | None = None
    try:
        _load_into(state_dict, reader, metadata, planner, rank)
    except _AbsentFileError as raised:
        absent = raised.error
    if absent is not None:
        if storage_reader is not None or not isinstance(metadata, LazyMetadata):
            raise absent
        _load_from_others(absent, state_dict, metadata, planner, rank)
    if name is None and rank == 0:
        repair_directory(reader)
    if kind is not None and told is not None:
        tell_loaded(told, kind, metadata, target)
    report = planner.report if isinstance(planner, ShardbookLoadPlanner) else None
    return report or LoadReport()


def _load_from_others(
    error: Exception, state_dict: dict[str, Any], metadata: LazyMetadata, planner: TorchLoadPlanner, rank: int
) -> None:
    """Loads from where else the checkpoint is, as a whole; raises the first place's error when none has all."""
    places = metadata.source.locations
    name = getattr(metadata.source, "found_name", None)
    read_elsewhere(
        error,
        CheckpointName.parse(name).ref if name else places[0],
        places,
        lambda place: _load_into(state_dict, storage_reader_for(None, place), metadata, planner, rank),
        tell_lost=getattr(metadata.source, "tell_lost", lambda: None),
        is_missed=lambda another: isinstance(another, _AbsentFileError),
    )


def columns_of(name: CheckpointName, config: ClientConfig | None = None) -> CheckpointColumns:
    """Fetches a committed checkpoint's metadata as columns.

    Args:
        name: The checkpoint.
        config: Settings; those of ``init``, else of the environment, when None.

    Raises:
        NotFoundError: There is no such committed checkpoint.
        InvalidArgumentError: No server is configured, or the checkpoint's store is not.
    """
    config = current_config() if config is None else config
    return _columns(Answers.of(config, METADATA_S).everything(name), config)


def source_of(name: CheckpointName, config: ClientConfig) -> ServiceSource:
    """Returns what answers questions about a checkpoint of the catalogue; asks nothing yet."""
    answers = Answers.of(config, METADATA_S)
    return ServiceSource(answers.client, name, config.stores, METADATA_S, answers.cache)


def _columns(stored: StoredMetadata, config: ClientConfig) -> CheckpointColumns:
    structure, located = stored.columns()
    place = stored.checkpoint.location
    path = config.stores.paths_of(stored.locations)[0]
    return CheckpointColumns(structure, located, place.prefix, path, stored.header(path))


def directory_metadata(reader: Any, *, trusted: bool = False) -> Metadata:
    """Returns all metadata of the directory that ``reader`` reads: Shardbook's own, else DCP's ``.metadata``.

    Args:
        reader: Reads the directory.
        trusted: Let torch unpickle ``.metadata``, whatever it runs.

    Raises:
        FailedPreconditionError: ``.metadata`` holds something else than DCP's metadata (``UNSAFE_METADATA``).
        NotFoundError: Neither is there, or an attempt that is not complete.
        CorruptManifestError: What Shardbook left is damaged.
    """
    metadata = lazy_directory_metadata(reader, trusted=trusted)
    return metadata.everything() if isinstance(metadata, LazyMetadata) else metadata


def lazy_directory_metadata(reader: Any, *, trusted: bool) -> Metadata:
    """Returns a directory's metadata, fetched as it is looked at where Shardbook saved it."""
    files = CheckpointFiles.of(reader) if hasattr(reader, "fs") and hasattr(reader, "path") else None
    stored = None if files is None else read_newest(files, FoundAttempt.stored)
    if files is not None and stored is not None:
        return LazyMetadata(ManifestSource(stored, os.fspath(files.root)))
    try:
        if not trusted and getattr(type(reader), "read_metadata", None) is FileSystemReader.read_metadata:
            with reader.fs.create_stream(reader.fs.concat_path(reader.path, DCP_METADATA), "rb") as stream:
                return read_pickled_metadata(stream)
        metadata: Metadata = reader.read_metadata()  # a reader of another kind knows its own files
    except FileNotFoundError as error:
        raise _nothing_there(files, error) from error
    except FailedPreconditionError as error:
        if files is None or not files.exists(MANIFEST):
            raise
        raise FailedPreconditionError(
            f"{error.message}. Shardbook's own save in this directory is older: remove {DCP_METADATA} to load that one",
            reason=error.reason,
        ) from error
    return metadata


def repair_directory(reader: Any) -> None:
    """Makes the directory mean what was loaded where a coordinator was killed before it had; best effort.

    Whoever comes next then finds a manifest, and plain DCP its ``.metadata``. A directory that cannot be written stays
    as it is: loading needs no more than it has.
    """
    if not (hasattr(reader, "fs") and hasattr(reader, "path")):
        return
    files = CheckpointFiles.of(reader)
    try:
        listed = list_attempts(files)
        if listed:
            fold_sets(files, listed, lambda one: one.identity is not None)
            settle(files, lambda folded: export_dcp_metadata(os.fspath(files.root), folded))
    except Exception as error:  # noqa: BLE001 - what was loaded is right whatever becomes of this
        _LOG.info("%s was not repaired: %s", encodable(os.fspath(files.root)), encodable(str(error)))


def _nothing_there(files: CheckpointFiles | None, error: FileNotFoundError) -> NotFoundError:
    begun = {} if files is None else incomplete_attempts(files)
    if begun:
        told = ", ".join(f"{prefix} ({count} ranks)" for prefix, count in begun.items())
        return NotFoundError(f"no whole checkpoint there: attempts without all of their ranks: {told}")
    return NotFoundError(f"no checkpoint there: {error}")


class _AbsentFileError(Exception):
    """A data file of the checkpoint is not there. What a user's own object misses is none of its files.

    Attributes:
        error: What the reader raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _load_into(
    state_dict: dict[str, Any], reader: Any, metadata: Metadata, planner: TorchLoadPlanner, rank: int
) -> None:
    """DCP's load with this rank's plan alone; sorted keys and stateful objects as in DCP.

    Raises:
        _AbsentFileError: What is to be read is not there.
    """
    keys = sorted(state_dict)
    values = {key: state_dict[key] for key in keys}
    plain = {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in values.items()}
    plan, reader = _planned(plain, reader, metadata, planner, rank)
    plan = reader.prepare_local_plan(plan)
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    plan = planner.finish_plan(plan)
    try:
        reader.read_data(plan, planner).wait()
    except Exception as error:
        if is_absent(error):
            raise _AbsentFileError(error) from error
        raise
    for key, value in values.items():
        if isinstance(value, Stateful):
            value.load_state_dict(plain[key])
    # A planner may add keys (DCP's for an empty state dict does) and puts loaded values in the place of others.
    state_dict.update({key: value for key, value in plain.items() if not isinstance(values.get(key), Stateful)})


def _planned(
    state_dict: dict[str, Any], reader: Any, metadata: Metadata, planner: TorchLoadPlanner, rank: int
) -> tuple[LoadPlan, Any]:
    """Returns the local plan and a reader that is set up, which a checkpoint of the catalogue is only then known for.

    Our planner asks its one question when it plans, so that comes first; other planners get the order of DCP, and what
    they may look at is fetched before.
    """
    plan: LoadPlan | None = None
    if isinstance(planner, ShardbookLoadPlanner):
        planner.set_up_planner(state_dict, metadata, rank == 0)
        plan = planner.create_local_plan()
    elif isinstance(metadata, LazyMetadata):
        metadata.prefetch(flat_names(state_dict))
    if reader is None and isinstance(metadata, LazyMetadata):
        reader = storage_reader_for(None, metadata.source.location)
    if metadata.storage_meta is not None:
        metadata.storage_meta.load_id = getattr(reader, "load_id", None)
    if plan is None:
        planner.set_up_planner(state_dict, metadata, rank == 0)
    if "kwargs" in inspect.signature(reader.set_up_storage_reader).parameters:
        reader.set_up_storage_reader(metadata, rank == 0, rank=rank, use_collectives=False)
    else:
        reader.set_up_storage_reader(metadata, rank == 0)
    return plan or planner.create_local_plan(), reader
