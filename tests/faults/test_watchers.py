"""Watching while everything around it fails: events once and in order; work at least once, by one at a time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shardbook import Client
from shardbook._channel import connections
from shardbook.errors import UnavailableError
from shardbook.events import Event, EventKind
from tests.behaviour.client.saves import save
from tests.conftest import MakeDatabases
from tests.faults.server import ServerProcess

WRITERS, STEPS, WATCHERS = 3, 6, 5
WATCH = [sys.executable, "-m", "shardbook.cli", "watch"]


def _save_until_it_is(client: Client, folder: Path, step: int, run: str, incarnation: bytes) -> None:
    """Saves, however often the server goes away meanwhile."""
    end_s = time.monotonic() + 60
    while True:
        try:
            save(client, folder / run / f"step-{step}", step, run=run, incarnation=incarnation)
        except UnavailableError:
            assert time.monotonic() < end_s
            time.sleep(0.1)
        else:
            return


class _Watcher(threading.Thread):
    """Watches commits until it has seen as many as there will be."""

    def __init__(self, client: Client, since: str, count: int, seed: int) -> None:
        super().__init__()
        self._client, self._since, self._count = client, since, count
        self._chance = random.Random(seed)
        self.seen: list[Event] = []

    def run(self) -> None:
        cursor, commits = self._since, 0
        while commits < self._count:
            # Now and then it begins anew with the cursor that it came to, as a process does that was restarted.
            left = self._chance.randint(1, 8)
            # A server may take longer to come back than a new watch waits for it.
            with suppress(UnavailableError), self._client.watch(since=cursor) as events:
                for event in events:
                    self.seen.append(event)
                    cursor = event.cursor
                    commits += event.kind is EventKind.COMMITTED
                    left -= 1
                    if commits == self._count or not left:
                        break


def _storm(servers: list[ServerProcess], folder: Path, disturb: Callable[[threading.Event], None]) -> None:
    addresses = ",".join(server.address for server in servers)
    client = Client(addresses, timeout_s=20)
    since = _cursor(client)
    watchers = [
        _Watcher(Client(servers[at % len(servers)].address if at % 2 else addresses), since, WRITERS * STEPS, at)
        for at in range(WATCHERS)
    ]

    def write(at: int) -> None:
        for step in range(STEPS):
            _save_until_it_is(client, folder, step, f"storm/run-{at}", bytes([at + 1]) * 16)

    writers = [threading.Thread(target=write, args=(at,)) for at in range(WRITERS)]
    done = threading.Event()
    disturber = threading.Thread(target=disturb, args=(done,))
    for thread in (*watchers, *writers, disturber):
        thread.start()
    for thread in writers:
        thread.join(60)
        assert not thread.is_alive()
    for watcher in watchers:
        watcher.join(45)
        assert not watcher.is_alive(), " ".join(f"{one.cursor[17:]}:{one.kind.value[:6]}" for one in watcher.seen)
    done.set()
    disturber.join()
    # The last commits' aliases may have been told to some alone.
    whole = list(client.watch(since=since, until_now=True))
    numbers = [int(event.cursor.partition("-")[2]) for event in whole]
    assert list(range(numbers[0], numbers[0] + len(numbers))) == numbers
    assert WRITERS * STEPS == len({one.checkpoint.name for one in whole if one.checkpoint and one.kind == "committed"})
    for watcher in watchers:
        seen = [event.cursor for event in watcher.seen]
        assert [event.cursor for event in whole][: len(seen)] == seen


def _cursor(client: Client) -> str:
    with client.watch(until_now=True) as events:
        assert [] == list(events)
        return events.cursor


def test_no_event_is_lost_or_doubled_while_the_server_is_killed(tmp_path: Path) -> None:
    """Writers, watchers that come and go, and a server that is killed and started again in their midst."""
    with ServerProcess(tmp_path / "server") as server:

        def disturb(done: threading.Event) -> None:
            for _ in range(3):
                if not done.wait(0.7):
                    server.restart()

        _storm([server], tmp_path, disturb)


def test_no_event_is_lost_or_doubled_over_replicas(tmp_path: Path, make_databases: MakeDatabases) -> None:
    """Two over one Postgres, one of which is replaced; cursors of one are good for the other."""
    url = make_databases("postgres").new()
    with ServerProcess(tmp_path / "a", url) as one, ServerProcess(tmp_path / "b", url) as other:

        def disturb(done: threading.Event) -> None:
            for _ in range(2):
                if not done.wait(0.8):
                    other.stop()
                    other.start()

        _storm([one, other], tmp_path, disturb)


# ---------------------------------------------------------------- work


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that is killed at the end."""
    with ServerProcess(tmp_path / "server") as server:
        yield server


@pytest.fixture
def evaluate(tmp_path: Path) -> str:
    """A command that notes when it begins and ends, and takes half a second; some take their watcher down."""
    script = tmp_path / "evaluate.py"
    script.write_text(
        """
import json, os, pathlib, signal, sys, time
log, ref, step = pathlib.Path(sys.argv[1]), os.environ["SHARDBOOK_REF"], int(os.environ["SHARDBOOK_STEP"])
def note(what):
    with log.open("a") as file:
        file.write(json.dumps([time.monotonic(), what, ref, os.environ["SHARDBOOK_ATTEMPT"]]) + "\\n")
assert sys.argv[2] == ref
# The watcher started what started us.
watcher = int(pathlib.Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])
pathlib.Path(f"{log}.{step}").write_text(str(watcher))
note("begins")
end = time.monotonic() + 0.5
while time.monotonic() < end:
    note("lives")
    time.sleep(0.05)
note("ends")
if os.environ.get("KILLS") == str(step) and os.environ["SHARDBOOK_ATTEMPT"] == "1":
    # So it dies when the work is done, before it has said so.
    os.kill(watcher, signal.SIGKILL)
"""
    )
    return f"{sys.executable} {script} {tmp_path / 'log'} {{ref}}"


