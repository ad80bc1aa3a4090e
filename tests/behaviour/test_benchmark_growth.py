"""The benchmark of a run's growth runs, on a small scale, and looks at the database while it grows."""

from __future__ import annotations

import json

import pytest

from benchmarks.growth import Sizes, measure
from benchmarks.workload import Workload

SMALL = Sizes(Workload(16, 21, 16), saves=12, window=3)


def test_windows_lie_at_both_ends_and_in_the_middle() -> None:
    """Rule: the cold save, step 0, is in no window."""
    windows = {name: (steps[0], steps[-1]) for name, steps in SMALL.windows().items()}
    assert {"first": (1, 3), "middle": (5, 7), "last": (10, 12)} == windows


def test_growth_is_told_by_window(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: each window has its saves, commits, and what the database and the server hold after it."""
    assert 0 == measure(SMALL).finish(check=False)
    printed = capsys.readouterr().out.splitlines()
    assert any("saves stay flat" in line or "saves GROW" in line for line in printed)
    result = json.loads(printed[-1])
    rows = {(row["window"], row["what"]): row for row in result["rows"]}
    for window in ("first", "middle", "last"):
        save, commit = rows[window, "whole save"], rows[window, "commit"]
        assert 0 < commit["min_s"] <= commit["median_s"] < save["median_s"] <= save["max_s"]
    held = {window: row for (window, what), row in rows.items() if what == "after it"}
    assert [1, 4, 8, 13] == [held[window]["checkpoints"] for window in ("cold", "first", "middle", "last")]
    assert all(row["used_bytes"] > 0 and row["log_bytes"] > 0 and row["latest_page_s"] > 0 for row in held.values())
    assert 100 > result["ratios"]["bytes stored a rank and save"] >= 0
