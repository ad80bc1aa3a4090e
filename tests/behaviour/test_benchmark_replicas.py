"""The benchmark of replicas runs, on a small scale, and measures what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks.load import Sizes
from benchmarks.replicas import measure
from benchmarks.workload import Workload

SMALL = Sizes(
    Workload(16, 21, 16),
    Workload(64, 21, 64, "grid"),
    rounds=2,
    channels=3,
    in_flight=4,
    crowd_saves=1,
    arrive_s=0.5,
)


@pytest.mark.soak
def test_the_benchmark_of_replicas_measures_all_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: every contender has its calls, its empty calls and its raw inserts; each rank of the crowd a connection."""
    report = measure(SMALL)
    assert 0 == report.finish(check=False)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "synchronous=FULL" in result["machine"]["settings"]["durability of SQLite"]
    assert "fsync=on, synchronous_commit=on" in result["machine"]["settings"]["durability of Postgres"]

    rows = {(row["servers"], row["what"]): row for row in result["rows"]}
    for servers in ("SQLite", "Postgres 1", "Postgres 2", "Postgres 3"):
        for what in ("registrations", "empty calls"):
            row = rows[servers, what]
            assert 0 < row["min"] <= row["calls_per_s"] <= row["max"]
            assert 0 < row["p50_ms"] <= row["p99_ms"]
        raw = rows[servers, "raw inserts"]
        # Each rank registered once a burst, in one group or another.
        assert 16 * SMALL.rounds == pytest.approx(raw["groups"] * raw["group_mean"], rel=0.1)
        assert raw["group_largest"] <= 16

    crowd = "Postgres 1, 64 connections"
    waits = [row for (servers, what), row in rows.items() if servers == crowd and what.startswith("waiting")]
    assert 2 == len(waits)
    assert all(row["p50_ms"] <= row["p99_ms"] <= row["last_ms"] for row in waits)
    sockets = {what: row["sockets"] for (servers, what), row in rows.items() if "sockets" in row}
    assert 64 <= sockets["memory, all open"] - sockets["memory, before"]
    assert sockets["memory, all closed"] < sockets["memory, before"] + 8
    assert all(value > 0 for name, value in result["ratios"].items() if "bytes" not in name)
