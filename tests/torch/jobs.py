"""What the ranks of these tests do; functions are found by name in the ranks' processes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    SerializationFormat,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.device_mesh import DeviceMesh

from shardbook import _transport, dcp
from shardbook.dcp import attempt
from shardbook.dcp.finishing import Finisher, Outcome
from shardbook.errors import ForkedClientError
from tests.torch.detector import detector
from tests.torch.harness import Rank
from tests.torch.layouts import LAYOUTS, fill, group_of, spoil, submesh, wrong_pieces


def speak(rank: Rank, how: str) -> list[str]:
    """Says something to the other ranks in one of many ways; returns what the detector noticed."""
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (rank.world_size,))
    sharded = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    group = dist.group.WORLD
    assert group is not None
    ways: dict[str, Any] = {
        "barrier": dist.barrier,
        "objects": lambda: dist.broadcast_object_list([1], src=0),
        "method": lambda: group.allreduce([torch.ones(1)]).wait(),
        "c++": lambda: torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(torch.ones(1), "sum", group.group_name)
        ),
        "functional": lambda: all_reduce(torch.ones(1), "sum", group),
        "dtensor": sharded.full_tensor,
        "store": lambda: dist.distributed_c10d._get_default_store().set("k", "v"),
        "nothing": lambda: None,
    }
    with detector() as seen:
        ways[how]()
    return seen


@dataclass(frozen=True)
class Saved:
    """What a rank's save did.

    Attributes:
        results: One a save.
        noticed: What the rank said to others meanwhile.
    """

    results: list[dcp.SaveResult]
    noticed: list[str]


def save(rank: Rank, layout: str, paths: list[str], start: dict[str, Any], options: dict[str, Any]) -> Saved:
    """Saves a layout into each of ``paths``; the last one by ``async_save`` when there are several."""
    dcp.init(**start)
    state = fill(LAYOUTS[layout](rank))
    with detector() as noticed:
        results = [dcp.save(state, checkpoint_id=path, **options) for path in paths[: max(1, len(paths) - 1)]]
        if len(paths) > 1:
            response = dcp.async_save(state, checkpoint_id=paths[-1], **options)
            response.staging_completion.result()
            results.append(response.result())
    return Saved(results, noticed)


def save_unhurried(rank: Rank, layout: str, paths: list[str], start: dict[str, Any]) -> Saved:
    """Saves as ``save`` does, on a machine so slow that waiting long is nothing to wonder about."""
    first = mock.patch.object(attempt, "_FIRST_WAIT_S", 20.0)
    with first, mock.patch.multiple(_transport, _FIRST_LOOK_S=20.0, _LEAST_LOOK_S=20.0):
        return save(rank, layout, paths, start, {})


def load(rank: Rank, layout: str, targets: list[str], plain_dcp: bool = False) -> dict[str, list[str]]:
    """Loads each of ``targets`` into a layout; returns what is wrong with each, and what the rank said to others."""
    wrong: dict[str, list[str]] = {}
    for target in targets:
        state = spoil(LAYOUTS[layout](rank))
        with detector() as noticed:
            if plain_dcp:
                torch_load(state, checkpoint_id=target)
            else:
                dcp.load(state, target)
        wrong[target] = wrong_pieces(state) + ([] if plain_dcp else noticed)
        if "note" in state and state["note"] != "value of note":
            wrong[target].append(f"note: {state['note']!r}")
    return wrong


def load_some(rank: Rank, keys: list[list[str]], target: str) -> list[str]:
    """Loads the keys that are the rank's; returns what is wrong with them, and what the rank said to others."""
    whole = spoil(LAYOUTS["plain"](rank))
    state = {key: whole[key] for key in keys[rank.rank]}
    with detector() as noticed:
        report = dcp.load(state, target)
    assert report.is_exact
    return wrong_pieces(state) + noticed


class _ReadOnly(FileSystem):
    """A mount that takes nothing."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
        with super().create_stream(path, mode) as stream:
            yield stream


def load_read_only(rank: Rank, layout: str, path: str) -> dict[str, list[str]]:
    """Loads from a read-only mount; returns what is wrong, as ``load`` does."""
    reader = FileSystemReader(path)
    reader.fs = _ReadOnly()
    state = spoil(LAYOUTS[layout](rank))
    dcp.load(state, storage_reader=reader)
    return {path: wrong_pieces(state)}


class _NoRecords(FileSystem):
    """A store that takes everything but registration records, and says so in words of its own."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if "w" in mode and ".record" in os.fspath(path):
            raise LookupError("503")
        with super().create_stream(path, mode) as stream:
            yield stream


