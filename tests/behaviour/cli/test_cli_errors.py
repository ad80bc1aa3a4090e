"""Exit codes, and what stderr says: the next command, never a traceback."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from shardbook._version import __version__
from shardbook.v1 import catalog_pb2
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.directories import CheckpointDirectory, identity
from tests.behaviour.client.scripted import refuse, scripted_server

S = grpc.StatusCode


@pytest.mark.parametrize(
    ("status", "reason", "code", "advice"),
    [
        (S.NOT_FOUND, "NOT_FOUND", 3, "shardbook ls project/run --all"),
        (S.UNAVAILABLE, "UNAVAILABLE", 4, ""),
        (S.RESOURCE_EXHAUSTED, "QUOTA", 4, ""),
        (S.INTERNAL, "INTERNAL", 4, "bug"),
        (S.UNAUTHENTICATED, "TOKEN_EXPIRED", 5, "SHARDBOOK_TOKEN"),
        (S.PERMISSION_DENIED, "PERMISSION_DENIED", 5, "SHARDBOOK_TOKEN"),
        (S.INVALID_ARGUMENT, "INVALID_NAME", 2, ""),
        (S.FAILED_PRECONDITION, "CHECKPOINT_NOT_COMMITTED", 1, ""),
    ],
)
def test_exit_code_follows_the_answer(
    status: grpc.StatusCode, reason: str, code: int, advice: str, shardbook: Shardbook
) -> None:
    """0 ok, 1 negative, 2 usage, 3 not found, 4 unavailable, 5 denied; the answer's text is passed on."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, status, reason, "because\x1b[2J of this")

    with scripted_server(GetCheckpoint=handle) as server:
        ran = shardbook("show", "llm/8b@latest", "--server", server.target, "--timeout", "1")
    assert (code, "") == (ran.code, ran.out)
    assert ran.err.startswith("error: because\\x1b[2J of this\n")
    assert advice in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("runs", "llm/8b"), "is a run, not a project: try `shardbook ls llm/8b`"),
        (("runs", "llm/8b@1500"), "is a checkpoint, not a project: try `shardbook show llm/8b@1500`"),
        (("runs", "/ckpt/step-1"), "is a path"),
        (("ls", "llm/8b@1500"), "is a checkpoint, not a run: try `shardbook show llm/8b@1500`"),
        (("ls", "llm/8b:optim@1500"), "is a checkpoint, not a run: try `shardbook show llm/8b:optim@1500`"),
        (("ls", "llm"), "is a project, not a run: try `shardbook runs llm`"),
        (("ls", "./ckpt"), "is a path"),
        (("show", "llm/8b"), "is a run, not a checkpoint: try `shardbook ls llm/8b`, or add @latest: llm/8b@latest"),
        (("show", "projects/llm/runs/8b"), "is a run, not a checkpoint"),
        (("show", "llm"), "is a project, not a checkpoint: try `shardbook runs llm`"),
        (("show", "llm/8b@-1"), "write"),
        (("show", "/ckpt/8b/step-1"), "`shardbook sync` and `shardbook.dcp.load` take paths"),
        (("tensors", "s3://bucket/ckpt"), "`shardbook sync` and `shardbook.dcp.load` take paths"),
    ],
)
def test_a_name_of_another_kind_gets_the_command_that_takes_it(
    words: tuple[str, str], advice: str, shardbook: Shardbook
) -> None:
    """Without asking a server."""
    ran = shardbook(*words, "--server", "127.0.0.1:1")
    assert 2 == ran.code
    assert advice in ran.err
    assert "{project}" not in ran.err


def test_advice_is_not_given_twice(shardbook: Shardbook) -> None:
    """Where the server's answer names a command, that is the one."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, S.NOT_FOUND, "NOT_FOUND", "llm/8b@7 does not exist; `shardbook ls llm/8b` lists what there is")

    with scripted_server(GetCheckpoint=handle) as server:
        ran = shardbook("show", "llm/8b@7", "--server", server.target)
    assert (3, 1) == (ran.code, len(ran.err.splitlines()))


def test_server_of_another_kind_is_unavailable(shardbook: Shardbook) -> None:
    """An older server, or one of something else, is exit code 4 and says so."""
    with scripted_server() as server:
        ran = shardbook("runs", "--server", server.target)
    assert 4 == ran.code
    assert "older than this client, or not a Shardbook server" in ran.err


def test_nobody_listening_is_unavailable(shardbook: Shardbook) -> None:
    """The message names the command that starts a server."""
    ran = shardbook("runs", "--server", "127.0.0.1:1", "--timeout", "0.5")
    assert 4 == ran.code
    assert "shardbook-server serve" in ran.err


def test_no_server_named_is_a_usage_error(shardbook: Shardbook) -> None:
    """Neither option nor setting: says which to give."""
    ran = shardbook("runs")
    assert 2 == ran.code
    assert "--server HOST:PORT or set SHARDBOOK_SERVER" in ran.err


@pytest.mark.parametrize(
    "args",
    [
        ["ls", "no-slash"],
        ["ls", "llm/8b:"[:-1] + "/x"],
        ["show", "llm/8b"],
        ["show", "llm/8b@"],
        ["runs", "a/b"],
        ["runs", "--limit", "-1"],
        ["nonsense"],
        ["ls"],
        ["sync"],
        ["runs", "--server", "http://x:1"],
    ],
)
def test_wrong_usage_is_exit_code_2(args: list[str], shardbook: Shardbook) -> None:
    """Nothing is sent for arguments that cannot mean anything."""
    ran = shardbook(*args, *([] if "--server" in args or args == ["nonsense"] else ["--server", "127.0.0.1:1"]))
    assert (2, "") == (ran.code, ran.out)
    assert ran.err


def test_bad_setting_is_exit_code_2(shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting at fault is named."""
    monkeypatch.setenv("SHARDBOOK_PLAN_WAIT_S", "soon")
    ran = shardbook("runs", "--server", "127.0.0.1:1")
    assert 2 == ran.code
    assert "SHARDBOOK_PLAN_WAIT_S does not parse: 'soon' is not a number of seconds" in ran.err
    monkeypatch.setenv("SHARDBOOK_PLAN_WAIT_S", "1")
    monkeypatch.setenv("SHARDBOOK_MODE", "foo")
    ran = shardbook("runs", "--server", "127.0.0.1:1")
    assert "SHARDBOOK_MODE does not parse: 'foo' is not one of online, offline, disabled" in ran.err


