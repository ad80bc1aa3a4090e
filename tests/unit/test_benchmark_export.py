"""The benchmark of the export runs, compares what it says it compares, and notices a file that differs."""

from __future__ import annotations

import pytest

from benchmarks.common import Report
from benchmarks.export import FLOOR, GC_OFF, GC_ON, OURS, check_equal, graph_of, measure
from benchmarks.workload import Workload


@pytest.mark.soak
def test_a_small_workload_is_measured() -> None:
    """Rule: peer, floor and Shardbook in one run, with time, memory and bytes, and the goals by name."""
    report = Report("export")
    measure(report, "c", Workload(8, 3, 8))
    assert [OURS, GC_ON, GC_OFF, FLOOR] == [row["what"] for row in report.rows]
    assert {"c: pickle.dump (gc on) / streamed", "c: pickle.dump (gc off) / streamed", "c: memory added / file"} == set(
        report.goals
    )
    ours, peer, _, floor = report.rows
    assert ours["file_bytes"] == floor["file_bytes"]
    assert ours["added_rss_bytes"] is not None
    assert peer["peak_rss_bytes"] is not None


@pytest.mark.parametrize("what", ["index", "offset"])
def test_a_difference_is_noticed(what: str) -> None:
    """Rule: a run whose files differ has no result; hints, which take no part in equality, count too."""
    graph, other = (graph_of(Workload(8, 3, 8)) for _ in range(2))
    check_equal(graph, other)
    key, info = next(iter(other.storage_data.items()))
    object.__setattr__(key if what == "index" else info, what, 77)
    with pytest.raises(RuntimeError, match="not what DCP has"):
        check_equal(graph, other)
