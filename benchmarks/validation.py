"""Validation alone: are all chunks in bounds, apart, and the whole of their tensors? DCP's, and ``shardbook.core``'s.

Each gets what it works on ready made, already grouped by tensor: DCP its ``Metadata`` (``_validate_global_plan`` looks
at the number of the plans only), Shardbook columns. The objects that surround DCP's in a real coordinator, and make
the garbage collector slower, are left out.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.common import Timing, garbage_collector, in_fresh_process, interleave
from benchmarks.workload import Workload

Int64Array = npt.NDArray[np.int64]

#: One tensor whose sides differ, and in how many chunks it is cut.
SHAPE: Final = (1024, 8192)
CHUNKS: Final = 1024
#: As many of them, so that there is something to time.
TENSORS: Final = 100
_Columns = tuple[Int64Array, Int64Array, Int64Array, Int64Array]


def dcp_s(workload: Workload, collector: bool = True) -> float:
    """Returns the seconds of DCP's validation of ``workload``, in a fresh process."""
    return float(in_fresh_process(_dcp_s, columns_of(workload), collector).value)


def shardbook_s(workload: Workload, rounds: int = 5) -> tuple[Timing, Timing]:
    """Returns how long Shardbook validates ``workload``, and assembles it, validation included; in a fresh process."""
    timings: tuple[Timing, Timing] = in_fresh_process(_shardbook_s, workload, rounds).value
    return timings


def along_sides(chunks: int = CHUNKS, rounds: int = 9) -> dict[str, dict[str, Timing]]:
    """Returns the validation of tensors cut along their shorter and their longer side, by how they are cut.

    ``even`` cuts make equal chunks; ``uneven`` ones do not, so that they are no grid of equal steps; ``DCP`` is
    one tensor of the even ones through DCP's validation.
    """
    cuts = {"shorter": 0, "longer": 1}
    found = {}
    for name, uneven in (("even", False), ("uneven", True)):
        found[name] = interleave(
            {side: _judging(cut_columns(dim, chunks, TENSORS, uneven=uneven)) for side, dim in cuts.items()},
            rounds=rounds,
        )
    found["DCP"] = interleave(
        {side: _validating(cut_columns(dim, chunks, 1, uneven=False)) for side, dim in cuts.items()}, rounds=3
    )
    return found


def columns_of(workload: Workload) -> _Columns:
    """Returns chunk counts (T,), shapes (T, 2), offsets and sizes (N, 2) of ``workload``, tensor by tensor."""
    counts = np.full(workload.tensors, workload.chunks, dtype=np.int64)
    offsets = np.stack([workload.offsets(rank) for rank in range(workload.ranks)], axis=1).reshape(-1, 2)
    return counts, workload.shapes, offsets, np.repeat(workload.sizes, workload.chunks, axis=0)


def cut_columns(dim: int, chunks: int, tensors: int, *, uneven: bool) -> _Columns:
    """Returns the columns of ``tensors`` tensors of ``SHAPE``, cut along ``dim`` into ``chunks``.

    Uneven cuts make every second chunk larger than its neighbours; the tensor is four times as large in each
    dimension, so that a chunk has a row to spare.
    """
    shape = np.array(SHAPE, dtype=np.int64) * (4 if uneven else 1)
    lengths = np.full(chunks, shape[dim] // chunks, dtype=np.int64)
    if uneven:
        lengths[::2] -= 1
        lengths[1::2] += 1
    offsets = np.zeros((chunks, 2), dtype=np.int64)
    offsets[1:, dim] = np.cumsum(lengths)[:-1]
    sizes = np.tile(shape, (chunks, 1))
    sizes[:, dim] = lengths
    counts = np.full(tensors, chunks, dtype=np.int64)
    return counts, np.tile(shape, (tensors, 1)), np.tile(offsets, (tensors, 1)), np.tile(sizes, (tensors, 1))


def _judging(columns: _Columns) -> Any:
    from shardbook.core.geometry import judge

    def work() -> None:
        if not judge(*columns).is_valid:
            raise RuntimeError("a workload has to be valid")

    return work


def _shardbook_s(workload: Workload, rounds: int) -> tuple[Timing, Timing]:
    from benchmarks.simulated import rank_structures
    from shardbook.core.assembly import assemble

    structures = list(rank_structures(workload))
    index = np.arange(workload.ranks, dtype=np.int64)
    timings = interleave(
        {"judge": _judging(columns_of(workload)), "assemble": lambda: assemble(structures, index)}, rounds=rounds
    )
    return timings["judge"], timings["assemble"]


def _validating(columns: _Columns) -> Any:
    import torch
    from torch.distributed.checkpoint.default_planner import _validate_global_plan
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import SavePlan

    counts, shapes, offsets, sizes = (column.tolist() for column in columns)
    boxes = zip(offsets, sizes, strict=True)
    chunks = [ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(size)) for offset, size in boxes]
    tensors: dict[str, Any] = {}
    first = 0
    for at, (count, shape) in enumerate(zip(counts, shapes, strict=True)):
        own = chunks[first : first + count]
        tensors[str(at)] = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size(shape), own)
        first += count
    metadata, plans = Metadata(tensors), [SavePlan([])] * 2

    def work() -> None:
        if _validate_global_plan(plans, metadata):
            raise RuntimeError("a workload has to be valid")

    return work


def _dcp_s(columns: _Columns, collector: bool) -> float:
    with garbage_collector(enabled=False):
        work = _validating(columns)
    with garbage_collector(enabled=collector):
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
