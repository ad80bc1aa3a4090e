"""The comparison with DCP runs, on a small scale, and measures both sides of what it compares."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.common import Report
from benchmarks.vs_dcp import Sizes, measure_coordination, measure_gloo, measure_validation, new_report
from benchmarks.workload import Workload

TINY = Workload(16, 21, 16)
SMALL = Sizes((("tiny", TINY, 1),), (True,), (("tiny", TINY),), (2,), saves=2, tensors=10, cut=128)


def _result(report: Report, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """The printed result, and its rows by workload and name."""
    assert 0 == report.finish(check=False)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["workload"], row["what"]): row for row in result["rows"]}
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows.values())
    return result, rows


@pytest.mark.soak
def test_coordinators_are_measured_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: DCP with and without cached plans, gc on and off; Shardbook on both databases; what is durable is told."""
    report = new_report(SMALL)
    measure_coordination(report, SMALL)
    result, rows = _result(report, capsys)
    assert "synchronous=FULL; Postgres fsync=on" in result["machine"]["settings"]["durability"]
    for collector in ("gc on", "gc off"):
        cold, again = rows["tiny", f"DCP, {collector}"], rows["tiny", f"DCP, plan caching, {collector}"]
        # Cached plans do not travel; the results do, and `.metadata` is the same.
        assert again["moved_bytes"] < cold["moved_bytes"] / 2
        assert again["stored_bytes"] == pytest.approx(cold["stored_bytes"], rel=0.02)
    for place in ("SQLite", "Postgres"):
        for what in ("cold", "warm", "restarted", "empty calls"):
            assert ("tiny", f"{place}, with planning: {what}") in rows
        for peer in ("DCP, gc on / cold", "DCP, gc off / cold", "DCP, plan caching, gc on / warm"):
            assert result["ratios"][f"tiny, {place}, with planning: {peer}"] > 0


@pytest.mark.soak
def test_validation_is_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: DCP compares every pair of chunks of a tensor cut along its shorter side; Shardbook does not."""
    report = new_report(SMALL)
    measure_validation(report, SMALL)
    result, rows = _result(report, capsys)
    assert result["ratios"]["tiny row: validation, DCP / Shardbook"] > 0
    assert ("tiny row", "assembly, validation included") in rows
    sides = "validation, cut along the shorter / the longer side"
    assert result["ratios"][f"{sides}, DCP"] > 2 * result["ratios"][f"{sides}, even"]


def test_real_ranks_save_through_both(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: first saves are told apart from later ones, and the time of metadata is less than that of the save."""
    report = new_report(SMALL)
    measure_gloo(report, SMALL)
    _, rows = _result(report, capsys)
    names = ("DCP", "DCP, plan caching", "Shardbook")
    assert {("2 gloo ranks", f"{name}: {what}") for name in names for what in ("cold", "warm")} == set(rows)
    assert all(row["median_s"] < row["whole_save_s"] for row in rows.values())
    warm = rows["2 gloo ranks", "Shardbook: warm"]
    assert 0 < warm["plan_s"] < warm["whole_save_s"]
