"""What a load did not find as the state dict has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from shardbook.core.dtype import dtype_name
from shardbook.core.found import FoundChunks
from shardbook.core.wanted import widened
from shardbook.dcp._names import dtype_code
from shardbook.dcp.state_boxes import StateBoxes
from shardbook.errors import Mismatch, MismatchKind


@dataclass(frozen=True)
class LoadReport:
    """What became of a load.

    Attributes:
        mismatches: Entries that do not fit, in the order of the state dict. Of another dtype they were converted, of
            another kind or shape or missing they were left as they were.
        entry_count: Entries of this rank's state dict that the checkpoint has and that fit.
        item_count: Reads that were planned for them.
    """

    mismatches: tuple[Mismatch, ...] = ()
    entry_count: int = 0
    item_count: int = 0

    @property
    def is_exact(self) -> bool:
        """True when every entry of the state dict was loaded as it is."""
        return not self.mismatches

    def of(self, kind: MismatchKind) -> tuple[str, ...]:
        """Returns the names that differ in one way."""
        return tuple(mismatch.fqn for mismatch in self.mismatches if mismatch.kind is kind)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the checkpoint lacks."""
        return self.of(MismatchKind.MISSING)


def compare(found: FoundChunks, boxes: StateBoxes) -> list[Mismatch]:
    """Returns how the checkpoint's entries differ from the state dict's, in its order.

    What the checkpoint has not as a tensor fits whatever the state dict holds: it takes its place, as in DCP.
    """
    count = len(boxes.dtypes)
    is_tensor = np.fromiter((dtype is not None for dtype in boxes.dtypes), np.bool_, count)
    codes: dict[torch.dtype, int] = {}
    own = [0 if dtype is None else _code(codes, dtype) for dtype in boxes.dtypes]
    width = max(found.shapes.shape[1], found.wanted.shapes.shape[1])
    differs = widened(found.shapes[:count], width, 1) != widened(found.wanted.shapes[:count], width, 1)
    reshaped = differs.any(axis=1) | (found.ndims[:count] != found.wanted.ndims[:count])
    retyped = found.dtypes[:count] != np.array(own, dtype=np.int64)
    fits = found.found[:count] & (found.is_bytes[:count] | (is_tensor & ~reshaped & ~retyped))
    return list(_told(found, boxes, np.flatnonzero(~fits).tolist()))


def _code(codes: dict[torch.dtype, int], dtype: torch.dtype) -> int:
    if dtype not in codes:
        codes[dtype] = dtype_code(dtype, "")
    return codes[dtype]


def _told(found: FoundChunks, boxes: StateBoxes, tensors: list[int]) -> Iterator[Mismatch]:
    for tensor in tensors:
        fqn, dtype = found.wanted.fqns[tensor], boxes.dtypes[tensor]
        shape = found.wanted.shape_of(tensor)
        expected = "no tensor" if dtype is None else f"{str(dtype).removeprefix('torch.')} {shape}"
        if not found.found[tensor]:
            yield Mismatch(fqn, MismatchKind.MISSING, expected)
            continue
        stored = f"{dtype_name(int(found.dtypes[tensor]))} {found.shape_of(tensor)}"
        if dtype is None:
            kind = MismatchKind.KIND
        else:
            kind = MismatchKind.SHAPE if found.shape_of(tensor) != shape else MismatchKind.DTYPE
        yield Mismatch(fqn, kind, expected, stored)
