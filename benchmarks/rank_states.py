"""State dicts of simulated ranks: real DTensors on a real mesh, of a process group that talks to nobody.

Every local tensor is a view of one buffer that is never touched, so a state dict takes no memory worth mentioning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.layouts import Layout
from benchmarks.loadable import Job, plan_of_rank
from benchmarks.workload import Workload


@dataclass(frozen=True)
class _Sharding:
    """The ranks that share a rank's tensors, and how each tensor is cut over them."""

    mesh: DeviceMesh
    placements: list[tuple[Placement, ...]]


def state_dict_of(job: Job, rank: int) -> dict[str, Any]:
    """Returns what a rank loads into; makes this process that rank."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=job.ranks, store=FakeStore())
    plan = plan_of_rank(job, rank)
    sharding = _of_layout(job, rank) if isinstance(job, Layout) else _of_workload(job)
    sizes = [row[:ndim] for row, ndim in zip(plan.sizes.tolist(), plan.table.ndims.tolist(), strict=True)]
    shapes = [row[:ndim] for row, ndim in zip(plan.table.shapes.tolist(), plan.table.ndims.tolist(), strict=True)]
    buffer = torch.empty(int(plan.sizes.prod(axis=1).max()), dtype=torch.bfloat16)
    columns = zip(plan.table.fqns, sizes, shapes, sharding.placements, strict=True)
    return {
        fqn: DTensor.from_local(
            buffer[: int(np.prod(size))].view(size),
            sharding.mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=(shape[1], 1) if len(shape) > 1 else (1,),
        )
        for fqn, size, shape, placements in columns
    }


def _of_workload(job: Workload) -> _Sharding:
    if job.layout == "row":
        mesh = DeviceMesh("cpu", torch.arange(job.ranks), _init_backend=False)
        return _Sharding(mesh, [(Shard(0),)] * job.tensors)
    mesh = DeviceMesh("cpu", torch.arange(job.ranks).view(job.grid), _init_backend=False)
    return _Sharding(mesh, [(Shard(0), Shard(1))] * job.tensors)


def _of_layout(job: Layout, rank: int) -> _Sharding:
    """The ranks of a stage: tensor parallelism cuts first, and the shards what it leaves."""
    stage_ranks = job.shards * job.tensor_parallel
    stage, first = rank % job.distinct_plans // stage_ranks, rank // stage_ranks * stage_ranks
    ranks = torch.arange(first, first + stage_ranks).view(job.shards, job.tensor_parallel).T.contiguous()
    cuts = job.stage[stage].cut.tolist()
    placements: list[tuple[Placement, ...]] = [(Shard(dim) if dim >= 0 else Replicate(), Shard(0)) for dim in cuts]
    return _Sharding(DeviceMesh("cpu", ranks, _init_backend=False), placements)
