"""The benchmark of load plans runs, on a small scale, and its contenders plan the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.layouts import Layout
from benchmarks.load_plan import RANK, Sizes, measure, new_report
from benchmarks.loadable import Job, halved, plan_of_rank, question_of, save
from benchmarks.workload import Workload
from shardbook.core.directory import MANIFEST
from shardbook.core.manifest import Manifest
from shardbook.sources import ManifestSource

ROWS = Workload(16, 21, 16)
STAGES = Layout("TP2 x FSDP4 x PP2", shards=4, tensor_parallel=2, stages=2)
SMALL = Sizes(
    {"rows": (ROWS, 1), "stages": (STAGES, 0)},
    plans=3,
    latency=("rows", 3),
    crowd="rows",
    fleet="stages",
    everything=("rows", 1),
)


@pytest.mark.parametrize("job", [ROWS, STAGES])
def test_what_ranks_ask_is_there(job: Job, tmp_path: Path) -> None:
    """Rule: the checkpoint is whole, and a rank finds every element of its boxes, with as many ranks and with half."""
    loadable, _ = save(job, tmp_path, step=1)
    source = ManifestSource(Manifest.from_bytes((tmp_path / MANIFEST).read_bytes()), str(tmp_path))
    assert loadable.metadata_bytes == (tmp_path / ".metadata").stat().st_size
    for world in (job, halved(job)):
        wanted = question_of(plan_of_rank(world, RANK))
        found = source.query(wanted)
        assert found.found.all()
        low = np.maximum(found.offsets, wanted.offsets[found.box])
        high = np.minimum(found.offsets + found.sizes, (wanted.offsets + wanted.sizes)[found.box])
        shared = (high - low).prod(axis=1)
        assert (shared > 0).all()
        assert wanted.sizes.prod(axis=1).tolist() == np.bincount(found.box, shared, len(wanted.sizes)).tolist()


@pytest.mark.soak
def test_every_contender_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: DCP with gc on and off, service, cache and directory, in both worlds; questions at once; everything."""
    report = new_report(SMALL)
    measure(report, SMALL)
    assert 0 == report.finish(check=False)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    plans = [row for row in result["rows"] if "first_s" in row]
    contenders = ["DCP, gc on", "DCP, gc off", "service", "warm cache", "manifest"]
    assert [(world, what) for world in ("same", "half") for what in contenders] == [
        (row["ranks"], row["what"]) for row in plans
    ]
    assert {("same", 21), ("half", 42)} == {(row["ranks"], row["items"]) for row in plans}
    assert all(row["first_s"] > 0 and row["bytes"] > 0 for row in plans)
    at_once = [row for row in result["rows"] if row["what"].startswith("at once")]
    assert {16} == {row["calls"] for row in at_once}
    assert 6 == len(at_once)
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in at_once)
    assert 4 == sum(row["what"].startswith("everything") for row in result["rows"])
    assert all(value > 0 for name, value in result["ratios"].items() if "memory" not in name)