def save_without_record(rank: Rank, start: dict[str, Any], path: str, failing_rank: int) -> dcp.SaveResult:
    """Saves while one rank cannot leave its record."""
    dcp.init(**start)
    writer = FileSystemWriter(path)
    if rank.rank == failing_rank:
        writer.fs = _NoRecords()
    return dcp.save(fill(LAYOUTS["uneven"](rank)), storage_writer=writer)


class _Unreadable(FileSystem):
    """A disk that does not give back some of what was written to it."""

    def __init__(self, what: str) -> None:
        self._what = what

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode == "rb" and os.fspath(path).endswith(self._what):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with super().create_stream(path, mode) as stream:
            yield stream


def save_unreadable(rank: Rank, start: dict[str, Any], path: str, what: str) -> dcp.SaveResult:
    """Saves to a disk that gives back no file whose name ends in ``what``."""
    dcp.init(**start)
    writer = FileSystemWriter(path)
    writer.fs = _Unreadable(what)
    return dcp.save(fill(LAYOUTS["uneven"](rank)), storage_writer=writer)


def init_only(_: Rank, start: dict[str, Any]) -> list[str]:
    """Starts a session; returns what that said to others."""
    with detector() as noticed:
        dcp.init(**start)
    return noticed


def save_submesh(rank: Rank, ranks: list[int], path: str, start: dict[str, Any]) -> dcp.SaveResult | None:
    """Saves from a group of some ranks; the others do nothing and return None."""
    group = group_of(ranks)
    mesh = DeviceMesh("cpu", ranks)
    if rank.rank not in ranks:
        return None
    dcp.init(process_group=group, **start)
    with detector() as noticed:
        result = dcp.save(fill(submesh(rank, mesh)), checkpoint_id=path, process_group=group)
    assert [] == noticed
    return result


def save_twice(rank: Rank, layout: str, ours: str, theirs: str, start: dict[str, Any]) -> None:
    """Saves the same state by Shardbook and by DCP itself."""
    dcp.init(**start)
    state = fill(LAYOUTS[layout](rank))
    dcp.save(state, checkpoint_id=ours)
    torch_save(state, checkpoint_id=theirs)


def start_session(rank: Rank, start: dict[str, Any], by_rank: dict[str, Any]) -> dcp.Session:
    """Starts a session; ``by_rank`` are arguments that get the rank's own number."""
    return dcp.init(**start, **{name: value[rank.rank] for name, value in by_rank.items()})


def save_carried(rank: Rank, session: dcp.Session, path: str) -> dcp.SaveResult:
    """Saves in a session that the caller carried over, without any process group."""
    dcp.init(session=session, rank=rank.rank, world_size=rank.world_size)
    return dcp.save({"w": torch.arange(3.0), f"own{rank.rank}": torch.ones(1)}, checkpoint_id=path)


def save_parts(rank: Rank, start: dict[str, Any], path: str) -> list[dcp.SaveResult]:
    """Saves two parts of a step; the second one's session starts with its first save, on whichever rank is first."""
    dcp.init(**start)
    state = fill(LAYOUTS["uneven"](rank))
    return [dcp.save(state, checkpoint_id=f"{path}/{part}-1", part=part) for part in ("default", "optim", "optim")]


def save_no_dist(rank: Rank, start: dict[str, Any], path: str) -> None:
    """Tries to save as if alone."""
    dcp.init(**start)
    dcp.save({"w": torch.ones(1)}, checkpoint_id=path, no_dist=True)


def init_too_early(rank: Rank, start: dict[str, Any], store: str, path: str) -> None:
    """Starts a session before the process group is there, and saves with it."""
    dcp.init(rank=0, world_size=1, **start)
    dist.init_process_group("gloo", store=dist.FileStore(store), rank=rank.rank, world_size=rank.world_size)
    dist.barrier()
    dcp.save({"w": torch.ones(1)}, checkpoint_id=path)


