"""``shardbook watch``: what happens, printed; work shared by command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardbook.cli.commands import Command
from shardbook.client import Client
from shardbook.errors import NotFoundError
from shardbook.events import EventKind
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.saves import save
from tests.behaviour.rpc.api import wait_until


@pytest.fixture
def run(client: Client, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A run of the test's own with two steps."""
    run = f"watch/{request.node.name.partition('[')[0].replace('_', '-')[:100]}"
    for step in (1, 2):
        save(client, tmp_path / f"step-{step}", step, run=run, incarnation=b"w" * 16)
    return run


def test_what_happened_is_printed(run: str, shardbook: Shardbook, client: Client) -> None:
    """By kind and filter, to the end of what there is; JSON is one event a line, whose cursor is good to go on."""
    ran = shardbook("watch", run, "--since", "start", "--once")
    assert (0, 4) == (ran.code, len(ran.rows))
    assert ["committed", f"{run}@1", "96 B"] == ran.rows[0][1:]
    assert ["alias-moved", f"{run}@latest", "->", f"{run}@2"] == ran.rows[3][1:]
    ran = shardbook(
        "watch", f"{run[:-1]}*", "--kind", "committed", "-f", "step > 1", "--since", "start", "--once", "--json"
    )
    (told,) = [json.loads(line) for line in ran.out.splitlines()]
    assert ("committed", 2, ["latest"]) == (told["kind"], told["checkpoint"]["step"], told["checkpoint"]["aliases"])
    assert 1 == len(shardbook("watch", run, "--since", told["cursor"], "--once").rows)
    assert "" == shardbook("watch", run, "--once").out
    assert 2 == len(shardbook("watch", run, "--since", "start", "-n", "2").rows)
    events = list(client.watch(run, kinds=[EventKind.COMMITTED], since="start", until_now=True))
    assert [f"{run}@1", f"{run}@2"] == [event.checkpoint.ref for event in events if event.checkpoint]


def test_work_is_done_once_and_failures_are_skipped(run: str, shardbook: Shardbook, tmp_path: Path) -> None:
    """Facts come by word and by environment; a failure exits 1, what is done stays done."""
    script = tmp_path / "work.py"
    script.write_text(
        "import os, pathlib, sys\n"
        f"with pathlib.Path({str(tmp_path / 'log')!r}).open('a') as log: print(*sys.argv[1:], file=log)\n"
        "assert sys.argv[1] == os.environ['SHARDBOOK_REF'] and os.environ['SHARDBOOK_SERVER']\n"
        "sys.exit(os.environ['SHARDBOOK_STEP'] == '2')\n"
    )
    name = run.replace("/", "-")[:100]
    command = f"{sys.executable} {script} {{ref}} {{path}} {{attempt}} '{{\"json\": 1}}'"
    args = ("watch", run, "--name", name, "--since", "start", "--exec", command, "--once", "--retry-delay", "0")
    ran = shardbook(*args, "--attempts", "2")
    assert 1 == ran.code, ran.err
    assert ["running", "done", "running", "failed", "running", "skipped"] == [
        row[1].partition(":")[0] for row in ran.rows
    ]
    words = [f"{run}@{step}.s1.a1 {tmp_path}/step-{step} {attempt}" for step, attempt in ((1, 1), (2, 1), (2, 2))]
    assert [f'{one} {{"json": 1}}' for one in words] == (tmp_path / "log").read_text().splitlines()
    assert (0, "") == (shardbook(*args).code, shardbook(*args).out)
    status = shardbook("watch", "--name", name, "--status", "--json").json["subscription"]
    assert (1, ["failed"], "exit code 1") == (
        status["done_count"],
        [one["state"] for one in status["claims"]],
        status["claims"][0]["failure"],
    )
    assert "exit code 1" in shardbook("watch", "--name", name, "--status").out
    every = shardbook("watch", "--status", "--json").json["subscriptions"]
    assert [status | {"claims": []}] == [one for one in every if one["name"] == name]
    assert name in [row[0] for row in shardbook("watch", "--status").rows]
    assert 1 == shardbook("watch", f"{run}:other", *args[2:]).code
    assert "is forgotten" in shardbook("watch", "--name", name, "--delete").out
    assert 3 == shardbook("watch", "--name", name, "--status").code


def test_a_watcher_that_was_idle_for_longer_than_a_lease_does_what_comes(
    run: str, client: Client, tmp_path: Path
) -> None:
    """Rule: the lease begins with the claim, however long there was nothing to claim."""
    name = run.replace("/", "-")[:100]
    command = [sys.executable, "-m", "shardbook.cli", "watch", run, "--name", name, "--since", "start", "--limit", "3"]
    with subprocess.Popen(
        [*command, "--lease", "2", "--exec", "sleep 0.2", "--plain"], stdout=subprocess.PIPE, text=True
    ) as watcher:
        try:
            wait_until(lambda: _done_count(client, name) == 2, within_s=60)
            # The lease and a little more.
            time.sleep(2.5)
            save(client, tmp_path / "step-3", 3, run=run, incarnation=b"w" * 16)
            out, _ = watcher.communicate(timeout=60)
        finally:
            watcher.kill()
    assert ["running", "done"] * 3 == [line.split()[1].rstrip(":") for line in out.splitlines()]
    assert (0, 3) == (watcher.returncode, _done_count(client, name))


def _done_count(client: Client, name: str) -> int:
    try:
        return client.get_subscription(name).done_count
    except NotFoundError:
        return 0


def test_an_unknown_placeholder_is_told_with_the_known_ones(client: Client, shardbook: Shardbook) -> None:
    """Nothing is done with a slip of the pen."""
    ran = shardbook("watch", "--name", "slip", "--exec", "echo {nope}", "--once")
    assert (2, True) == (ran.code, "{nope} is no placeholder: {ref}, {name}, {path}" in ran.err), ran.err
    assert 3 == shardbook("watch", "--name", "slip", "--status").code


@pytest.mark.parametrize("word", ['{"json": 1}', "{}", "{ print }", "{1,2}", "{{ref}}", "{{nope}}", "${HOME}"])
def test_braces_that_are_no_placeholder_are_left_alone(word: str) -> None:
    """They are for the command itself; in doubled ones what is known is filled in as ever."""
    argv = Command.parse(f"echo '{word}'").argv({"ref": "llm/8b@1"})
    assert ["echo", word.replace("{ref}", "llm/8b@1")] == argv


@pytest.mark.parametrize(
    "args",
    [
        ("--exec", "true"),
        ("--name", "a"),
        ("--name", "a", "--exec", ""),
        ("--name", "a", "--exec", "true 'open"),
        ("--name", "a", "--exec", "no-such-command {ref}"),
        ("--name", "a", "--exec", "sh -c 'echo {path}'"),
        ("--name", "a", "--exec", "/bin/bash -ec 'echo {ref}'"),
        ("--name", "a", "--exec", "echo {nope}"),
        ("--name", "a", "--exec", "echo --step={Step} {ref}"),
        ("--name", "a", "--exec", "true", "--kind", "failed"),
        ("--name", "a b", "--exec", "true"),
        ("--delete",),
        ("--status", "--exec", "true"),
        ("--since", "yesterday", "--once"),
        ("a b/*",),
    ],
)
def test_usage_errors(client: Client, shardbook: Shardbook, args: tuple[str, ...]) -> None:
    """Exit 2: also for a shell that would read names and paths as its own words."""
    ran = shardbook("watch", *args)
    assert (2, "") == (ran.code, ran.out), ran.err
