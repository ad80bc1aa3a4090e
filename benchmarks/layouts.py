"""How real jobs cut their tensors: the parallel layouts that the figures at scale are about.

The model is Llama-3.1-405B's: 1,137 parameters and their two Adam moments, 3,411 tensors. Fully sharded data
parallelism cuts the first dimension of what a rank's tensor parallel group leaves it, as FSDP2 does: into equal parts
but for the last, which may be smaller or empty. Norms are replicated over tensor parallel ranks, whole shards over
the replicas of HSDP: those are what planning deduplicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from shardbook.core.dtype import dtype_code
from shardbook.core.structure import FileName, RankPlan, RankStructure
from shardbook.core.table import EntryKind, TensorTable

Int64Array = npt.NDArray[np.int64]

_HIDDEN, _FFN, _KV, _VOCABULARY, _LAYERS = 16384, 53248, 1024, 128256, 126
#: Parameters of a layer: name, shape, and the dimension that tensor parallelism cuts (-1: replicated).
_LAYER: Final = (
    ("self_attn.q_proj.weight", (_HIDDEN, _HIDDEN), 0),
    ("self_attn.k_proj.weight", (_KV, _HIDDEN), 0),
    ("self_attn.v_proj.weight", (_KV, _HIDDEN), 0),
    ("self_attn.o_proj.weight", (_HIDDEN, _HIDDEN), 1),
    ("mlp.gate_proj.weight", (_FFN, _HIDDEN), 0),
    ("mlp.up_proj.weight", (_FFN, _HIDDEN), 0),
    ("mlp.down_proj.weight", (_HIDDEN, _FFN), 1),
    ("input_layernorm.weight", (_HIDDEN,), -1),
    ("post_attention_layernorm.weight", (_HIDDEN,), -1),
)
_GROUPS: Final = ("model", "optim.state.exp_avg", "optim.state.exp_avg_sq")
_ITEM_BYTES: Final = 2

_Parameter = tuple[str, tuple[int, ...], int]


@lru_cache(maxsize=1)
def _llama() -> list[_Parameter]:
    layers = [(f"layers.{at}.{name}", shape, dim) for at in range(_LAYERS) for name, shape, dim in _LAYER]
    return [
        ("embed_tokens.weight", (_VOCABULARY, _HIDDEN), 0),
        *layers,
        ("norm.weight", (_HIDDEN,), -1),
        ("lm_head.weight", (_VOCABULARY, _HIDDEN), 0),
    ]


@dataclass(frozen=True)
class _Stage:
    """The tensors of one pipeline stage.

    Attributes:
        table: Names, shapes and dtypes.
        cut: (T,) dimension that tensor parallelism cuts, -1 where it replicates.
    """

    table: TensorTable
    cut: Int64Array

    @classmethod
    def of(cls, parameters: list[_Parameter]) -> _Stage:
        fqns = tuple(f"{group}.{name}" for name, _, _ in parameters for group in _GROUPS)
        count = len(fqns)
        shapes = np.ones((len(parameters), 2), dtype=np.int64)
        for at, (_, shape, _) in enumerate(parameters):
            shapes[at, : len(shape)] = shape
        ndims = np.array([len(shape) for _, shape, _ in parameters], dtype=np.int64)
        table = TensorTable(
            fqns=fqns,
            kinds=np.full(count, EntryKind.SHARD, dtype=np.uint8),
            dtypes=np.full(count, dtype_code("bfloat16"), dtype=np.uint8),
            layouts=np.zeros(count, dtype=np.uint8),
            memory_formats=np.zeros(count, dtype=np.uint8),
            ndims=np.repeat(ndims, len(_GROUPS)),
            shapes=np.repeat(shapes, len(_GROUPS), axis=0),
            key_paths=tuple((fqn, tuple(fqn.split(".", 1))) for fqn in fqns),
        )
        return cls(table, np.repeat(np.array([dim for _, _, dim in parameters], dtype=np.int64), len(_GROUPS)))


@dataclass(frozen=True)
class Layout:
    """A job's ranks: replicas, pipeline stages, shards and tensor parallel ranks, the last varying fastest.

    Attributes:
        name: What the tables call it.
        shards: Ranks that FSDP divides a stage's tensors over.
        tensor_parallel: Ranks that divide every matrix.
        stages: Pipeline stages.
        replicas: Copies of the whole, as in HSDP.
    """

    name: str
    shards: int
    tensor_parallel: int = 1
    stages: int = 1
    replicas: int = 1

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.replicas * self.distinct_plans

    @property
    def distinct_plans(self) -> int:
        """Plans that differ: replicas have the same ones."""
        return self.stages * self.shards * self.tensor_parallel

    @cached_property
    def stage(self) -> list[_Stage]:
        """The tensors of each stage: layers are spread evenly, the ends carry embeddings and head."""
        parameters = _llama()
        bounds = np.linspace(0, _LAYERS, self.stages + 1).round().astype(int) * len(_LAYER) + 1
        bounds[0], bounds[-1] = 0, len(parameters)
        return [_Stage.of(parameters[low:high]) for low, high in pairwise(bounds)]

    def plan(self, rank: int) -> RankPlan:
        """Returns the items of a rank before deduplication: a box of every tensor of its stage, some of them empty."""
        stage_at, within = divmod(rank % self.distinct_plans, self.shards * self.tensor_parallel)
        shard, tp = divmod(within, self.tensor_parallel)
        stage = self.stage[stage_at]
        sizes = stage.table.shapes.copy()
        offsets = np.zeros_like(sizes)
        for dim in (0, 1):
            cut = stage.cut == dim
            sizes[cut, dim] //= self.tensor_parallel
            offsets[cut, dim] = sizes[cut, dim] * tp
        part = -(-sizes[:, 0] // self.shards)
        first = np.minimum(part * shard, sizes[:, 0])
        offsets[:, 0] += first
        sizes[:, 0] = np.minimum(part, sizes[:, 0] - first)
        return RankPlan(stage.table, np.arange(len(sizes), dtype=np.int64), offsets, sizes)


def written(plan: RankPlan, kept: Int64Array) -> RankStructure:
    """Returns what a rank wrote that kept some items of its plan: one file, in the plan's order."""
    lengths = plan.sizes[kept].prod(axis=1) * _ITEM_BYTES + 1200 + kept % 5
    files = (FileName(True, "0.distcp"),) if len(kept) else ()
    counts = np.array([len(kept)], dtype=np.int64) if len(kept) else np.zeros(0, dtype=np.int64)
    return RankStructure(plan, kept, files, counts, np.arange(len(kept), dtype=np.int64), lengths.astype(np.int64))


def fsdp(ranks: int) -> Layout:
    """Returns FSDP over ``ranks``."""
    return Layout(f"FSDP {ranks}", shards=ranks)


def llama_405b(scale: int = 1) -> Layout:
    """Returns TP8 x FSDP128 x PP16, 16,384 ranks; ``scale`` divides the shards."""
    shards = 128 // scale
    return Layout(f"TP8 x FSDP{shards} x PP16", shards=shards, tensor_parallel=8, stages=16)


def hsdp(replicas: int = 32, shards: int = 512) -> Layout:
    """Returns HSDP: ``replicas`` copies of FSDP over ``shards``."""
    return Layout(f"HSDP {shards} x {replicas}", shards=shards, replicas=replicas)
