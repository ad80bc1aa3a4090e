"""The peer: what DCP's coordinator does to plan and finish one save, on the plans of simulated ranks.

The same objects and functions as ``torch.distributed.checkpoint`` uses, without the network: unpickle what the ranks
gathered, deduplicate, make the global plan, validate it, pickle the replies, unpickle the results, write
``.metadata`` and pickle it once more for the broadcast. What ranks do on their side is not counted.

A second save of the same plans, with DCP's ``enable_plan_caching``: ranks send and get a plan that says "unchanged",
the global plan and the metadata come out of ``DefaultSavePlanner``'s own cache. The results are gathered and unpickled
as ever, ``.metadata`` is written and pickled for the broadcast as ever. That each rank compares its plan with the one
it sent before, the coordinator too, is not counted.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import tempfile
from collections import ChainMap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import garbage_collector, peak_rss_bytes, rss_bytes, stopwatch
from benchmarks.workload import Workload


def coordinate(workload: Workload, collector: bool) -> dict[str, float]:
    """Returns seconds by stage, their sum as ``total_s``, bytes moved, and peak memory, for one save."""
    with garbage_collector(enabled=collector):
        return _coordinate(workload)


def _coordinate(workload: Workload) -> dict[str, float]:
    from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
    from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
    from torch.distributed.checkpoint.filesystem import _StoragePrefix

    stages: dict[str, float] = {}
    idle_bytes = rss_bytes()
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
    replies_bytes = sum(map(len, replies))
    results_bytes, metadata_bytes = _finish(stages, workload, metadata, _unpickled(replies))
    return {
        **stages,
        "total_s": sum(stages.values()),
        "moved_bytes": gathered_bytes + replies_bytes + results_bytes,
        "metadata_bytes": metadata_bytes,
        "idle_rss_bytes": idle_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def coordinate_unchanged(workload: Workload, collectors: tuple[bool, ...] = (True, False)) -> list[dict[str, float]]:
    """Returns seconds by stage, ``total_s`` and bytes of a save whose plans are cached, for each setting of gc.

    The caches are a class's, so this needs a process of its own. Filling them, as a first save does, is not counted.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan

    writer = FileSystemWriter("/checkpoint")
    with garbage_collector(enabled=False):
        plans = [pickle.loads(pickle.dumps(plan_of(workload, rank))) for rank in range(workload.ranks)]
        plans, metadata = DefaultSavePlanner(enable_plan_caching=True).create_global_plan(plans)
        finals = writer.prepare_global_plan(plans)
        # What the first save leaves in the cached metadata.
        results = [results_of(workload, rank, final) for rank, final in enumerate(finals)]
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        del plans, metadata, results
    return [_again(workload, writer, finals, SavePlan([], usable=False), enabled=enabled) for enabled in collectors]


def _again(workload: Workload, writer: Any, finals: list[Any], unchanged: Any, *, enabled: bool) -> dict[str, float]:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    # As in a run that goes on: what the cache holds has been looked at before.
    gc.collect()
    stages: dict[str, float] = {}
    with garbage_collector(enabled=enabled):
        gathered = [pickle.dumps(unchanged)] * workload.ranks
        with stopwatch(stages, "unpickle_plans_s"):
            plans = [pickle.loads(content) for content in gathered]
        with stopwatch(stages, "global_plan_s"):
            plans, metadata = DefaultSavePlanner(enable_plan_caching=True).create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
        with stopwatch(stages, "pickle_replies_s"):
            replies = [pickle.dumps(plan) for plan in plans]
        results_bytes, metadata_bytes = _finish(stages, workload, metadata, finals)
    return {
        **stages,
        "total_s": sum(stages.values()),
        "moved_bytes": sum(map(len, gathered)) + sum(map(len, replies)) + results_bytes,
        "metadata_bytes": metadata_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _unpickled(contents: list[bytes]) -> Iterator[Any]:
    """Yields the objects, dropping each's bytes."""
    for at, content in enumerate(contents):
        contents[at] = b""
        yield pickle.loads(content)


def _finish(stages: dict[str, float], workload: Workload, metadata: Any, finals: Iterable[Any]) -> tuple[int, int]:
    """Does what follows the writing of ``finals``; returns the bytes of the results and of ``.metadata``."""
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
    from torch.distributed.checkpoint.metadata import StorageMeta

    results = [pickle.dumps(results_of(workload, rank, final)) for rank, final in enumerate(finals)]
    results_bytes = sum(map(len, results))
    with stopwatch(stages, "unpickle_results_s"):
        written = [pickle.loads(content) for content in results]
    with stopwatch(stages, "write_metadata_s"):
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for rank in written for result in rank}
        metadata.storage_meta = StorageMeta(checkpoint_id="/checkpoint", save_id="save")
        metadata_bytes = _write(metadata)
    with stopwatch(stages, "pickle_broadcast_s"):
        pickle.dumps(metadata)
    return results_bytes, metadata_bytes


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
