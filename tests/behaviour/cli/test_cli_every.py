"""What holds for every command: exit codes, --json, --plain, help with examples that parse, completion."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from shardbook.cli import failures
from shardbook.cli.registry import COMMANDS
from shardbook.v1 import catalog_pb2, metadata_pb2, registration_pb2
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.directories import CheckpointDirectory, identity
from tests.behaviour.client.scripted import refuse, scripted_server

ROOT = Path(__file__).resolve().parents[3]
REF, RUN = "llm/8b@10", "llm/8b"
#: Arguments with which each command asks the server; DIR is a checkpoint directory that needs it.
ASKING = {
    "projects": [],
    "runs": [],
    "ls": [RUN],
    "show": [REF],
    "label": [REF, "stage=eval"],
    "metric": [REF, "loss=1.5"],
    "note": [REF, "a note"],
    "alias": ["production", REF],
    "lineage": [REF],
    "tensors": [REF],
    "chunks": [REF, "model.w"],
    "diff": [REF, "llm/8b@20"],
    "status": [RUN],
    "watch": ["--once"],
    "cat": [REF, "model.w"],
    "read": [REF, "model.w"],
    "export": [REF, "-o", "DIR/exported"],
    "du": [RUN],
    "verify": [REF],
    "move": [RUN, "--to", "copies"],
    "sync": ["DIR"],
    "import": ["DIR", "--run", RUN],
    "gc": ["DIR", "--dry-run", "--older-than", "1s"],
    "hold": [REF, "--ttl", "2h"],
    "release": [REF],
    "prune": [RUN, "--keep-last", "1", "--dry-run"],
    "policy": [RUN],
    "rm": [REF],
    "undelete": [REF],
}
#: Commands that answer for themselves what a server says or does not say: `doctor` tells it, `relay` passes it on,
#: `demo` starts one, `stores` asks none.
OTHERS = {"doctor", "relay", "demo", "stores"}


def commands() -> dict[str, Any]:
    """Every command that does something, by name."""
    return {name: one.load() for name, one in COMMANDS.items()}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """The words of a command that asks the server, and finds in its directory what it asks about."""
    monkeypatch.setenv("SHARDBOOK_STORES", f"copies={tmp_path}")
    CheckpointDirectory(tmp_path).add_manifest(identity(10))
    killed = identity(10, incarnation=b"2" * 16)
    CheckpointDirectory(tmp_path).add_records(killed, without=(1,))
    for path in tmp_path.rglob("*"):
        os.utime(path, (1.7e9, 1.7e9))
    return lambda command: [command, *(word.replace("DIR", str(tmp_path)) for word in ASKING[command])]


def test_the_table_covers_all_commands() -> None:
    """A command that is added is tested below, or says here why not."""
    assert set(commands()) == set(ASKING) | OTHERS


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.NOT_FOUND, failures.NOT_FOUND),
        (grpc.StatusCode.PERMISSION_DENIED, failures.DENIED),
        (grpc.StatusCode.UNAUTHENTICATED, failures.DENIED),
        (grpc.StatusCode.INTERNAL, failures.UNAVAILABLE),
        (grpc.StatusCode.INVALID_ARGUMENT, failures.USAGE),
    ],
    ids=["not-found", "denied", "no-token", "bug", "usage"],
)
def test_what_the_server_refuses_ends_every_command_alike(
    status: grpc.StatusCode, code: int, shardbook: Shardbook, words: Callable[[str], list[str]]
) -> None:
    """Rule: one table of exit codes; nothing on standard output, the reason and what to type on standard error."""

    def handler(_request: Any, context: grpc.ServicerContext) -> Any:
        refuse(context, status, status.name, "the server says no")

    names = [
        method.name
        for file in (registration_pb2, metadata_pb2, catalog_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    # Recording what the catalogue lacks begins with a name that it does not find.
    telling = {"sync", "import", "gc"} if status is grpc.StatusCode.NOT_FOUND else set()
    # One that is refused is told with all others that were found.
    telling |= {"sync", "import"} if code in (failures.USAGE, failures.UNAVAILABLE) else set()
    with scripted_server(0, **dict.fromkeys(names, handler)) as server:
        ended = {
            command: shardbook(*words(command), "--server", server.target)
            for command in ASKING
            if command not in telling
        }
    assert dict.fromkeys(ended, code) == {command: ran.code for command, ran in ended.items()}
    for ran in ended.values():
        assert "" == ran.out
        assert ran.err.startswith("error: the server says no")
        if code in (failures.NOT_FOUND, failures.DENIED):
            assert "\ntry: " in ran.err


@pytest.mark.parametrize("command", sorted(ASKING))
def test_a_server_that_is_away_ends_every_command_alike(
    command: str, shardbook: Shardbook, words: Callable[[str], list[str]]
) -> None:
    """Rule: 4, soon, and nothing on standard output."""
    ran = shardbook(*words(command), "--server", "127.0.0.1:9", "--timeout", "0.2")
    assert (failures.UNAVAILABLE, "") == (ran.code, ran.out)
    assert "127.0.0.1:9" in ran.err


@pytest.mark.parametrize("command", sorted(ASKING))
def test_no_server_is_named(
    command: str, shardbook: Shardbook, words: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: 2, with what to set and what starts one."""
    monkeypatch.delenv("SHARDBOOK_SERVER", raising=False)
    ran = shardbook(*words(command))
    assert failures.USAGE == ran.code
    assert "SHARDBOOK_SERVER" in ran.err
    assert "`shardbook-server serve`" in ran.err


