"""What ranks do that save and load by torch's own functions; functions are found by name in the ranks' processes."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import async_save as torch_async_save
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from shardbook import Client, dcp
from shardbook.dcp.runtime import current
from tests.torch.alone import loads
from tests.torch.harness import Rank
from tests.torch.layouts import LAYOUTS, State, fill, spoil, wrong_pieces


class Renaming(DefaultLoadPlanner):
    """Edits the checkpoint's metadata in place, as planners of others do: what was ``five`` is loaded as ``cinq``."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Renames an entry, and cuts another one."""
        assert metadata is not None
        entry = metadata.state_dict_metadata.pop("five")
        assert isinstance(entry, TensorStorageMetadata)
        for at, chunk in enumerate(entry.chunks):
            place = metadata.storage_data.pop(MetadataIndex("five", chunk.offsets, at))
            metadata.storage_data[MetadataIndex("cinq", chunk.offsets, at)] = place
        metadata.state_dict_metadata["cinq"] = entry
        two = metadata.state_dict_metadata["two"]
        assert isinstance(two, TensorStorageMetadata)
        two.chunks = [chunk for chunk in two.chunks if chunk.offsets[0] == 0]
        super().set_up_planner(state_dict, metadata, is_coordinator)


def save_layouts(rank: Rank, layouts: list[str], directory: str, start: dict[str, Any]) -> list[Any]:
    """Saves layouts by torch's ``save``, then one of them again by Shardbook's into the same directory."""
    dcp.init(**start)
    results: list[Any] = []
    for step, layout in enumerate(layouts, 1):
        writer = dcp.ShardbookWriter(f"{directory}/{layout}", step=step)
        torch_save(fill(LAYOUTS[layout](rank)), storage_writer=writer)
        results.append(writer.result)
    # Both count attempts, so that they do not get in each other's way.
    again = dcp.save(fill(LAYOUTS[layouts[0]](rank)), checkpoint_id=f"{directory}/{layouts[0]}", step=1)
    return [*results, again]


def load_layouts(rank: Rank, layouts: dict[str, list[str]]) -> dict[str, Any]:
    """Loads layouts from their targets by torch's ``load``, with DCP's planner and with ours; returns what is wrong."""
    wrong: dict[str, Any] = {}
    for layout, targets in layouts.items():
        for target in targets:
            for planner in (None, dcp.ShardbookLoadPlanner()):
                state = spoil(LAYOUTS[layout](rank))
                torch_load(state, storage_reader=dcp.ShardbookReader(), checkpoint_id=target, planner=planner)
                wrong[f"{layout} {target} {planner}"] = _wrong(state)
    return {key: found for key, found in wrong.items() if found}


def load_renamed(rank: Rank, targets: list[str]) -> list[Any]:
    """Loads with a planner that edits the metadata; returns what is wrong."""
    wrong: list[Any] = []
    for target in targets:
        state = spoil(LAYOUTS["uneven"](rank))
        torch_load(
            {"cinq": state["five"], "one": state["one"]},
            storage_reader=dcp.ShardbookReader(target),
            planner=Renaming(),
        )
        wrong += wrong_pieces({"five": state["five"], "one": state["one"]})
    return wrong


def _wrong(state: State) -> list[str]:
    note = state.get("note", "value of note")
    return wrong_pieces(state) + ([] if note == "value of note" else [f"note: {note!r}"])


@dataclass(frozen=True)
class Background:
    """What saves in the background did.

    Attributes:
        result: Of the writer's last one.
        last: Result of the save in the trainer that followed.
    """

    result: dcp.SaveResult | None
    last: dcp.SaveResult | None


def save_in_background(rank: Rank, directory: str, by: str, start: dict[str, Any]) -> Background:
    """Saves two steps by torch's ``async_save``, then the second one again by its ``save``."""
    dcp.init(**start)
    kind = AsyncCheckpointerType(by)
    state = LAYOUTS["fsdp"](rank)
    # torch's executor makes a process; those of the tests may not, being daemons themselves.
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):  # type: ignore[attr-defined]
        writer = dcp.ShardbookWriter()
        for step in (1, 2):
            path = f"{directory}/step-{step}"
            future: Any = torch_async_save(
                fill(state), checkpoint_id=path, storage_writer=writer, async_checkpointer_type=kind
            )
            spoil(state)
            future.result()
    _async_process_executor._CHECKPOINT_PROCESS = None  # ends it
    last = dcp.ShardbookWriter(f"{directory}/step-2")
    torch_save(fill(state), storage_writer=last)
    return Background(writer.result, last.result)


class Fencing(DefaultSavePlanner):
    """Has another job take the run, on rank 0, between planning and writing."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Starts the other job's session."""
        runtime = current()
        if self.is_coordinator:
            other = dcp.new_session(runtime.session.run, runtime.config, on_live="takeover", job_id="another")
            dcp.start_session(other, Client(runtime.session.server), wait_s=0, deadline_s=30)
        return super().finish_plan(new_plan)


def save_fenced(rank: Rank, path: str, strict: bool, start: dict[str, Any]) -> Any:
    """Saves by torch's ``save`` while another job takes the run; returns the result, or what failed on which rank."""
    dcp.init(**start)
    writer = dcp.ShardbookWriter(path, strict=strict)
    try:
        torch_save(fill(LAYOUTS["uneven"](rank)), storage_writer=writer, planner=Fencing())
    except CheckpointException as error:
        return {failed: type(one[0]).__name__ for failed, one in error.failures.items()}
    return writer.result


def save_to_store(rank: Rank, url: str, start: dict[str, Any]) -> list[Any]:
    """Saves to an object store by Shardbook's ``save`` and by torch's."""
    _forget_stores(url)
    dcp.init(**start)
    state = fill(LAYOUTS["uneven"](rank))
    result = dcp.save(state, checkpoint_id=f"{url}/step-1")
    writer = dcp.ShardbookWriter(storage_writer=FsspecWriter(f"{url}/step-2"))
    torch_save(state, storage_writer=writer)
    return [result, writer.result]


def load_from_store(rank: Rank, targets: list[str], start: dict[str, Any]) -> list[str]:
    """Loads from an object store by Shardbook's ``load`` and by torch's; returns what is wrong."""
    _forget_stores(targets[0])
    dcp.init(**start)
    wrong: list[str] = []
    for target in targets:
        state = spoil(LAYOUTS["uneven"](rank))
        dcp.load(state, target)
        wrong += wrong_pieces(state)
        torch_load(spoil(state), storage_reader=dcp.ShardbookReader(target))
        wrong += wrong_pieces(state)
        if "://" in target:
            torch_load(spoil(state), checkpoint_id=target)
            wrong += wrong_pieces(state)
    return wrong


def loads_alike(_rank: Rank, target: str, start: dict[str, Any]) -> bool:
    """Returns whether a rank loads what ``some_state`` saved."""
    dcp.init(**start)
    return loads(target)


def _forget_stores(url: str) -> None:
    """What fsspec keeps of another test's server has this one's name."""
    import fsspec

    fsspec.get_filesystem_class(url.partition(":")[0]).clear_instance_cache()
