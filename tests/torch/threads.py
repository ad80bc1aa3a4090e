"""Ranks in one process: each a thread with a session's runtime, planner and writer of its own, as its process has.

For property tests, which save hundreds of small states: real planners, real files, a real server, no process group.
What a rank writes, and what the server asks it for, is written down on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardbook.breaker import SaveBudget
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.prepared import Claim, PreparedSave, SaveOptions
from shardbook.dcp.rank_save import RankSave
from shardbook.dcp.results import SaveResult
from shardbook.dcp.runtime import Member, Runtime
from shardbook.dcp.session import Session, new_session, start_session
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import Blob, BlobRef


class Pieces(torch.Tensor):
    """Some boxes of a tensor, as DCP's protocol for sharded tensors has them; needs no process group."""

    whole: torch.Size
    boxes: dict[torch.Size, torch.Tensor]

    @staticmethod
    def of(whole: torch.Tensor, rows: Iterable[tuple[int, int]]) -> Pieces:
        """Returns the pieces of ``whole`` from some first row to some last one, exclusive."""
        pieces = whole.new_empty(0).as_subclass(Pieces)
        pieces.whole = whole.size()
        rest = (0,) * (whole.ndim - 1)
        pieces.boxes = {torch.Size((begin, *rest)): whole[begin:end].clone() for begin, end in rows}
        return pieces

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offsets, sizes=piece.size()),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.whole,
                ),
            )
            for offsets, piece in self.boxes.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.boxes[index.offset]


class _EveryBlob(set[tuple[int, bytes]]):
    """What a rank takes the server to know: everything. So only what the server asks for travels."""

    def __contains__(self, _: object) -> bool:
        return True


class _Noting:
    """A client that writes down what the server asks for."""

    def __init__(self, client: Client, asked: list[BlobRef]) -> None:
        self._client = client
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def plan_until_decided(self, request: pb.PlanSaveRequest, blobs: Any, **options: Any) -> pb.PlanSaveResponse:
        return self._client.plan_until_decided(request, self._noting(blobs), **options)

    def register_shards(
        self, request: pb.RegisterShardsRequest, blobs: Any, **options: Any
    ) -> pb.RegisterShardsResponse:
        return self._client.register_shards(request, self._noting(blobs), **options)

    def _noting(self, blobs: Any) -> Any:
        def find(unknown: Sequence[BlobRef]) -> Iterable[Blob]:
            self._asked.extend(unknown)
            found: Iterable[Blob] = blobs(unknown)
            return found

        return find


class _RankRuntime(Runtime):
    """A rank's runtime; the coordinator's keeps no lease, for the test is over before one ends."""

    def __init__(self, session: Session, config: ClientConfig, member: Member) -> None:
        super().__init__(session, config, Member(0, 1), member, is_shared=True)
        self.asked: list[BlobRef] = []
        self.known_blobs = _EveryBlob()

    def start_keeping(self, part: str | None = None) -> None:
        """Keeps none."""

    def client(self, budget: SaveBudget) -> Any:
        """Returns a client that writes down what the server asks for."""
        client = super().client(budget)
        return None if client is None else _Noting(client, self.asked)


class _Writer(FileSystemWriter):
    """Writes down what it was given."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=False)
        self.items: list[WriteItem] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes."""
        self.items.extend(plan.items)
        return super().write_data(plan, planner)


@dataclass(frozen=True)
class RankSaved:
    """What a rank did.

    Attributes:
        result: How far its save came.
        items: What it wrote.
        asked: What the server asked it for.
    """

    result: SaveResult
    items: list[WriteItem]
    asked: list[BlobRef] = field(default_factory=list)


class Ranks:
    """The ranks of a job, by one session of theirs. Not thread-safe.

    Args:
        server: Address of the server.
        run: ``project/run``.
        world_size: How many ranks.
    """

    def __init__(self, server: str, run: str, world_size: int) -> None:
        config = ClientConfig(server=server)
        session = start_session(new_session(run, config), Client(server), wait_s=0.0, deadline_s=20.0)
        self._runtimes = [_RankRuntime(session, config, Member(rank, world_size)) for rank in range(world_size)]

    def save(self, path: Path, step: int, states: Sequence[dict[str, Any]]) -> list[RankSaved]:
        """Saves a state dict a rank, all ranks at once; raises what the first of them raised."""
        with ThreadPoolExecutor(len(states)) as threads:
            return list(threads.map(self._save, self._runtimes, states, [path] * len(states), [step] * len(states)))

    @staticmethod
    def _save(runtime: _RankRuntime, state: dict[str, Any], path: Path, step: int) -> RankSaved:
        session, location = runtime.session, runtime.config.location_of(path)
        attempt = Attempt(
            run=session.run,
            part=session.part,
            step=step,
            incarnation=session.incarnation,
            number=runtime.next_attempt(session.part, step, location),
            member=runtime.joined,
            path=str(path),
            location=location,
        )
        writer, asked_before = _Writer(path), len(runtime.asked)
        prepared = PreparedSave(runtime, attempt, writer, path, DefaultSavePlanner(), SaveOptions(), None, Claim())
        result = RankSave(prepared).run(state)
        return RankSaved(result, writer.items, runtime.asked[asked_before:])

    def close(self) -> None:
        """Ends the session."""
        for runtime in self._runtimes:
            runtime.close()


def by_dcp(states: Sequence[dict[str, Any]]) -> list[WriteItem]:
    """Returns what DCP's own planners have all ranks write of these state dicts."""
    planners = [DefaultSavePlanner() for _ in states]
    plans = []
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(state, None, is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    global_plan, _ = planners[0].create_global_plan(plans)
    return [item for plan in global_plan for item in plan.items]
