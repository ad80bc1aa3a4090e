"""A session over a catalogue of 20 runs x 5,000 checkpoints: ``python -m examples.catalogue [--postgres]``.

It makes the catalogue, starts a server on it, and types what somebody who looks for a checkpoint types: every command
is shown with what it printed and how long it took. Exits 1 where one does not do what it should.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.catalogue_rows import Saved, catalogue
from benchmarks.catalogue_whole import REAL_STEP, TENSORS, fill, give_structures
from benchmarks.places import places
from benchmarks.postgres import free_port
from benchmarks.simulated import rank_payloads, running_server
from benchmarks.workload import Workload
from benchmarks.writers import Writer
from shardbook.client import Client
from shardbook_server.storage.database import Database

#: Lines of each command's output that are shown.
_SHOWN = 8


#: Runs ``shardbook`` with some arguments.
Runner = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


class Session:
    """Commands, one after the other. Not thread-safe.

    Args:
        run: Runs one.
    """

    def __init__(self, run: Runner) -> None:
        self._run = run
        self.command_count = 0
        self.slowest_s = 0.0

    def title(self, text: str) -> None:
        """Prints a heading."""
        print(f"\n=== {text}", flush=True)

    def type(self, command: str, says: str = "", *, code: int = 0, rows: int | None = None) -> str:
        """Runs a command, and shows what it printed and how long it took.

        Args:
            command: What stands behind ``shardbook``.
            says: Regular expression that its output has to match.
            code: Its exit code.
            rows: Lines that its table has to have, without the header.

        Returns:
            What it printed.

        Raises:
            SystemExit: It did something else.
        """
        print(f"\n$ shardbook {command}", flush=True)
        began_s = time.monotonic()
        ran = self._run(shlex.split(command))
        took_s = time.monotonic() - began_s
        told = (ran.stdout + ran.stderr).rstrip().splitlines()
        for line in told[:_SHOWN]:
            print(f"  {line[:150].rstrip()}")
        if len(told) > _SHOWN:
            print(f"  ... {len(told) - _SHOWN} more lines")
        print(f"  [{took_s:.2f} s, exit {ran.returncode}]", flush=True)
        self.command_count += 1
        self.slowest_s = max(self.slowest_s, took_s)
        count = sum(1 for line in ran.stdout.splitlines()[1:] if not line.startswith("only the first"))
        if ran.returncode != code:
            raise SystemExit(f"FAILED: exit code {ran.returncode}, not {code}")
        if not re.search(says, ran.stdout + ran.stderr, re.MULTILINE):
            raise SystemExit(f"FAILED: it does not say {says!r}")
        if rows is not None and rows != count:
            raise SystemExit(f"FAILED: {count} rows, not {rows}")
        return ran.stdout


@dataclass(frozen=True)
class Known:
    """What the session's author knows of the catalogue.

    Attributes:
        saves: What was put into it.
        run: A run of project ``llm`` whose newest checkpoints are of 8, 64 and 512 ranks.
        address: The server.
    """

    saves: Sequence[Saved]
    run: str
    address: str

    @property
    def best(self) -> Saved:
        """The live checkpoint of project ``llm`` with the least loss."""
        measured = [one for one in self.saves if one.project == "llm" and one.live and "val_loss" in one.metrics]
        return min(measured, key=lambda one: one.metrics["val_loss"])


def tell(session: Session, known: Known) -> None:
    """Types everything; raises where a command does not do what it should."""
    find(session, known)
    describe(session, known)
    compare(session, known)
    trace(session, known)
    keep(session, known)
    follow(session, known)


def find(session: Session, known: Known) -> None:
    """Projects, runs, checkpoints: pages, filters and orders over all of them."""
    session.title("What is there?")
    session.type("projects", r"^llm\b", rows=2)
    session.type("runs llm", rf"^{known.run}\b")
    session.type(f"ls {known.run} --limit 5", rf"@{REAL_STEP + 200}\b.*latest", rows=5)

    session.title("The best of all runs")
    best = known.best
    ref = rf"llm/{best.run}(:{best.part})?@{best.step}\b"
    session.type("ls 'llm/*' --order-by metrics.val_loss --limit 1", ref, rows=1)
    session.type("ls 'llm/*' -f 'labels.team = red AND metrics.val_loss < 1' -o metrics.val_loss -n 5", rows=5)
    session.type("ls '*/*' -f 'world_size = 512 AND step > 100' -o 'bytes desc' -n 5", rows=5)
    session.type(f"ls {known.run} -f 'step >= 100 AND step < 500'", r"@[1-4]00\b")
    session.type("ls '*/*' --all -f 'state = FAILED' -n 3", r"\bfailed\b", rows=3)
    session.type(f"ls {known.run} -f 'step = 12345678'", r"no such checkpoint is committed")
    session.type(f"ls {known.run} -f 'steps > 1'", r"steps", code=2)
    session.type("show llm/no-such-run@latest", r"no-such-run", code=3)


def describe(session: Session, known: Known) -> None:
    """What people and jobs say of checkpoints, and the names they give them."""
    session.title("Names: by hand, and by metric")
    run, newest = known.run, f"{known.run}@{REAL_STEP}"
    session.type(f"alias best --metric val_loss --min {run}", r"best")
    session.type(f"show {run}@best", r"val_loss")
    session.type(f"metric {newest} val_loss=-1", r"val_loss")
    session.type(f"alias {run}", rf"best\s.*{newest}\b")
    session.type(f"alias production {run}@best --protect", r"production")
    session.type(f"alias production {run}@latest", r"--force", code=1)

    session.title("Words: labels and notes, and finding them again")
    session.type(f"label {newest} stage=eval", r"eval")
    session.type("ls '*/*' -f 'labels.stage = eval'", newest, rows=1)
    session.type(f"note {newest} 'loss spike at 999,000: data shard 17'")
    session.type(f"note {newest}", r"data shard 17")
    session.type(f"show {newest}", r"production")


def compare(session: Session, known: Known) -> None:
    """Contents of checkpoints, side by side."""
    session.title("What is in it, and what is different?")
    run = known.run
    session.type(f"tensors {run}@{REAL_STEP} --limit 5", r"q_proj", rows=5)
    session.type(f"diff {run}@{REAL_STEP} {run}@{REAL_STEP + 100}", r"world size", code=1)
    session.type(f"chunks {run}@{REAL_STEP} model.layers.0.self_attn.q_proj.weight", r"8 of 8 chunks")
    session.type("du", r"llm/")


def trace(session: Session, known: Known) -> None:
    """Where checkpoints come from, and what became of them."""
    session.title("Where does it come from?")
    run, newest = known.run, f"{known.run}@{REAL_STEP}"
    session.type(f"lineage {newest} fine-tuned-from {run}@100", r"fine-tuned")
    session.type(f"lineage {newest} evaluated-by mmlu-5shot", r"mmlu")
    session.type(f"lineage {newest}", rf"{run}@100\b[\s\S]*mmlu-5shot|mmlu-5shot[\s\S]*{run}@100\b")
    session.type(f"lineage {run}@100 fine-tuned-from {newest}", r"cycle", code=1)


def keep(session: Session, known: Known) -> None:
    """What is kept, held, deleted and brought back."""
    session.title("What may go?")
    run = known.run
    session.type(f"hold {run}@200 --ttl 2h --name eval", r"eval")
    session.type(
        f"policy {run} --keep-last 5 --keep-every 1000 --keep-best 2 --metric val_loss --min", r"keep last +5\b"
    )
    session.type(f"prune {run} --dry-run --all", r"held by eval")
    session.type(f"rm {run}@200", r"held", code=1)
    session.type(f"release {run}@200 --name eval", r"not held")
    session.type(f"rm {run}@200", r"undelete")
    session.type(f"ls {run} -f 'step = 200'", r"no such checkpoint")
    session.type(f"undelete {run}@200", rf"{run}@200\b")
    session.type(f"move {run} --to archive --dry-run", r"SHARDBOOK_STORES=archive", code=2)


def follow(session: Session, known: Known) -> None:
    """A save that is open, and who hears of its commit."""
    session.title("Is it still saving?")
    run, step = known.run, REAL_STEP + 1_000
    session.type(f"status {run}:default --max-age 2h", str(REAL_STEP + 200))
    session.type("status vision/run-002 --max-age 2h", r"no commit within 2h", code=1)
    job = Writer(Client(known.address), run, rank_payloads(Workload(8, TENSORS, 8)), random.Random())
    job.start()
    job.register(step, range(6))
    session.type(f"status {run}:default", r"6 of 8 [\s\S]*missing +6-7")

    session.title("Somebody watches while it is committed")

    def finish() -> None:
        job.register(step, range(6, 8))
        job.commit()

    with Client(known.address).watch(until_now=True) as watching:
        list(watching)
    later = threading.Timer(1.0, finish)
    later.start()
    session.type(f"watch 'llm/*' --kind committed --limit 1 --since {watching.cursor}", rf"committed\s+{run}@{step}\b")
    later.join()
    session.type(f"watch {run} --since start --once", rf"alias-moved\s+{run}@latest\s+->\s+{run}@{step}\b")
    session.type(f"watch {run} --name mmlu --since start --once --exec 'true {{ref}}'", rf"{run}@{step}\S*  done")
    session.type("watch --name mmlu --status", r"done\s+4\b")


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the catalogue and tells the session; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", action="store_true", help="on Postgres instead of SQLite")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="runs, 20 unless given")
    parser.add_argument(
        "--per-run", type=int, default=5_000, metavar="N", help="checkpoints of each, 5,000 unless given"
    )
    arguments = parser.parse_args(argv)
    saves = catalogue(arguments.runs, arguments.per_run)
    with places(postgres=arguments.postgres) as found:
        place = found[-1]
        database, began_s = Database(place.url), time.monotonic()
        try:
            fill(database, saves)
            with running_server(place.database, free_port()) as server:
                runs = give_structures(database, server.address, saves)
                print(f"{len(saves):,} checkpoints on {place.name}, made in {time.monotonic() - began_s:.0f} s")
                session = Session(lambda words: _shardbook(words, server.address))
                tell(session, Known(saves, runs["llm"], server.address))
        finally:
            database.close()
    print(f"\nAll of it held: {session.command_count} commands, the slowest took {session.slowest_s:.2f} s.")
    return 0


def _shardbook(words: Sequence[str], address: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SHARDBOOK_SERVER": address, "COLUMNS": "150"}
    command = [sys.executable, "-m", "shardbook.cli", *words]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