def _watch(server: ServerProcess, command: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    args = [*WATCH, "--name", "mmlu", "--since", "start", "--exec", command, "--lease", "3", *options]
    return subprocess.Popen(
        args,
        env={**os.environ, "SHARDBOOK_SERVER": server.address, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _log(tmp_path: Path) -> list[tuple[float, str, str, str]]:
    path = tmp_path / "log"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _workers(tmp_path: Path, step: str) -> set[int]:
    """Process ids of the watchers that have begun to work on a step, or on those of a pattern."""
    return {int(content) for path in tmp_path.glob(f"log.{step}") if (content := path.read_text())}


def _await(condition: Callable[[], bool], within_s: float = 40.0) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def _never_two_at_a_time(log: list[tuple[float, str, str, str]]) -> None:
    """No attempt at a checkpoint gives a sign of life after a later one has begun."""
    begun: dict[str, int] = {}
    for _, what, ref, attempt in sorted(log):
        if what == "begins":
            begun[ref] = int(attempt)
        assert begun[ref] == int(attempt), (what, ref, attempt)


def test_killed_watchers_lose_nothing_and_nobody_works_beside_another(
    server: ServerProcess, evaluate: str, tmp_path: Path
) -> None:
    """One dies between claim and command, one in the midst of it, one when it has ended, before it is told."""
    for step in range(6):
        save(server.client, tmp_path / f"step-{step}", step, run="llm/8b", incarnation=b"k" * 16)
    claims = (
        "import os, shardbook; shardbook.Client().claim_checkpoint('mmlu', os.urandom(16), since='start', lease_s=3)"
    )
    subprocess.run(
        [sys.executable, "-c", f"{claims}; os.kill(os.getpid(), 9)"],
        env={**os.environ, "SHARDBOOK_SERVER": server.address},
        check=False,
        timeout=30,
    )
    assert ["running"] == [one.state.value for one in server.client.get_subscription("mmlu").claims]
    watchers = [_watch(server, evaluate, KILLS="3") for _ in range(3)]
    try:
        _await(lambda: any(what == "lives" for _, what, _, _ in _log(tmp_path)))
        # Whoever works on step 3 dies by itself, at its end.
        _await(lambda: bool(_workers(tmp_path, "[!3]") - _workers(tmp_path, "3")))
        doomed = _workers(tmp_path, "[!3]") - _workers(tmp_path, "3")
        next(watcher for watcher in watchers if watcher.pid in doomed).kill()
        _await(lambda: sum(watcher.poll() is None for watcher in watchers) == 1)
        watchers.append(_watch(server, evaluate))
        _await(lambda: server.client.get_subscription("mmlu").done_count == 6)
        assert () == server.client.get_subscription("mmlu").claims
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.communicate()
    log = _log(tmp_path)
    assert {f"llm/8b@{step}.s1.a1" for step in range(6)} == {ref for _, what, ref, _ in log if what == "ends"}
    _never_two_at_a_time(log)
    attempts = {(ref, attempt) for _, what, ref, attempt in log if what == "begins"}
    assert ("llm/8b@0.s1.a1", "2") in attempts
    assert ("llm/8b@0.s1.a1", "1") not in attempts
    assert {("llm/8b@3.s1.a1", "1"), ("llm/8b@3.s1.a1", "2")} <= attempts


def test_a_signal_reaches_the_command_and_gives_the_checkpoint_back(
    server: ServerProcess, tmp_path: Path, evaluate: str
) -> None:
    """At once, and without counting as an attempt; idle watchers end at once, too."""
    save(server.client, tmp_path / "step-1", 1, run="llm/8b", incarnation=b"k" * 16)
    watcher = _watch(
        server, f"{sys.executable} -c 'import time; print(\"on\", flush=True); time.sleep(60)'", "--lease", "60"
    )
    assert watcher.stdout is not None
    assert "running: attempt 1 of 3" in watcher.stdout.readline()
    assert "on\n" == watcher.stdout.readline()
    watcher.send_signal(signal.SIGTERM)
    out, _ = watcher.communicate(timeout=20)
    assert (128 + signal.SIGTERM, True) == (watcher.returncode, "released: signal 15" in out)
    idle = _watch(server, evaluate, "--lease", "60")
    assert idle.stdout is not None
    assert "attempt 1 of 3" in idle.stdout.readline()
    assert "done" in idle.stdout.readline()
    time.sleep(0.3)
    idle.send_signal(signal.SIGINT)
    idle.communicate(timeout=10)
    assert 128 + signal.SIGINT == idle.returncode
    assert 1 == server.client.get_subscription("mmlu").done_count


def test_a_command_outlives_its_server(server: ServerProcess, tmp_path: Path, evaluate: str) -> None:
    """The server is killed while it runs: what it did is told once the server is back."""
    save(server.client, tmp_path / "step-1", 1, run="llm/8b", incarnation=b"k" * 16)
    watcher = _watch(server, evaluate, "--lease", "30", "--limit", "1")
    _await(lambda: bool(_log(tmp_path)))
    server.kill()
    _await(lambda: any(what == "ends" for _, what, _, _ in _log(tmp_path)))
    server.start()
    out, _ = watcher.communicate(timeout=40)
    assert (0, True) == (watcher.returncode, "  done: " in out)
    connections._open.clear()
    assert 1 == server.client.get_subscription("mmlu").done_count
