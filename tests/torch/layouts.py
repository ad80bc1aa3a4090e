"""State dicts of one small model under many parallelisms, with values that follow from names.

Every tensor's value is a function of its path in the state dict, its shape and dtype. So any rank can fill its part
of it, and any rank of another world can check its own part, without either knowing of the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.torch.harness import Rank

State = dict[str, Any]


def model() -> nn.Module:
    """A model whose rows do not divide by 4: shards are uneven, and some are empty."""
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))


def plain(rank: Rank) -> State:
    """No parallelism: every rank holds everything."""
    return _trained(model(), rank)


def fsdp(rank: Rank) -> State:
    """FSDP2 over all ranks."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    return _trained(_fsdp(model(), mesh), rank)


def hsdp(rank: Rank) -> State:
    """FSDP2 inside two replicas."""
    mesh = init_device_mesh("cpu", (2, rank.world_size // 2), mesh_dim_names=("replicate", "shard"))
    return _trained(_fsdp(model(), mesh), rank)


def tensor_parallel(rank: Rank) -> State:
    """Tensor parallel by two, FSDP2 over the rest."""
    mesh = init_device_mesh("cpu", (rank.world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    parallel = parallelize_module(model(), mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return _trained(_fsdp(parallel, mesh["dp"]), rank)


def pipeline(rank: Rank) -> State:
    """Two stages with keys of their own, FSDP2 inside each; plain tensors and objects that only one stage has."""
    mesh = init_device_mesh("cpu", (2, rank.world_size // 2), mesh_dim_names=("pp", "dp"))
    stage = rank.rank // (rank.world_size // 2)
    layer = _fsdp(nn.Linear(6 + stage, 9), mesh["dp"])
    return {
        f"stage{stage}": layer.state_dict(),
        f"buffers{stage}": {"running": torch.zeros(3 + stage), "count": torch.zeros((), dtype=torch.int64)},
        f"notes{stage}": {"name": _object(f"notes{stage}.name"), "list": [1, stage]},
        "shared": torch.zeros(4),
    }


def pipeline_whole(_: Rank) -> State:
    """What both stages of ``pipeline`` hold, on one rank."""
    return {
        **{f"stage{stage}": nn.Linear(6 + stage, 9).state_dict() for stage in (0, 1)},
        **{
            f"buffers{stage}": {"running": torch.zeros(3 + stage), "count": torch.zeros((), dtype=torch.int64)}
            for stage in (0, 1)
        },
        **{f"notes{stage}": {"name": "", "list": []} for stage in (0, 1)},
        "shared": torch.zeros(4),
    }


def submesh(rank: Rank, mesh: DeviceMesh | None = None) -> State:
    """DTensors on a mesh of some ranks only."""
    mesh = mesh or init_device_mesh("cpu", (rank.world_size,))
    return {"w": _dtensor((7, 3), mesh), "b": torch.zeros(3), "note": _object("note")}


def uneven(rank: Rank) -> State:
    """DTensors whose shards are uneven or empty, and tensors without elements."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    return {
        "five": _dtensor((5, 3), mesh),
        "two": _dtensor((2,), mesh),
        "one": _dtensor((1, 4), mesh),
        "wide": _dtensor((3, 5), mesh, 1),
        "none": _dtensor((0, 4), mesh),
        "empty": torch.zeros(0, 3),
        "scalar": torch.zeros(()),
    }


def sharded_tensor(rank: Rank) -> State:
    """ShardedTensors, as FSDP1 has them: five shards, dealt out in turn, so some ranks hold several."""
    bounds = [3 * shard for shard in range(5)]
    shards = [
        ShardMetadata(shard_offsets=[at, 0], shard_sizes=[3, 2], placement=f"rank:{number % rank.world_size}/cpu")
        for number, at in enumerate(bounds)
    ]
    metadata = ShardedTensorMetadata(
        shards_metadata=shards,
        size=torch.Size((15, 2)),
        tensor_properties=TensorProperties(dtype=torch.float32),
    )
    local = [LocalShard(torch.zeros(3, 2), shard) for shard in shards[rank.rank :: rank.world_size]]
    tensor = ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata)
    return {"st": {"w": tensor}, "plain": torch.zeros(2)}


def sharded_tensor_whole(_: Rank) -> State:
    """What ``sharded_tensor`` holds, on one rank."""
    return {"st": {"w": torch.zeros(15, 2)}, "plain": torch.zeros(2)}


def objects(_: Rank) -> State:
    """Plain tensors of many dtypes and objects, nested in dicts and lists; the same on every rank."""
    return {
        "tensors": [torch.zeros(2, 2), {"deep": [torch.zeros(()), torch.zeros(0)]}],
        "bf16": torch.zeros(3, dtype=torch.bfloat16),
        "f8": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "bool": torch.zeros(5, dtype=torch.bool),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "int": _object("int"),
        "none": None,
        "words": [_object("words.0"), {"k": (1, 2.5)}],
        "a.dotted\0 name": torch.zeros(1),
    }


def _fsdp(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(module, mesh=mesh)
    return module


def _trained(module: nn.Module, rank: Rank) -> State:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.25, foreach=False)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "model": module.state_dict(),
        "optim": optimizer.state_dict(),
        "note": _object("note"),
        "worlds": [rank.world_size],
    }


def _dtensor(shape: tuple[int, ...], mesh: DeviceMesh, dim: int = 0) -> DTensor:
    sizes, _ = compute_local_shape_and_global_offset(shape, mesh, [Shard(dim)])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        torch.zeros(sizes), mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def _object(path: str) -> str:
    return f"value of {path}"


def truth(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor at ``path``."""
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    noise = torch.randint(0, 120, shape, generator=generator)
    return noise.to(dtype) if dtype is not torch.bool else noise > 60


def pieces(state: State) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields (path, local piece, what it should be) of every tensor of a state dict; empty pieces included."""
    for path, value in _walk("", state):
        if isinstance(value, ShardedTensor):
            whole = truth(path, tuple(value.size()), value.dtype)
            for shard in value.local_shards():
                yield path, shard.tensor, _cut(whole, shard.metadata.shard_offsets, shard.metadata.shard_sizes)
        elif isinstance(value, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            yield path, value.to_local(), _cut(truth(path, tuple(value.shape), value.dtype), offsets, sizes)
        elif isinstance(value, torch.Tensor):
            yield path, value, truth(path, tuple(value.shape), value.dtype)


def _cut(whole: torch.Tensor, offsets: Any, sizes: Any) -> torch.Tensor:
    return whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(f"{path}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for at, inner in enumerate(value):
            yield from _walk(f"{path}.{at}", inner)
    else:
        yield path, value


def fill(state: State) -> State:
    """Gives every tensor its true value, in place."""
    with torch.no_grad():
        for _, piece, right in pieces(state):
            piece.copy_(right)
    return state


def spoil(state: State) -> State:
    """Gives every tensor another value, in place, so that what is loaded must have been loaded."""
    with torch.no_grad():
        for _, piece, right in pieces(state):
            piece.copy_(~right if right.dtype is torch.bool else torch.ones_like(piece))
    return state


def wrong_pieces(state: State) -> list[str]:
    """Returns the paths whose bytes are not what they should be."""
    return [path for path, piece, right in pieces(state) if not _same_bytes(piece, right)]


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.detach().contiguous(), other.contiguous()
    return one.shape == other.shape and one.dtype == other.dtype and bytes_of(one) == bytes_of(other)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Returns a contiguous tensor's memory."""
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def group_of(ranks: list[int]) -> dist.ProcessGroup | None:
    """Makes a group of some ranks; every rank of the world calls it. None on ranks outside."""
    group = dist.new_group(ranks)
    return group if dist.get_rank() in ranks else None


LAYOUTS: dict[str, Any] = {
    "plain": plain,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tensor_parallel": tensor_parallel,
    "pipeline": pipeline,
    "pipeline_whole": pipeline_whole,
    "submesh": submesh,
    "uneven": uneven,
    "sharded_tensor": sharded_tensor,
    "sharded_tensor_whole": sharded_tensor_whole,
    "objects": objects,
}
