"""Faults on purpose: nothing unless asked, and never by a name that does not exist."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from shardbook.errors import InvalidArgumentError, UnavailableError
from shardbook_server.failpoints import EXIT_CODE, POINTS, VARIABLE, Failpoints


def test_nothing_happens_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: off unless the environment sets them."""
    monkeypatch.delenv(VARIABLE, raising=False)
    points = Failpoints.from_environment()
    assert not points
    for point in POINTS:
        points.hit(point)


def test_each_kind_of_fault_at_its_point() -> None:
    """Rule: faults are written ``point=kind(number)`` behind semicolons, and strike at their own point only."""
    points = Failpoints.parse("commit.after_db=sleep(0.05); register.after_db=error(1); plan.before_db=error(0)")
    assert points
    began = time.monotonic()
    points.hit("commit.after_db")
    assert time.monotonic() - began >= 0.05
    with pytest.raises(UnavailableError) as struck:
        points.hit("register.after_db")
    assert struck.value.retry_delay_s is not None
    points.hit("plan.before_db")
    points.hit("register.before_db")


def test_exit_ends_the_process_at_once() -> None:
    """Rule: as SIGKILL would: no handler, no finally."""
    code = (
        "from shardbook_server.failpoints import Failpoints\n"
        "try: Failpoints.from_environment().hit('commit.before_db')\n"
        "finally: print('survived')"
    )
    environment = {VARIABLE: "commit.before_db=exit"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (EXIT_CODE, b"") == (done.returncode, done.stdout)


@pytest.mark.parametrize(
    "text", ["commit.before=exit", "commit.before_db", "commit.before_db=fly", "commit.before_db=sleep", "=exit"]
)
def test_a_fault_that_would_never_strike_is_refused(text: str) -> None:
    """Rule: a point or fault that does not exist is an error: a test with it would prove nothing."""
    with pytest.raises(InvalidArgumentError):
        Failpoints.parse(text)
