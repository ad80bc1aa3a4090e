"""What a save costs once its structure is known: bytes a rank sends, and bytes it adds to the database.

256 simulated ranks of ``W(256, 1000, 256)``, each with some pickled objects of its own beside its share of the tensors,
register and commit through one server on SQLite. After a cold save come ten more, in each of these cases:

- ``unchanged``: every length is what it was.
- ``object grows``: on every rank one object is a byte longer with every save.
- ``file an item``: ``single_file_per_rank=False``, 1,003 files a rank; one object grows likewise.
- ``crc32c``: checksums are kept, 4 bytes an item that no two saves have in common. What they cost is said an item.

Payload is what a registration consists of: digest, extents, properties, and what the rank took, in milliseconds. On the
wire there is also who says it and where the files are, the same every time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.common import SEED, Goal, Report, parse_arguments
from benchmarks.places import places
from benchmarks.postgres import free_port
from benchmarks.saves import PAGE_BYTES
from benchmarks.simulated import RankPayload, Ranks, Server, connected, held_bytes, rank_structures, running_server
from benchmarks.workload import Workload
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.structure import BlobKind, FileName, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import EntryKind, TensorTable, encode_table
from shardbook.v1 import registration_pb2, types_pb2

#: Saves whose structure is known.
SAVES: Final = 10
#: Pickled objects of each rank: such as the states of its data loader, sampler and random numbers.
OBJECTS: Final = ("loader", "sampler", "rng")
PAYLOAD: Final = Goal("<=", 60)
STORED: Final = Goal("<=", 100)
#: Four bytes an item, and the room that pages leave.
CHECKSUM: Final = Goal("<=", 4.2)

FULL: Final = Workload(256, 1000, 256)
QUICK: Final = Workload(64, 250, 64)


@dataclass(frozen=True)
class Case:
    """How saves differ from each other and from those of another case.

    Attributes:
        name: For the tables.
        growing: Every rank has an object that is a byte longer in every save.
        file_an_item: Every item has a file of its own.
        checked: Checksums are kept.
    """

    name: str
    growing: bool = False
    file_an_item: bool = False
    checked: bool = False


CASES: Final = (
    Case("unchanged"),
    Case("object grows", growing=True),
    Case("file an item", growing=True, file_an_item=True),
    Case("crc32c", checked=True),
)


class Steady:
    """The ranks of a case, and what they register in each save.

    Args:
        workload: Their tensors.
        case: The case.
    """

    def __init__(self, workload: Workload, case: Case) -> None:
        self._case = case
        self._random = np.random.default_rng(SEED)
        self._cold = [_payload(rank, structure) for rank, structure in enumerate(self._structures(workload))]
        self._lengths = self._random.integers(900, 4000, (workload.ranks, len(OBJECTS)))
        self._items = workload.tensors + len(OBJECTS)

    def payloads(self, step: int) -> list[RankPayload]:
        """Returns what the ranks register in save ``step``; 0 is the cold one."""
        return [self._at(payload, step) for payload in self._cold]

    def _at(self, payload: RankPayload, step: int) -> RankPayload:
        rank = payload.registration.rank
        lengths = self._lengths[rank].copy()
        lengths[rank % len(OBJECTS)] += step if self._case.growing else 0
        checksums = self._random.integers(0, 1 << 32, self._items) if self._case.checked else None
        registration = registration_pb2.ShardRegistration()
        registration.CopyFrom(payload.registration)
        registration.extents = encode_extents(Extents(lengths, checksums=checksums))
        registration.phase_ms[:] = self._random.integers(100, (2_000, 60_000, 500)).tolist()
        return replace(payload, registration=registration)

    def _structures(self, workload: Workload) -> Iterator[RankStructure]:
        for rank, of_tensors in enumerate(rank_structures(workload)):
            yield _with_objects(of_tensors, rank, file_an_item=self._case.file_an_item)


def _with_objects(of_tensors: RankStructure, rank: int, *, file_an_item: bool) -> RankStructure:
    """Adds a rank's objects, which DCP's writer puts in front of the tensors."""
    count, objects = of_tensors.item_count, len(OBJECTS)
    items = count + objects
    table = _with_entries(of_tensors.plan.table, tuple(f"{name}.{rank}" for name in OBJECTS))
    plan = RankPlan(
        table,
        np.arange(items),
        np.concatenate([of_tensors.plan.offsets, np.zeros((objects, 2), np.int64)]),
        np.concatenate([of_tensors.plan.sizes, np.ones((objects, 2), np.int64)]),
    )
    files = tuple(FileName(True, f"{number}.distcp") for number in range(items if file_an_item else 1))
    file_items = np.ones(items, np.int64) if file_an_item else np.array([items])
    order = np.concatenate([np.arange(count, items), np.arange(count)])
    lengths = np.concatenate([of_tensors.lengths, np.zeros(objects, np.int64)])
    return RankStructure(plan, np.arange(items), files, file_items, order, lengths)


def _with_entries(table: TensorTable, names: tuple[str, ...]) -> TensorTable:
    def longer(column: np.ndarray, value: int) -> np.ndarray:
        added = np.full((len(names), *column.shape[1:]), value, dtype=column.dtype)
        return np.concatenate([column, added])

    return TensorTable(
        (*table.fqns, *names),
        longer(table.kinds, EntryKind.BYTES),
        longer(table.dtypes, 0),
        longer(table.layouts, 0),
        longer(table.memory_formats, 0),
        longer(table.ndims, 0),
        longer(table.shapes, 1),
        (*(table.key_paths or ()), *((name, tuple(name.split("."))) for name in names)),
    )


def _payload(rank: int, structure: RankStructure) -> RankPayload:
    table = encode_table(structure.plan.table)
    plan = encode_plan(structure.plan, table.digest)
    encoded = encode_structure(structure, plan.digest)
    kinds = ((BlobKind.TABLE, table), (BlobKind.PLAN, plan), (BlobKind.STRUCTURE, encoded))
    blobs = tuple(types_pb2.Blob(kind=int(kind), payload=blob.payload) for kind, blob in kinds)  # type: ignore[arg-type]
    registration = registration_pb2.ShardRegistration(rank=rank, structure_digest=encoded.digest)
    return RankPayload(registration, blobs, plan.digest)


@dataclass(frozen=True)
class Cost:
    """What a save costs a rank, bytes.

    Attributes:
        payload: The largest payload of a rank in any of the saves.
        sent: Requests to plan and to register.
        stored: What it adds to the database, at most.
        cold_stored: What the first save added, for comparison.
    """

    payload: int
    sent: float
    stored: float
    cold_stored: float


async def _cost(server: Server, database: Path, workload: Workload, case: Case) -> Cost:
    """Saves once, then ``SAVES`` times, in a project that knows no structure yet."""
    steady = Steady(workload, case)
    payloads = steady.payloads(0)
    empty_bytes, _ = held_bytes(database)
    async with connected(server.address) as channel:
        ranks = Ranks(channel, payloads, f"projects/{case.name.replace(' ', '-')}/runs/steady", planning=True)
        await ranks.start()
        await ranks.save(0)
        cold_bytes, _ = held_bytes(database)
        largest = sent_bytes = 0
        for step in range(1, SAVES + 1):
            payloads[:] = steady.payloads(step)
            largest = max(largest, *(payload.payload_bytes for payload in payloads))
            await ranks.save(step)
            sent_bytes += ranks.sent_bytes
    # A page more than was seen: what the last one has room for may have been filled.
    stored_bytes = held_bytes(database)[0] - cold_bytes + PAGE_BYTES
    rank_saves = SAVES * workload.ranks
    return Cost(
        payload=largest,
        sent=sent_bytes / rank_saves,
        stored=stored_bytes / rank_saves,
        cold_stored=(cold_bytes - empty_bytes) / workload.ranks,
    )


def measure(workload: Workload) -> Report:
    """Returns the report."""
    report = Report(
        "steady",
        {"durability": "SQLite WAL, synchronous=FULL", "workload": str(workload), "saves": SAVES, "objects a rank": 3},
    )
    with places(postgres=False) as (sqlite,), running_server(sqlite.database, free_port()) as server:
        database = Path(sqlite.database)
        costs = {case: asyncio.run(_cost(server, database, workload, case)) for case in CASES}
    for case, cost in costs.items():
        report.row(
            case=case.name,
            payload_bytes_a_rank=cost.payload,
            sent_bytes_a_rank=round(cost.sent, 1),
            stored_bytes_a_rank=round(cost.stored, 1),
            cold_stored_bytes_a_rank=round(cost.cold_stored, 1),
        )
        if not case.checked:
            report.ratio(f"{case.name}: payload bytes a rank", cost.payload, PAYLOAD)
            report.ratio(f"{case.name}: stored bytes a rank and save, at most", cost.stored, STORED)
    plain, checked = costs[CASES[0]], costs[CASES[-1]]
    items = workload.tensors + len(OBJECTS)
    report.ratio("crc32c: payload bytes an item more", (checked.payload - plain.payload) / items, CHECKSUM)
    report.ratio("crc32c: stored bytes an item and save more", (checked.stored - plain.stored) / items, CHECKSUM)
    return report


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    return measure(QUICK if arguments.quick else FULL).finish(check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
