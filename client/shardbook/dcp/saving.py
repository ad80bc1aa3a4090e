"""``save``: what one rank does, from the state dict to the result. No collective, no barrier, no store.

The sequence is DCP's own, except that the global plan is PlanSave and ``finish`` is never called::

    stateful -> set_up_planner -> set_up_storage_writer -> create_local_plan -> prepare_local_plan -> PlanSave
    -> finish_plan -> write_data -> registration record -> RegisterShards -> commit (rank 0) -> manifest, .metadata
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, SupportsFloat

import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageWriter

from shardbook.dcp.prepared import DEFAULT_TIMEOUT_S, PreparedSave, SaveOptions, prepare
from shardbook.dcp.rank_save import RankSave
from shardbook.dcp.results import SaveResult
from shardbook.dcp.standing_aside import save_by_torch, stands_aside

_LOG = logging.getLogger(__name__)


def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    step: int | None = None,
    part: str | None = None,
    strict: bool = False,
    wait: str = "committed",
    export_metadata: bool = True,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    checksum: str | None = None,
    labels: Mapping[str, str] | None = None,
    metrics: Mapping[str, SupportsFloat] | None = None,
    note: Any = None,
) -> SaveResult:
    """Saves a state dict from every rank, as ``torch.distributed.checkpoint.save`` does, without collectives.

    Args:
        state_dict: As in DCP: tensors, DTensors, ShardedTensors, objects, nested in dicts and lists.
        checkpoint_id: Directory or URL of the checkpoint.
        storage_writer: FileSystemWriter, FsspecWriter or a subclass; by default the one that fits ``checkpoint_id``.
        planner: DefaultSavePlanner or a subclass that plans locally.
        process_group: Ranks that take part; the default group when None.
        no_dist: This process alone, rank 0 of 1.
        step: Training step; by default the last number in the last component of the path.
        part: Part of the step, for what is saved apart; by default the session's.
        strict: Raise UnregisteredError rather than return UNREGISTERED.
        wait: ``committed``; or ``registered``, with which all ranks but the coordinator return earlier.
        export_metadata: Write DCP's own ``.metadata`` too, so that plain DCP can load the checkpoint.
        timeout_s: How long ranks wait for each other's data, seconds.
        checksum: ``crc32c`` keeps a checksum of every item, computed while it is written; ``none`` keeps none. By
            default what ``SHARDBOOK_CHECKSUM`` says.
        labels: What the catalogue is to call the checkpoint, by key; the coordinator's count. ``shardbook ls --filter
            'labels.stage = "eval"'`` finds it again.
        metrics: Measured values by name, the coordinator's; those that are NaN or infinite are left out.
        note: Any JSON value to keep with the checkpoint, the coordinator's.

    Returns:
        How far the save has come. With the service away it is UNREGISTERED: the data and what describes it are on
        storage all the same.

    Raises:
        RankFailedError: Another rank said that it cannot finish.
        RanksMissingError: Ranks did not register in time.
        SessionFencedError: A later session holds the run. The data is on storage.
        InvalidGeometryError: The ranks' chunks do not make whole tensors.
        UnregisteredError: ``strict``, and the service did not record the save.
        UnsupportedWriterError, UnsupportedPlannerError, UnsupportedMetadataError: It cannot be saved so; nothing was
            written.
    """
    if stands_aside():
        return save_by_torch(
            state_dict,
            strict=strict,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
        )
    options = SaveOptions(strict, wait, export_metadata, timeout_s, checksum, labels, metrics, note)
    prepared = prepare(checkpoint_id, storage_writer, planner, process_group, no_dist, step, part, options)
    try:
        return perform(prepared, state_of(prepared, state_dict))
    finally:
        prepared.release()


def plain_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a shallow copy in which every Stateful object is its state dict. Those may run collectives; we do not."""
    return {
        key: element.state_dict() if isinstance(element, Stateful) else element for key, element in state_dict.items()
    }


def state_of(prepared: PreparedSave, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns ``plain_state`` of a save; where an object has no state to give, the other ranks learn that it failed."""
    try:
        return plain_state(state_dict)
    except BaseException as error:
        prepared.give_up(error)
        raise


def perform(prepared: PreparedSave, state_dict: dict[str, Any]) -> SaveResult:
    """Runs a prepared save of a plain state dict; see ``save``."""
    return RankSave(prepared).run(state_dict)
