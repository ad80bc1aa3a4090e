"""The workload family ``W(ranks, tensors, chunks)`` that every figure of Shardbook is about.

Matrices with the shapes of a Llama-3-70B layer and its two Adam moments, each cut into as many equal chunks; chunk c
of every tensor lies on rank c. ``row`` cuts the first dimension, as FSDP2 does: three of a layer's seven weights are
cut along their shorter side. ``grid`` cuts both dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Layout = Literal["row", "grid"]

#: Seven matrices of a layer: name and shape.
LAYER = (
    ("self_attn.q_proj.weight", (8192, 8192)),
    ("self_attn.k_proj.weight", (1024, 8192)),
    ("self_attn.v_proj.weight", (1024, 8192)),
    ("self_attn.o_proj.weight", (8192, 8192)),
    ("mlp.gate_proj.weight", (28672, 8192)),
    ("mlp.up_proj.weight", (28672, 8192)),
    ("mlp.down_proj.weight", (8192, 28672)),
)
GROUPS = ("model", "optim.state.exp_avg", "optim.state.exp_avg_sq")

#: (ranks, tensors, chunks) of the standard sizes.
STANDARD = {"a": (64, 500, 64), "b": (256, 1000, 256), "c": (1024, 1000, 1024)}

#: Bytes of one element: every tensor is bfloat16.
ITEM_BYTES = 2


@dataclass(frozen=True)
class Workload:
    """Tensors and how they are cut.

    Attributes:
        ranks: Ranks that hold a chunk of every tensor; equal to ``chunks``.
        tensors: Number of tensors.
        chunks: Chunks of each tensor.
        layout: ``row`` or ``grid``.

    Raises:
        ValueError: The chunks do not divide the tensors evenly, or there is not one for each rank.
    """

    ranks: int
    tensors: int
    chunks: int
    layout: Layout = "row"

    def __post_init__(self) -> None:
        if self.ranks != self.chunks or self.ranks < 1 or self.tensors < 1:
            raise ValueError("a rank holds exactly one chunk of every tensor")
        rows, columns = self.grid
        if rows * columns != self.chunks:
            raise ValueError(f"{self.chunks} chunks make no square grid")
        if any(shape[0] % rows or shape[1] % columns for _, shape in LAYER):
            raise ValueError(f"{rows} x {columns} chunks do not divide the tensors evenly")

    @classmethod
    def standard(cls, name: str, layout: Layout = "row") -> Workload:
        """Returns workload ``a``, ``b`` or ``c``."""
        return cls(*STANDARD[name], layout)

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks along the first and the second dimension."""
        if self.layout == "row":
            return self.chunks, 1
        side = math.isqrt(self.chunks)
        return side, side

    @property
    def chunk_count(self) -> int:
        """Chunks in all."""
        return self.tensors * self.chunks

    @cached_property
    def fqns(self) -> tuple[str, ...]:
        """Names, (T,): the parameters and moments of one layer after the other."""
        return tuple(self._fqn(t) for t in range(self.tensors))

    @staticmethod
    def _fqn(tensor: int) -> str:
        parameter, group = divmod(tensor, len(GROUPS))
        layer, weight = divmod(parameter, len(LAYER))
        return f"{GROUPS[group]}.layers.{layer}.{LAYER[weight][0]}"

    @cached_property
    def shapes(self) -> Int64Array:
        """Shapes of the tensors, (T, 2) elements."""
        layer = np.array([shape for _, shape in LAYER], dtype=np.int64)
        return layer[np.arange(self.tensors) // len(GROUPS) % len(LAYER)]

    @cached_property
    def sizes(self) -> Int64Array:
        """Size of each tensor's chunks, (T, 2) elements: the same on every rank."""
        return self.shapes // np.array(self.grid, dtype=np.int64)

    def offsets(self, rank: int) -> Int64Array:
        """Returns where rank's chunk of each tensor begins, (T, 2) elements."""
        return self.sizes * np.array(divmod(rank, self.grid[1]), dtype=np.int64)

    @cached_property
    def lengths(self) -> Int64Array:
        """Bytes of each tensor's chunk in a file, (T,): its data and what ``torch.save`` puts around it."""
        lengths: Int64Array = self.sizes.prod(axis=1) * ITEM_BYTES + 1200 + np.arange(self.tensors) % 5
        return lengths

    def __str__(self) -> str:
        return f"W({self.ranks}, {self.tensors}, {self.chunks}) {self.layout}"