def test_sync_exits_1_when_something_was_not_recorded(shardbook: Shardbook, tmp_path: Path) -> None:
    """An incomplete save is a negative answer; the table says which ranks are missing."""
    CheckpointDirectory(tmp_path / "step-1").add_records(identity(), without=(1, 3))
    with scripted_server() as server:
        ran = shardbook("sync", str(tmp_path), "--server", server.target)
        as_json = shardbook("sync", str(tmp_path), "--server", server.target, "--json")
    assert 1 == ran.code
    assert "2 of 4 ranks left no record: 1, 3" in ran.out
    assert "1 incomplete" == ran.out.splitlines()[-1]
    assert (1, [1, 3], {"recorded": 0, "present": 0, "incomplete": 1, "superseded": 0, "refused": 0}) == (
        as_json.code,
        as_json.json["attempts"][0]["missing_ranks"],
        as_json.json["counts"],
    )


def test_sync_of_nothing_is_a_negative_answer(shardbook: Shardbook, tmp_path: Path) -> None:
    """No directory of ours below: what to name is told. A directory that is not there is exit code 3."""
    ran = shardbook("sync", str(tmp_path), "--server", "127.0.0.1:1")
    assert 1 == ran.code
    assert ran.out.startswith("no checkpoint directories that Shardbook wrote were found: name the directory")
    assert [] == shardbook("sync", str(tmp_path), "--json", "--server", "127.0.0.1:1").json["attempts"]
    assert 3 == shardbook("sync", str(tmp_path / "nowhere"), "--server", "127.0.0.1:1").code


@pytest.mark.parametrize("command", ["runs", "ls", "show", "tensors", "sync"])
def test_help_has_an_example_and_the_common_options(command: str, shardbook: Shardbook) -> None:
    """Every command shows how it is used."""
    ran = shardbook(command, "--help")
    assert 0 == ran.code
    assert f"  shardbook {command}" in ran.out.split("Examples:")[1]
    assert all(option in ran.out for option in ("--json", "--server", "--timeout"))


def test_help_lists_commands_and_exit_codes(shardbook: Shardbook) -> None:
    """The first page: commands, codes, what a ref is."""
    text = shardbook("--help").out
    assert all(f"  {command} " in text for command in ("runs", "ls", "show", "tensors", "sync"))
    assert "0 ok, 1 negative answer, 2 usage, 3 not found, 4 unavailable, 5 denied" in text


def test_version(shardbook: Shardbook) -> None:
    """`--version` prints the release."""
    assert f"shardbook {__version__}\n" == shardbook("--version").out


def test_missing_extra_is_named() -> None:
    """Without rich and typer the command says what to install, and no traceback."""
    code = "import sys; sys.modules['rich'] = None; from shardbook.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 2 == done.returncode
    assert "pip install 'shardbook[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def on_a_terminal(args: list[str], environment: dict[str, str]) -> str:
    """Runs the command with a terminal for stdout and returns what the terminal got."""
    master, slave = pty.openpty()
    done = subprocess.Popen([sys.executable, "-m", "shardbook.cli", *args], stdout=slave, env=environment)
    os.close(slave)
    chunks = []
    try:
        while chunk := os.read(master, 1 << 16):
            chunks.append(chunk)
    except OSError:  # the other end is closed: all is read
        pass
    os.close(master)
    assert 0 == done.wait(20)
    return b"".join(chunks).decode()


def test_no_color_is_honoured() -> None:
    """Headers are bold on a terminal; with NO_COLOR and in a pipe nothing but text is written."""
    coloured = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    run = {"name": "projects/llm/runs/8b", "parts": [{"part": "default"}]}
    answer: Callable[..., Any] = lambda *_: catalog_pb2.ListRunsResponse(runs=[run])  # noqa: E731
    with scripted_server(ListRuns=answer) as server:
        args = ["runs", "--server", server.target]
        on = on_a_terminal(args, coloured)
        off = on_a_terminal(args, {**coloured, "NO_COLOR": "1"})
        piped = subprocess.run(
            [sys.executable, "-m", "shardbook.cli", *args], capture_output=True, text=True, check=True, env=coloured
        ).stdout
    assert "\x1b[1m" in on
    assert "\x1b[" not in off
    assert "\x1b[" not in piped