def save_unfolded(rank: Rank, layout: str, path: str, start: dict[str, Any]) -> None:
    """Saves; the coordinator goes before it folds the records."""
    dcp.init(**start)
    original = Finisher.coordinate
    Finisher.coordinate = lambda *_: Outcome(dcp.SaveState.UNREGISTERED, "gone")  # type: ignore[method-assign]
    try:
        dcp.save(fill(LAYOUTS[layout](rank)), checkpoint_id=path)
    finally:
        Finisher.coordinate = original  # type: ignore[method-assign]


def save_lopsided(rank: Rank, path: str, start: dict[str, Any], options: dict[str, Any]) -> dcp.SaveResult:
    """Saves a state dict that only rank 0 holds anything of."""
    dcp.init(**start)
    return dcp.save({"w": torch.ones(3)} if rank.rank == 0 else {}, checkpoint_id=path, **options)


def save_in_fork(rank: Rank, start: dict[str, Any], path: str) -> tuple[str, str, str]:
    """Saves, then tries to from a forked child, then saves again; returns the states and the child's error."""
    dcp.init(**start)
    state = {"w": torch.ones(rank.world_size)}
    before = dcp.save(state, checkpoint_id=f"{path}/step-1")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        told = "nothing"
        try:
            dcp.save(state, checkpoint_id=f"{path}/step-2")
        except ForkedClientError as error:
            told = error.reason
        finally:
            os.write(writing, told.encode())
            os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reading, 100).decode()
    after = dcp.save(state, checkpoint_id=f"{path}/step-3")
    return before.state, told, after.state


def compare_plans(rank: Rank, layout: str, path: str, ref: str, server: str) -> list[Any]:
    """Plans a load with DCP's planner and with ours from three sources; returns the items that differ."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    from shardbook import Client
    from shardbook.core.names import CheckpointName
    from shardbook.dcp.lazy import LazyMetadata
    from shardbook.dcp.loading import lazy_directory_metadata
    from shardbook.sources import ServiceSource
    from shardbook.stores import Stores
    from tests.torch.test_load_planner import planned

    metadata = FileSystemReader(path).read_metadata()
    own = LazyMetadata(ServiceSource(Client(server), CheckpointName.parse(ref), Stores(), 30.0))
    lazy = lazy_directory_metadata(FileSystemReader(path), trusted=False)
    assert isinstance(lazy, LazyMetadata)
    expected = planned(DefaultLoadPlanner(), LAYOUTS[layout](rank), metadata)
    wrong = []
    for source in (own, lazy, metadata):
        actual = planned(dcp.ShardbookLoadPlanner(), LAYOUTS[layout](rank), source)
        wrong += [(type(source).__name__, one) for one in expected if one not in actual]
        wrong += [(type(source).__name__, one) for one in actual if one not in expected]
    return wrong


def save_by_dcp(rank: Rank, layout: str, path: str, is_safetensors: bool) -> None:
    """Saves a layout with plain DCP, in either of its formats."""
    serialization = SerializationFormat.SAFETENSORS if is_safetensors else SerializationFormat.TORCH_SAVE
    torch_save(fill(LAYOUTS[layout](rank)), storage_writer=FileSystemWriter(path, serialization_format=serialization))


def save_by_hugging_face(rank: Rank, layout: str, path: str) -> None:
    """Saves a layout's tensors with torch's Hugging Face writer, each rank its shards."""
    state = {key: value for key, value in fill(LAYOUTS[layout](rank)).items() if isinstance(value, torch.Tensor)}
    torch_save(state, storage_writer=HuggingFaceStorageWriter(path, save_distributed=True))


def load_counted(rank: Rank, ref: str) -> tuple[list[str], list[bool]]:
    """Loads what every rank holds in the same way, on all ranks at once.

    Returns:
        What is wrong; and for each call, whether places of chunks came.
    """
    came: list[bool] = []
    call = _transport.Transport.call

    def noting(transport: _transport.Transport, rpc: Any, request: Any, **options: Any) -> Any:
        response = call(transport, rpc, request, **options)
        came.append(bool(response.places or response.found))
        return response

    state = spoil(LAYOUTS["plain"](rank))
    dist.barrier()
    with mock.patch.object(_transport.Transport, "call", noting):
        dcp.load(state, ref)
    return wrong_pieces(state), came
