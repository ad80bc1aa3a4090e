"""The benchmark of writers and watchers runs, on a small scale, and tells what a watcher got wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.claimants import Work, judge_work
from benchmarks.common import Report
from benchmarks.followers import COMMITS, EVERYTHING, Follower, Heard
from benchmarks.following import Events, FollowSizes, Verdict, judge, measure_following
from benchmarks.places import places

SMALL = FollowSizes(writers=4, watchers=5, saves=8, rounds=1, paced_saves=2, period_s=0.1, claimants=2, claimed=3)
TRUE = Events(
    cursors=np.arange(1, 6),
    facts=np.arange(11, 16),
    runs=["bench/writer-00", "bench/writer-00", "bench/writer-10", "bench/writer-01", "bench/writer-01"],
    kinds=["committed", "failed", "committed", "committed", "alias-moved"],
    aliases=["", "", "", "", "latest"],
)


def heard(cursors: Sequence[int], facts: Sequence[int] | None = None, follower: Follower = EVERYTHING) -> Heard:
    """What a watcher heard, with the right facts unless others are given."""
    said = [10 + cursor for cursor in cursors] if facts is None else facts
    return Heard(follower, np.array(cursors, "i8"), np.array(said, "i8"), np.zeros(len(cursors)), 1)


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (heard([1, 2, 3, 4, 5]), Verdict()),
        (heard([1, 4], follower=COMMITS), Verdict()),
        (heard([]), Verdict(lost=5)),
        (heard([1, 2, 4, 5]), Verdict(lost=1)),
        (heard([1, 2, 2, 3, 4, 5]), Verdict(doubled=1)),
        (heard([1, 3, 2, 4, 5]), Verdict(misplaced=1)),
        (heard([1, 2, 3, 4, 5], [11, 12, 99, 14, 15]), Verdict(altered=1)),
        (heard([1, 2, 3, 4, 5, 6]), Verdict(altered=1)),
        (heard([1, 3, 4], follower=COMMITS), Verdict(altered=1)),
        (heard([1, 2, 3, 1, 2, 3, 4]), Verdict(lost=1, doubled=3, misplaced=1)),
    ],
)
def test_what_a_watcher_got_wrong_is_counted(told: Heard, verdict: Verdict) -> None:
    """Rule: what it was not told, was told twice, too early, or though it did not happen or was not asked for."""
    assert verdict == judge(TRUE, told)


@pytest.mark.parametrize(
    ("lines", "work"),
    [
        (["begin a 1", "begin b 2", "end b 2", "end a 1"], Work(2, 0, 0, 0)),
        (["begin a 1", "killed a 1", "begin b 2", "end b 2", "begin a 2", "end a 2"], Work(3, 0, 0, 0)),
        (["begin a 1", "end a 1"], Work(1, 1, 0, 0)),
        (["begin a 1", "begin a 2", "end a 1", "end a 2", "begin b 3", "end b 3"], Work(3, 0, 1, 1)),
        (["begin a 1", "end a 1", "begin b 2", "end b 2", "begin a 2", "end a 2"], Work(3, 0, 1, 0)),
    ],
)
def test_what_claimants_got_wrong_is_counted(lines: list[str], work: Work) -> None:
    """Rule: a checkpoint that none did, that was done again, or on which two worked at a time."""
    assert work == judge_work(lines, ["a", "b"])


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.soak  # in make test: tests/faults/test_watchers.py
def test_no_event_is_lost_and_no_checkpoint_left_out(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rule: real servers, writers and watchers: each hears all that it has to, reconnecting ones too."""
    report = Report("following")
    with places(postgres=kind == "postgres") as found:
        measure_following(report, found[-1:], SMALL)
    assert 0 == report.finish(check=True)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["what"]: row for row in result["rows"]}
    watched = rows["writers and watchers"]
    assert watched["delay_p50_ms"] <= watched["delay_p99_ms"]
    assert watched["events_per_s"] < watched["told_per_s"]
    # The one that reconnects did.
    assert SMALL.watchers < watched["streams"]
    claimed = rows["2 claimants, one killed"]
    # What the killed one had begun, another began again.
    assert SMALL.claimed + 1 == claimed["begun"]
    assert 0 == claimed["left_out"] == claimed["done_again"] == claimed["overlapping"]
