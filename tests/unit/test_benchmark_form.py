"""Benchmarks speak one form, and their workload is what the figures are said to be about."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.common import Goal, Report, in_fresh_process, interleave
from benchmarks.workload import Layout, Workload


def test_last_line_is_the_result_and_missed_goals_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: the last line is {name, machine, rows, ratios}; under --check a missed goal exits 1 and is named."""
    report = Report("form", {"synchronous": "FULL"})
    report.row(contender="dcp", time_median_s=2.0)
    report.row(contender="shardbook", time_median_s=0.02, stored_bytes=1234)
    report.ratio("times less time", 100.0, Goal(">=", 50))
    report.ratio("bytes per chunk", 3.5, Goal("<=", 3))
    assert 1 == report.finish(check=True)
    assert 0 == report.finish(check=False)

    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert ["name", "machine", "rows", "ratios"] == list(result)
    assert {"times less time": 100.0, "bytes per chunk": 3.5} == result["ratios"]
    assert "FULL" == result["machine"]["settings"]["synchronous"]
    assert "MISSED: bytes per chunk is 3.5, the goal is <= 3" in printed.err
    assert "times less time is" not in printed.err


def test_contenders_take_turns_and_warmups_do_not_count() -> None:
    """Rule: noise meets all alike: every round runs each contender once, in order."""
    turns: list[str] = []
    timings = interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2, warmups=1)
    assert ["a", "b"] * 3 == turns
    assert {"a": 2, "b": 2} == {name: len(timing.samples_s) for name, timing in timings.items()}


def _fill(size_bytes: int) -> int:
    return len(b"x" * size_bytes)


def test_peak_memory_is_the_works_own() -> None:
    """Rule: work in a fresh process reports its own peak, whatever this process has used before."""
    small, large = in_fresh_process(_fill, 1 << 10), in_fresh_process(_fill, 200 << 20)
    assert 200 << 20 == large.value
    assert large.peak_rss_bytes - small.peak_rss_bytes > 150 << 20


@pytest.mark.parametrize("layout", ["row", "grid"])
def test_chunks_of_a_workload_tile_every_tensor(layout: Layout) -> None:
    """Rule: the chunks of all ranks cover each tensor exactly once."""
    workload = Workload(16, 21, 16, layout)
    assert (workload.sizes.prod(axis=1) * workload.ranks == workload.shapes.prod(axis=1)).all()
    offsets = np.stack([workload.offsets(rank) for rank in range(workload.ranks)])
    assert ((offsets >= 0) & (offsets + workload.sizes <= workload.shapes)).all()
    for tensor in range(workload.tensors):
        assert workload.ranks == len({tuple(row) for row in offsets[:, tensor].tolist()})


@pytest.mark.parametrize("arguments", [(64, 10, 32, "row"), (8, 10, 8, "grid"), (0, 1, 0, "row"), (3, 1, 3, "row")])
def test_uneven_workloads_are_refused(arguments: tuple[int, int, int, Layout]) -> None:
    """Rule: a workload has one equal chunk of every tensor on each rank."""
    with pytest.raises(ValueError, match="chunk"):
        Workload(*arguments)
