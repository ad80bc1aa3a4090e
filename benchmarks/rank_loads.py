"""What one rank does before it reads its first byte: each contender in a process of its own, which is that rank.

A plan is made of the state dict's DTensors on every side. DCP's is ``read_metadata`` and
``create_default_local_load_plan``. Ours is ``ShardbookLoadPlanner.create_local_plan``: local boxes, the question,
comparing shapes and dtypes, the read items and where they lie. ``set_up_planner``, which is torch's on both sides,
imports and the state dict are in no time.
"""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.common import garbage_collector, peak_rss_bytes, reset_peak_rss, rss_bytes
from benchmarks.loadable import Job, plan_of_rank, question_of
from shardbook.core.wanted import Wanted

#: Bound of the cache of answers, as by default.
CACHE_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Planned:
    """Plans that one process made.

    Attributes:
        first_s: The first one, with whatever the process does for the first time, and the connection.
        later_s: Further ones in the same process, each by a planner that knows nothing.
        read_s: Of the first, the time of DCP's ``read_metadata``; 0 for ours.
        item_count: Read items of a plan.
        added_bytes: Resident memory that the first one added at its peak, DCP's with what it read.
        connection_bytes: Resident memory that gRPC took before, for the first call of the process.
        moved_bytes: Bytes that a plan read or received; 0 where nobody counts them.
    """

    first_s: float
    later_s: tuple[float, ...]
    read_s: float
    item_count: int
    added_bytes: int
    moved_bytes: int
    connection_bytes: int = 0


def by_dcp(directory: Path, jobs: Sequence[Job], rank: int, collector: bool, plans: int) -> list[Planned]:
    """Plans as DCP does, for a rank of each of some jobs; the metadata is read once and counts for each."""
    from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from benchmarks.rank_states import state_dict_of

    reader, state = FileSystemReader(directory), state_dict_of(jobs[0], rank)
    moved_bytes = (directory / ".metadata").stat().st_size
    found = []
    with garbage_collector(enabled=collector):
        before_bytes = _settled()
        begin_s = time.perf_counter()
        metadata = reader.read_metadata()
        read_s = time.perf_counter() - begin_s
        for job in jobs:
            state = state if job is jobs[0] else state_dict_of(job, rank)
            item_count = len(create_default_local_load_plan(state, metadata).items)
            added_bytes = peak_rss_bytes() - before_bytes
            times = [_seconds(partial(create_default_local_load_plan, state, metadata)) for _ in range(plans)]
            first_s = read_s + times[0]
            found.append(Planned(first_s, tuple(times[1:]), read_s, item_count, added_bytes, moved_bytes))
    return found


def by_service(address: str, ref: str, job: Job, rank: int, plans: int, cache: Path | None = None) -> Planned:
    """Plans by asking the service, over one connection; every plan asks what ``ref`` means.

    Raises:
        RuntimeError: An answer was not in ``cache``, where there is one.
    """
    from shardbook._disk_cache import DiskCache
    from shardbook.client import Client
    from shardbook.core.names import CheckpointName
    from shardbook.sources import ServiceSource
    from shardbook.stores import Stores

    client, name, stores = Client(address), CheckpointName.parse(ref), Stores()
    kept = None if cache is None else DiskCache(str(cache), CACHE_BYTES)
    before = _entries_of(cache)

    def connect() -> None:
        client.query_chunks(name, Wanted.all_of(()))

    planned = _by_shardbook(lambda: ServiceSource(client, name, stores, 60.0, kept), job, rank, plans, connect)
    if _entries_of(cache) != before:
        raise RuntimeError("the cache was not warm")
    return planned


def warm(address: str, ref: str, jobs: Sequence[Job], rank: int, cache: Path) -> None:
    """Leaves in ``cache`` what a rank of each of some jobs asks, as another process of its host would have."""
    from shardbook._answers import Answers
    from shardbook._disk_cache import DiskCache
    from shardbook.client import Client
    from shardbook.core.names import CheckpointName

    answers = Answers(Client(address), DiskCache(str(cache), CACHE_BYTES), 60.0)
    for job in jobs:
        answers.chunks(CheckpointName.parse(ref), question_of(plan_of_rank(job, rank)))


