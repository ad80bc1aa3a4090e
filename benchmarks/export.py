"""DCP's own ``.metadata`` of one save: pickled from the ready object graph, and streamed from Shardbook's columns.

DCP's side is the dump alone, of objects that exist already, as its coordinator has them after a save: no string or
size is shared between ranks. Shardbook's side has the columns of a committed checkpoint. Both write to the same file
system. The fsync is told apart, and so is unpickling, which is done once, without the garbage collector. The floor
is as many bytes as Shardbook's file has, in blocks of a megabyte. Peak memory is taken in fresh processes; what
unpickling returns is compared object by object.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.common import (
    Goal,
    Report,
    Timing,
    garbage_collector,
    in_fresh_process,
    parse_arguments,
    peak_rss_bytes,
    reset_peak_rss,
    rss_bytes,
)
from benchmarks.dcp_peer import plan_of, results_of
from benchmarks.simulated import rank_structures
from benchmarks.workload import Workload
from shardbook.core.assembly import assemble
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.head import DCP_VERSION, MetadataHeader, StorageMetaHeader
from shardbook.core.locate import Located, locate
from shardbook.core.pickled_metadata import pickled_metadata

#: What DCP's coordinator would have put there.
HEADER = MetadataHeader(version=DCP_VERSION, storage_meta=StorageMetaHeader("/checkpoint", save_id="save"))
OURS, GC_ON, GC_OFF, FLOOR = "shardbook", "pickle.dump, gc on", "pickle.dump, gc off", "as many bytes"
ROUNDS = 3
#: pickle.dump of the graph, divided by ours.
GOAL = Goal(">=", 5)
#: What the writer may add to the columns in memory, as a part of its file.
MEMORY_GOAL = Goal("<=", 0.25)


def columns_of(workload: Workload) -> tuple[CheckpointStructure, Located]:
    """Returns the columns of a committed checkpoint of ``workload``."""
    structures = list(rank_structures(workload))
    structure = assemble(structures, np.arange(len(structures)))
    return structure, locate(structure, [(encode_extents(Extents()), b"")] * len(structures))


def graph_of(workload: Workload) -> Any:
    """Returns the Metadata of DCP's coordinator: of what each rank's plan and results were unpickled to.

    Made without the garbage collector, which would take most of the time: it is not what is measured.
    """
    with garbage_collector(enabled=False):
        return _graph_of(workload)


def _graph_of(workload: Workload) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    paths: dict[str, Any] = {}
    for rank in range(workload.ranks):
        plan = pickle.loads(pickle.dumps(plan_of(workload, rank)))
        paths.update(plan.planner_data)
        for number, item in enumerate(plan.items):
            data = item.tensor_data
            entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            index = MetadataIndex(item.index.fqn, item.index.offset, len(entry.chunks))
            entry.chunks.append(data.chunk)
            plan.items[number] = _replaced(item, index)
        for result in pickle.loads(pickle.dumps(results_of(workload, rank, plan))):
            storage[result.index] = result.storage_data
    meta = StorageMeta(checkpoint_id="/checkpoint", save_id="save")
    return Metadata(entries, planner_data=paths, storage_data=storage, storage_meta=meta, version=DCP_VERSION)


def _replaced(item: Any, index: Any) -> Any:
    from torch.distributed.checkpoint.planner import WriteItem

    return WriteItem(index=index, type=item.type, tensor_data=item.tensor_data)


def _stream(columns: tuple[CheckpointStructure, Located], stream: IO[bytes]) -> None:
    stream.writelines(pickled_metadata(*columns, "", HEADER))


def _dump(graph: Any, collector: bool, stream: IO[bytes]) -> None:
    with garbage_collector(enabled=collector):
        pickle.dump(graph, stream)


def _fill(size_bytes: int, stream: IO[bytes]) -> None:
    block = os.urandom(1 << 20)
    for at in range(0, size_bytes, len(block)):
        stream.write(block[: size_bytes - at])


def _measure_files(
    folder: Path, contenders: Mapping[str, Callable[[IO[bytes]], None]], rounds: int
) -> dict[str, tuple[Timing, Timing]]:
    """Returns the seconds of writing and of the fsync after it, by contender; in turns, after a round that warms up."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(1 + rounds):
        for name, put in contenders.items():
            path = folder / name
            path.unlink(missing_ok=True)
            gc.collect()
            with path.open("wb") as stream:
                begin = time.perf_counter()
                put(stream)
                stream.flush()
                written = time.perf_counter()
                os.fsync(stream.fileno())
                if turn:
                    samples[name].append((written - begin, time.perf_counter() - written))
    return {
        name: (Timing(tuple(write for write, _ in times)), Timing(tuple(sync for _, sync in times)))
        for name, times in samples.items()
    }


