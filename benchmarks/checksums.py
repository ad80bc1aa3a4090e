"""What checksums cost while a save writes: bytes a second with and without them, in one run.

One process saves tensors into a fresh directory by ``shardbook.dcp.save`` without a service, once with
``checksum="crc32c"`` and once without, by turns; then it computes the same checksums of the same bytes in memory, which
is all that a save has to do more. ``sync_files=False``, so that no disk hides anything: on a real one less is seen.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import google_crc32c
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from benchmarks.common import SEED, Report, interleave, parse_arguments
from shardbook import dcp

#: Tensors and MiB of each.
FULL: Final = (32, 8)
QUICK: Final = (8, 8)


def _state(count: int, size_mib: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    return {f"w{at}": torch.rand(size_mib << 18, generator=generator) for at in range(count)}


def _saving(state: dict[str, Any], folder: Path, checksum: str, threads: int) -> Callable[[], object]:
    def save() -> None:
        path = folder / "step-1"
        shutil.rmtree(path, ignore_errors=True)
        writer = FileSystemWriter(path, sync_files=False, thread_count=threads)
        dcp.save(state, storage_writer=writer, checksum=checksum)

    return save


def _summing(state: dict[str, Any]) -> Callable[[], object]:
    return lambda: [google_crc32c.extend(0, tensor.numpy()) for tensor in state.values()]


def measure(count: int, size_mib: int) -> Report:
    """Returns the report."""
    state = _state(count, size_mib)
    size_bytes = count * size_mib << 20
    report = Report("checksums", {"durability": "none: sync_files=False", "bytes": size_bytes, "tensors": count})
    dcp.init(run="bench/checksums", mode="offline")
    with tempfile.TemporaryDirectory(prefix="shardbook-bench-") as folder:
        contenders = {
            f"{checksum}, {threads} threads": _saving(state, Path(folder), checksum, threads)
            for threads in (1, 2)
            for checksum in ("none", "crc32c")
        }
        contenders["sums alone"] = _summing(state)
        timings = interleave(contenders, rounds=9)
    dcp.close()
    for name, timing in timings.items():
        report.row(what=name, **timing.columns(), bytes_a_second=round(size_bytes / timing.median_s))
    for threads in (1, 2):
        without, having = (timings[f"{checksum}, {threads} threads"].median_s for checksum in ("none", "crc32c"))
        report.ratio(f"save with / without, {threads} threads", having / without)
    return report


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    return measure(*(QUICK if arguments.quick else FULL)).finish(check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
