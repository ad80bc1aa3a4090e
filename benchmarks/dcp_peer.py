"""The peer: what DCP's coordinator does to plan and finish one save, on the plans of simulated ranks.

The same objects and functions as ``torch.distributed.checkpoint`` uses, without the network: unpickle what the ranks
gathered, deduplicate, make the global plan, validate it, pickle the replies, unpickle the results, write
``.metadata`` and pickle it once more for the broadcast. What ranks do on their side is not counted.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import tempfile
from collections import ChainMap
from pathlib import Path
from typing import Any

from benchmarks.common import garbage_collector, peak_rss_bytes, stopwatch
from benchmarks.workload import Workload


def coordinate(workload: Workload, collector: bool) -> dict[str, float]:
    """Returns seconds by stage, their sum as ``total_s``, bytes moved, and peak memory, for one save."""
    with garbage_collector(enabled=collector):
        return _coordinate(workload)


def _coordinate(workload: Workload) -> dict[str, float]:
    from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
    from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StoragePrefix
    from torch.distributed.checkpoint.metadata import StorageMeta

    stages: dict[str, float] = {}
    gathered = [pickle.dumps(plan_of(workload, rank)) for rank in range(workload.ranks)]
    with stopwatch(stages, "unpickle_plans_s"):
        plans = [pickle.loads(content) for content in gathered]
    gathered_bytes = sum(map(len, gathered))
    del gathered
    with stopwatch(stages, "global_plan_s"):
        plans = dedup_save_plans(plans)
        plans, metadata = create_default_global_save_plan(plans)
        metadata = dataclasses.replace(metadata, planner_data=dict(ChainMap(*[plan.planner_data for plan in plans])))
    with stopwatch(stages, "validate_s"):
        errors = _validate_global_plan(plans, metadata)
    if errors:
        raise RuntimeError(errors[0])
    with stopwatch(stages, "pickle_replies_s"):
        plans = [dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{i}_")) for i, plan in enumerate(plans)]
        replies = [pickle.dumps(plan) for plan in plans]
    del plans
    results = [pickle.dumps(results_of(workload, rank, pickle.loads(reply))) for rank, reply in enumerate(replies)]
    replies_bytes = sum(map(len, replies))
    del replies
    with stopwatch(stages, "unpickle_results_s"):
        written = [pickle.loads(content) for content in results]
    with stopwatch(stages, "write_metadata_s"):
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for rank in written for result in rank}
        metadata.storage_meta = StorageMeta(checkpoint_id="/checkpoint", save_id="save")
        metadata_bytes = _write(metadata)
    with stopwatch(stages, "pickle_broadcast_s"):
        pickle.dumps(metadata)
    total_s = sum(stages.values())
    return {
        **stages,
        "total_s": total_s,
        "moved_bytes": gathered_bytes + replies_bytes + sum(map(len, results)),
        "metadata_bytes": metadata_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def plan_of(workload: Workload, rank: int) -> Any:
    """Returns the SavePlan that DefaultSavePlanner makes for FSDP2's DTensors on this rank."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    items = []
    boxes = zip(workload.offsets(rank).tolist(), workload.sizes.tolist(), workload.shapes.tolist(), strict=True)
    for fqn, (offsets, sizes, shape) in zip(workload.fqns, boxes, strict=True):
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
            properties=TensorProperties(dtype=torch.bfloat16),
            size=torch.Size(shape),
        )
        items.append(
            WriteItem(index=MetadataIndex(fqn, torch.Size(offsets)), type=WriteItemType.SHARD, tensor_data=data)
        )
    return SavePlan(items, planner_data={fqn: tuple(fqn.split(".", 1)) for fqn in workload.fqns})


def results_of(workload: Workload, rank: int, plan: Any) -> Any:
    """Returns the WriteResults of FileSystemWriter for ``plan``."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    results, offset = [], 0
    for item, length in zip(plan.items, workload.lengths.tolist(), strict=True):
        info = _StorageInfo(f"__{rank}_0.distcp", offset, length)
        results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=info))
        offset += length
    return results


def _write(metadata: Any) -> int:
    """Writes ``.metadata`` as FileSystemWriter does, fsync included; returns its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ".metadata"
        with path.open("wb") as stream:
            pickle.dump(metadata, stream)
            os.fsync(stream.fileno())
        return path.stat().st_size
