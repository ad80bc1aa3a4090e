"""The benchmark of the steady state runs, on a small scale, and tells every case."""

from __future__ import annotations

import json

import pytest

from benchmarks.steady import CASES, measure
from benchmarks.workload import Workload


def test_each_case_is_told_and_held_to_its_goal(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: payload and stored bytes a rank of every case; what checksums cost, an item."""
    measure(Workload(16, 21, 16)).finish(check=False)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["case"]: row for row in result["rows"]}
    assert [case.name for case in CASES] == list(rows)
    payloads = {name: row["payload_bytes_a_rank"] for name, row in rows.items()}
    assert max(payloads[name] for name in payloads if name != "crc32c") <= 60
    # 24 items: a byte says how many.
    assert payloads["unchanged"] + 24 * 4 + 1 == payloads["crc32c"]
    for row in rows.values():
        assert row["payload_bytes_a_rank"] < row["sent_bytes_a_rank"] < row["payload_bytes_a_rank"] + 500
        assert 0 < row["stored_bytes_a_rank"]
    assert 8 == len(result["ratios"])
