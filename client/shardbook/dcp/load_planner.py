"""The load planner: one question for a rank's boxes, every misfit told at once, and nothing run that is read."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from shardbook.core.found import FoundChunks
from shardbook.core.table import printable
from shardbook.dcp._torch import flattened_as_2_3, set_element
from shardbook.dcp.lazy import LazyMetadata
from shardbook.dcp.load_report import LoadReport, compare
from shardbook.dcp.metadata import paused_gc
from shardbook.dcp.plain_source import query_metadata
from shardbook.dcp.read_items import places, read_items
from shardbook.dcp.state_boxes import StateBoxes, state_boxes
from shardbook.errors import CheckpointMismatchError, FailedPreconditionError, Mismatch, MismatchKind

_HINT: Final = (
    "Nothing was loaded. strict=False loads what fits; a planner with allow_partial_load=True bears with names that "
    "the checkpoint lacks, and allow_dtype_change=True converts"
)


class ShardbookLoadPlanner(DefaultLoadPlanner):
    """DCP's default load planner, at the cost of what this rank loads.

    It differs in this: the rank's own boxes are all that it asks for; keys that are missing, of another shape, kind or
    dtype are reported together, before anything is read; entries that are not tensors load with
    ``weights_only=True``. Derive from it where you would derive from ``DefaultLoadPlanner``. It works with torch's own
    ``load``, too, on whatever metadata that read.

    Args:
        flatten_state_dict: As in DCP.
        flatten_sharded_tensors: As in DCP.
        allow_partial_load: As in DCP: names that the checkpoint lacks are left alone, and reported.
        weights_only: False unpickles whatever the checkpoint holds, which can run any code: only for checkpoints
            that you trust as you trust your own programs.
        strict: False loads what fits and reports the rest.
        allow_dtype_change: True converts tensors of another dtype, as DCP does.
        refuse_unexpected: True reports entries of the checkpoint that the state dict lacks, which DCP never does. The
            names of the whole checkpoint are fetched for it.

    Attributes:
        report: What became of the plan; None before it was made.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        weights_only: bool = True,
        strict: bool = True,
        allow_dtype_change: bool = False,
        refuse_unexpected: bool = False,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.weights_only = weights_only
        self.strict = strict
        self.allow_dtype_change = allow_dtype_change
        self.refuse_unexpected = refuse_unexpected
        self.report: LoadReport | None = None

    def create_local_plan(self) -> LoadPlan:
        """Returns what this rank reads.

        Raises:
            CheckpointMismatchError: The checkpoint does not fit the state dict.
            ShardbookError: It cannot be asked.
        """
        with paused_gc():
            return self._planned()

    def _planned(self) -> LoadPlan:
        boxes, found = self._asked()
        mismatches = compare(found, boxes) + self._unexpected(boxes)
        refused = [one for one in mismatches if self._refuses(one)]
        if refused:
            raise CheckpointMismatchError(refused, _HINT)
        items, keys = read_items(found, boxes)
        if isinstance(self.metadata, LazyMetadata):
            self.metadata.note_places(places(found, keys))
        unread = sum(one.kind not in (MismatchKind.DTYPE, MismatchKind.UNEXPECTED) for one in mismatches)
        self.report = LoadReport(tuple(mismatches), len(boxes.dtypes) - unread, len(items))
        return LoadPlan(items)

    def _asked(self) -> tuple[StateBoxes, FoundChunks]:
        """Asks for the state dict's boxes; takes it as torch 2.3 flattened it where the checkpoint was saved so."""
        old, mappings = self._as_2_3()
        others = [key for key in old if key not in self.state_dict]
        boxes = state_boxes(self.state_dict, others)
        found = self._query(boxes)
        if found.found[len(self.state_dict) :].any():
            self.state_dict, self.mappings = dict(old), dict(mappings)
            boxes = state_boxes(self.state_dict)
            found = self._query(boxes)
        return boxes, found

    def _as_2_3(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        kinds = set(map(type, self.original_state_dict.values()))  # few, of thousands of values
        if not self.flatten_state_dict or not any(issubclass(kind, (Mapping, list, tuple)) for kind in kinds):
            return {}, {}
        return flattened_as_2_3(self.original_state_dict)

    def _query(self, boxes: StateBoxes) -> FoundChunks:
        if self.metadata is None:
            raise AssertionError("set_up_planner comes before create_local_plan")
        if isinstance(self.metadata, LazyMetadata):
            return self.metadata.query(boxes.wanted)
        return query_metadata(self.metadata, boxes.wanted)

    def _unexpected(self, boxes: StateBoxes) -> list[Mismatch]:
        if not self.refuse_unexpected or self.metadata is None:
            return []
        lazy = self.metadata if isinstance(self.metadata, LazyMetadata) else None
        names: Sequence[str] = list(self.metadata.state_dict_metadata) if lazy is None else lazy.source.fqns()
        known = set(boxes.wanted.fqns)
        return [Mismatch(fqn, MismatchKind.UNEXPECTED, found="an entry") for fqn in names if fqn not in known]

    def _refuses(self, mismatch: Mismatch) -> bool:
        if not self.strict:
            return False
        if mismatch.kind is MismatchKind.MISSING:
            return not self.allow_partial_load
        return mismatch.kind is not MismatchKind.DTYPE or not self.allow_dtype_change

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts a loaded entry where it belongs in the state dict.

        Raises:
            FailedPreconditionError: The entry would run code (reason ``UNSAFE_ENTRY``).
        """
        fqn = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=self.weights_only)
        except pickle.UnpicklingError as error:
            raise FailedPreconditionError(
                f"{printable(fqn)!r} is not plain data: {str(error).splitlines()[0]} If you trust whoever wrote the "
                "checkpoint, pass weights_only=False",
                reason="UNSAFE_ENTRY",
                metadata={"fqn": printable(fqn)},
            ) from error
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            self.state_dict[fqn] = loaded


#: The name it had before it was ShardbookLoadPlanner.
LoadPlanner = ShardbookLoadPlanner