@pytest.mark.parametrize("command", sorted(commands()))
def test_help_explains_and_shows_examples_that_parse(command: str, shardbook: Shardbook) -> None:
    """Rule: every command has examples, and they are commands of this release; a wrong option is usage."""
    ran = shardbook(command, "--help")
    assert 0 == ran.code
    examples = re.findall(r"^ +(shardbook .*)$", commands()[command].epilog, flags=re.MULTILINE)
    assert examples
    for example in examples:
        line = re.split(r" \||&| #", example)[0]
        _, name, *rest = shlex.split(line)
        assert name == command
        commands()[name].make_context(name, rest)
    wrong = shardbook(command, "--no-such-option")
    assert (failures.USAGE, True) == (wrong.code, f"shardbook {command} -h" in wrong.err)


@pytest.mark.parametrize("command", sorted(set(commands()) - {"relay"}))
def test_every_command_speaks_to_programs(command: str) -> None:
    """Rule: --json and --plain everywhere, and the JSON is described in docs/cli.md."""
    options = {name for parameter in commands()[command].params for name in parameter.opts}
    assert {"--json", "--plain"} <= options
    assert f"| `shardbook {command}` | `{{" in (ROOT / "docs" / "cli.md").read_text()


@pytest.fixture
def completed() -> Callable[[str], list[str]]:
    """What the shell completes a line to, in a process of its own as a shell would."""

    def complete(line: str) -> list[str]:
        environ = {**os.environ, "_SHARDBOOK_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "1"}
        program = "from shardbook.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
        return done.stdout.split()

    return complete


def test_the_shell_completes_commands(completed: Callable[[str], list[str]]) -> None:
    """Rule: `shardbook di<TAB>` is `diff`; all commands are offered."""
    assert ["diff"] == completed("shardbook di")
    assert set(commands()) == set(completed("shardbook "))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_list_of_commands_says_what_each_says_of_itself(command: str) -> None:
    """Rule: the table that `shardbook --help` is made of, without importing a command, has its first sentence."""
    one = COMMANDS[command]
    loaded = one.load()
    assert one.summary == re.split(r"(?<=\.)\s", loaded.help.partition("\n\n")[0])[0].replace("\n", " ")
    assert command == loaded.name


def test_a_command_that_cannot_be_imported_says_so(shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: what is imported late fails as loudly; all other commands, and the list of them, go on."""
    monkeypatch.setitem(sys.modules, "shardbook.cli.du", None)
    with pytest.raises(ImportError, match=r"shardbook\.cli\.du"):
        shardbook("du")
    assert 0 == shardbook("--help").code


def test_exit_codes_are_documented_and_those_of_the_code() -> None:
    """Rule: one table, in docs/cli.md, of the numbers that failures.py has."""
    page = (ROOT / "docs" / "cli.md").read_text().partition("## Exit codes of `shardbook`")[2].partition("\n## ")[0]
    documented = {int(number) for number in re.findall(r"^\| ([0-9]+) \|", page, flags=re.MULTILINE)}
    known = {
        getattr(failures, name) for name in dir(failures) if name.isupper() and isinstance(getattr(failures, name), int)
    }
    assert known == documented


def test_ctrl_c_ends_a_command_quietly(shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: 130, as shells have it, and no traceback."""

    def interrupted(*_args: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardbook.client.Client.list_runs", interrupted)
    ran = shardbook("runs", "--server", "127.0.0.1:9")
    assert (failures.INTERRUPTED, "", "") == (ran.code, ran.out, ran.err.strip())


@pytest.mark.parametrize("words", [["--version"], ["--help"]], ids=["at-the-end", "at-once"])
def test_a_reader_that_goes_away_is_no_failure(words: list[str]) -> None:
    """Rule: `shardbook ... | head` says nothing on standard error."""
    gone, pipe = os.pipe()
    os.close(gone)
    program = "from shardbook.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(pipe)
    assert "" == done.stderr
