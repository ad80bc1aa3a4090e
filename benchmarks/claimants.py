"""Several ``shardbook watch --name`` that share the work, one of them killed: each checkpoint once, and none left out.

Every command that runs writes a line when it begins and one when it ends. Whether two ran on one checkpoint at a time
is read from the order of these lines. The killed watcher's command would never end by itself: another one has to do
its checkpoint, once the lease is over.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.common import Goal, Report
from benchmarks.writers import PROJECT, commit_steps
from shardbook.client import Client

_NAME: Final = "claimants"
_NONE: Final = Goal("<=", 0)
_LIMIT_S: Final = 120.0
#: A killed watcher's checkpoint is free again after this, seconds.
_LEASE_S: Final = 2
#: Marks the process that a watcher ran which is killed.
_DOOMED: Final = "doomed-"
#: What a command calls its checkpoint.
_REF: Final = '"$SHARDBOOK_RUN@$SHARDBOOK_STEP"'


@dataclass(frozen=True)
class Work:
    """What was done, from the lines that the commands wrote.

    Attributes:
        begun: How often a command began.
        left_out: Checkpoints on which none ended well.
        again: Times that one ended well beyond the first.
        overlapping: Times that one began while another ran on the same checkpoint.
    """

    begun: int
    left_out: int
    again: int
    overlapping: int


def judge_work(lines: Sequence[str], checkpoints: Sequence[str]) -> Work:
    """Reads what was done from lines ``begin REF PROCESS``, ``end REF PROCESS``, ``killed REF PROCESS``, in order."""
    running: dict[str, set[str]] = {ref: set() for ref in checkpoints}
    ended: Counter[str] = Counter()
    begun = overlapping = 0
    for what, ref, process in map(str.split, lines):
        if what == "begin":
            begun += 1
            overlapping += bool(running[ref])
            running[ref].add(process)
        else:
            running[ref].remove(process)
            ended[ref] += what == "end"
    left_out = sum(not ended[ref] for ref in checkpoints)
    return Work(begun, left_out, sum(count - 1 for count in ended.values() if count), overlapping)


def measure_claimants(report: Report, place: str, addresses: Sequence[str], count: int, checkpoints: int) -> None:
    """Adds what ``count`` claimants made of ``checkpoints`` checkpoints, spread over the servers."""
    run = f"{PROJECT}/claimed"
    client = Client(addresses[0])
    commit_steps(addresses[0], run, range(checkpoints))
    with tempfile.TemporaryDirectory(prefix="shardbook-claimants-") as folder:
        lines = Path(folder) / "lines"
        lines.touch()
        with ExitStack() as stack:
            first = stack.enter_context(
                _claiming(run, addresses[0], f"echo begin {_REF} {_DOOMED}$$ >>{lines}; exec sleep 600")
            )
            # Or the others would have done everything before it has one.
            _wait(lambda: _DOOMED in lines.read_text(), [first])
            began_s = time.monotonic()
            script = f"echo begin {_REF} $$ >>{lines}; sleep 0.1; echo end {_REF} $$ >>{lines}"
            others = [
                stack.enter_context(_claiming(run, addresses[at % len(addresses)], script)) for at in range(1, count)
            ]
            _wait(lambda: "end" in lines.read_text(), others)
            first.kill()
            first.wait()
            with lines.open("a") as file:
                file.write(lines.read_text().splitlines()[0].replace("begin", "killed") + "\n")
            _wait(lambda: client.get_subscription(_NAME).done_count >= checkpoints, others)
            took_s = time.monotonic() - began_s
        work = judge_work(lines.read_text().splitlines(), [f"{run}@{step}" for step in range(checkpoints)])
    report.row(
        database=place,
        what=f"{count} claimants, one killed",
        checkpoints=checkpoints,
        begun=work.begun,
        left_out=work.left_out,
        done_again=work.again,
        overlapping=work.overlapping,
        took_s=round(took_s, 1),
    )
    report.ratio(f"{place}: checkpoints left out by claimants", work.left_out, _NONE)
    report.ratio(f"{place}: checkpoints done again, or by two at a time", work.again + work.overlapping, _NONE)


@contextmanager
def _claiming(run: str, address: str, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a watcher that runs a shell's script on each checkpoint that it gets; ended with the block."""
    watch = [sys.executable, "-m", "shardbook.cli", "watch", run, f"--name={_NAME}", "--since=start"]
    process = subprocess.Popen(
        [*watch, f"--lease={_LEASE_S}", "--exec", f"sh -c {shlex.quote(script)}"],
        env={**os.environ, "SHARDBOOK_SERVER": address},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _wait(until: Callable[[], bool], claimants: Sequence[subprocess.Popen[bytes]]) -> None:
    end_s = time.monotonic() + _LIMIT_S
    while not until():
        if time.monotonic() > end_s or all(one.poll() is not None for one in claimants):
            raise RuntimeError("the claimants did not come to an end")
        time.sleep(0.1)