def _entries_of(cache: Path | None) -> set[Path]:
    return set() if cache is None else {path for path in cache.rglob("*") if path.is_file()}


def by_manifest(directory: Path, job: Job, rank: int, plans: int) -> Planned:
    """Plans of the directory's own manifest, opened anew for every plan."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from shardbook._attempts import FoundAttempt
    from shardbook._newest import read_newest
    from shardbook.dcp.writer import CheckpointFiles
    from shardbook.sources import ManifestSource

    def source() -> ManifestSource:
        files = CheckpointFiles.of(FileSystemReader(directory))
        stored = read_newest(files, FoundAttempt.stored)
        if stored is None:
            raise RuntimeError("the directory holds no attempt")
        return ManifestSource(stored, str(directory))

    return _by_shardbook(source, job, rank, plans)


def _by_shardbook(
    source: Callable[[], Any], job: Job, rank: int, plans: int, connect: Callable[[], None] = lambda: None
) -> Planned:
    from benchmarks.rank_states import state_dict_of
    from shardbook.dcp.lazy import LazyMetadata
    from shardbook.dcp.load_planner import ShardbookLoadPlanner

    state = state_dict_of(job, rank)

    def planned() -> tuple[float, Any]:
        planner = ShardbookLoadPlanner()
        planner.set_up_planner(state, None, is_coordinator=False)
        begin_s = time.perf_counter()
        planner.metadata = LazyMetadata(source())
        plan = planner.create_local_plan()
        return time.perf_counter() - begin_s, plan

    idle_bytes = _settled()
    connected_s = _seconds(connect)
    connection_bytes = peak_rss_bytes() - idle_bytes
    before_bytes = _settled()
    first_s, plan = planned()
    added_bytes = peak_rss_bytes() - before_bytes
    # Not what is left over of earlier ones, nor what dropping them takes.
    later = tuple(planned()[0] for _ in range(plans - 1))
    return Planned(connected_s + first_s, later, 0.0, len(plan.items), added_bytes, 0, connection_bytes)


@dataclass(frozen=True)
class Built:
    """All of torch's ``Metadata`` in one process.

    Attributes:
        time_s: Until it was there.
        added_bytes: Resident memory that it added at its peak.
        held_bytes: What of it stayed.
        counts: Entries, chunks and places, to be compared.
    """

    time_s: float
    added_bytes: int
    held_bytes: int
    counts: tuple[int, int, int]


def everything_by_pickle(path: Path, collector: bool) -> Built:
    """Unpickles a ``.metadata``."""

    def load() -> Any:
        with path.open("rb") as stream:
            return pickle.load(stream)

    import torch.distributed.checkpoint  # noqa: F401 - not to be part of the time

    with garbage_collector(enabled=collector):
        return _built(load)


def everything_by_service(address: str, ref: str) -> Built:
    """Fetches all of a checkpoint of the catalogue and makes torch's objects of it."""
    from shardbook.config import ClientConfig
    from shardbook.core.names import CheckpointName
    from shardbook.dcp.loading import columns_of

    config = ClientConfig(server=address)
    return _built(lambda: columns_of(CheckpointName.parse(ref), config).to_torch())


def _built(build: Callable[[], Any]) -> Built:
    before_bytes = _settled()
    begin_s = time.perf_counter()
    metadata = build()
    time_s = time.perf_counter() - begin_s
    added_bytes, held_bytes = peak_rss_bytes() - before_bytes, rss_bytes() - before_bytes
    chunks = sum(len(entry.chunks) for entry in metadata.state_dict_metadata.values())
    counts = len(metadata.state_dict_metadata), chunks, len(metadata.storage_data)
    return Built(time_s, added_bytes, held_bytes, counts)


def _settled() -> int:
    """Returns what is resident now, from where the peak is counted anew."""
    gc.collect()
    reset_peak_rss()
    return rss_bytes()


def _seconds(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def latencies_s(contenders: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, ...]]:
    """Returns the seconds of each call of some contenders, taken in turns."""
    samples = [[_seconds(work) for work in contenders] for _ in range(rounds)]
    return list(zip(*samples, strict=True))