def added_by_streaming(workload: Workload) -> int:
    """Returns the bytes of resident memory that streaming adds to the columns; for a fresh process."""
    return _added_bytes(columns_of(workload), _stream)


def added_by_dumping(workload: Workload) -> int:
    """Returns the bytes of resident memory that ``pickle.dump`` adds to the graph; for a fresh process."""
    return _added_bytes(graph_of(workload), lambda graph, stream: _dump(graph, True, stream))


def _added_bytes(source: Any, put: Callable[[Any, IO[bytes]], None]) -> int:
    reset_peak_rss()
    before_bytes = rss_bytes()
    with tempfile.TemporaryFile() as stream:
        put(source, stream)
    return peak_rss_bytes() - before_bytes


def load(path: Path) -> tuple[Any, float]:
    """Returns what is in a file, and the seconds of unpickling it without the garbage collector."""
    gc.collect()
    with garbage_collector(enabled=False), path.open("rb") as stream:
        begin = time.perf_counter()
        found = pickle.load(stream)
        return found, time.perf_counter() - begin


def check_equal(graph: Any, found: Any) -> None:
    """Raises RuntimeError unless both are the same metadata, index hints included."""
    hints = [{key: key.index for key in metadata.storage_data} for metadata in (graph, found)]
    if graph != found or hints[0] != hints[1]:
        raise RuntimeError("what was streamed is not what DCP has")


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    sizes = ("a",) if arguments.quick else ("a", "b", "c")
    report = Report("export", {"durability": "buffered writes; fsync after them, timed apart", "rounds": ROUNDS})
    for size in sizes:
        measure(report, size, Workload.standard(size))
    return report.finish(check=arguments.check)


def measure(report: Report, size: str, workload: Workload) -> None:
    """Adds rows and ratios of one workload to the report."""
    columns, graph = columns_of(workload), graph_of(workload)
    file_bytes = sum(map(len, pickled_metadata(*columns, "", HEADER)))
    contenders = {
        OURS: partial(_stream, columns),
        GC_ON: partial(_dump, graph, True),
        GC_OFF: partial(_dump, graph, False),
        FLOOR: partial(_fill, file_bytes),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = _measure_files(folder, contenders, ROUNDS)
        found, ours_load_s = load(folder / OURS)
        check_equal(graph, found)
        del found
        loads_s = {OURS: ours_load_s, GC_OFF: load(folder / GC_OFF)[1]}
        sizes_bytes = {contender: (folder / contender).stat().st_size for contender in contenders}
    del columns, graph
    added = {
        OURS: in_fresh_process(added_by_streaming, workload),
        GC_ON: in_fresh_process(added_by_dumping, workload),
    }
    for contender, (write, sync) in times.items():
        memory = added.get(contender)
        report.row(
            workload=str(workload),
            what=contender,
            **write.columns("write"),
            fsync_median_s=sync.median_s,
            file_bytes=sizes_bytes[contender],
            load_s=loads_s.get(contender),
            added_rss_bytes=memory.value if memory else None,
            peak_rss_bytes=memory.peak_rss_bytes if memory else None,
        )
    ours_s = times[OURS][0].median_s
    report.ratio(f"{size}: pickle.dump (gc on) / streamed", times[GC_ON][0].median_s / ours_s, GOAL)
    report.ratio(f"{size}: pickle.dump (gc off) / streamed", times[GC_OFF][0].median_s / ours_s, GOAL)
    report.ratio(f"{size}: streamed / as many bytes alone", ours_s / times[FLOOR][0].median_s)
    report.ratio(f"{size}: bytes a chunk", file_bytes / workload.chunk_count)
    # What a block takes does not grow with the checkpoint, so it weighs on the small one.
    added_part = added[OURS].value / file_bytes
    report.ratio(f"{size}: memory added / file", added_part, MEMORY_GOAL if size == "c" else None)


if __name__ == "__main__":
    sys.exit(main())
