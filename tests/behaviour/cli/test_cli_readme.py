"""Every command of the README runs, against a real server and real checkpoints of the names that it uses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as plain_dcp

from shardbook import dcp
from shardbook_server.app import Server, running_server
from shardbook_server.settings import Settings
from tests.behaviour.cli.conftest import Shardbook

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")

ROOT = Path(__file__).resolve().parents[3]
README, DOCS = ROOT / "README.md", ROOT / "docs" / "cli.md"
#: What a command answers by design with the checkpoints below, where that is not 0.
ANSWERS = {"diff": 1}


def command_lines() -> list[str]:
    """Every line of a shell or console block that calls `shardbook`, without comments."""
    blocks = re.findall(r"```(?:shell|console)\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    # `demo` starts a server of its own and runs the others: test_cli_demo.py.
    shown = [line for line in lines if line.startswith("shardbook ") and not line.startswith("shardbook demo")]
    return [re.split(r"\s+#", line)[0] for line in shown]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server that knows ``llm/8b-v3``, and the folder that stands for ``/``."""
    root = tmp_path_factory.mktemp("readme")
    embed = torch.arange(80.0).reshape(20, 4)
    state = {"model": {"embed": {"weight": embed}, "norm": {"weight": torch.ones(4)}}}
    url = f"sqlite:///{root / 'db'}"
    with running_server(Settings(listen="127.0.0.1:0", http_listen="", database_url=url, drain_s=5)) as server:
        dcp.init(run="llm/8b-v3", server=server.address)
        dcp.save({"model": {"embed": {"weight": embed}}}, checkpoint_id=root / "ckpt" / "step-1000")
        dcp.save(state, checkpoint_id=root / "ckpt" / "step-1500")
        dcp.close()
        plain_dcp.save(state, checkpoint_id=root / "old" / "ckpt" / "step-90000", no_dist=True)
        yield server, root


def test_the_readme_shows_most_commands() -> None:
    """And this test finds them."""
    shown = {shlex.split(line)[1] for line in command_lines()}
    assert {"runs", "ls", "show", "tensors", "cat", "verify", "import", "status", "diff", "gc", "doctor"} <= shown


def words_of(line: str, root: Path) -> list[str]:
    """The words of a command, with ``root`` for ``/``."""
    return [re.sub(r"^(?=/(ckpt|old)\b)", str(root), word) for word in shlex.split(line)[1:]]


@pytest.mark.parametrize("line", command_lines())
def test_every_command_of_the_readme_runs(
    line: str, places: tuple[Server, Path], shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rule: what the README says to type does what it says, as it stands there but for the paths."""
    server, root = places
    monkeypatch.setenv("SHARDBOOK_SERVER", server.address)
    monkeypatch.chdir(tmp_path)
    words = words_of(line, root)
    ran = shardbook(*words)
    assert (ANSWERS.get(words[0], 0), "") == (ran.code, ran.err)
    assert ran.out


@pytest.mark.parametrize("line", command_lines())
def test_plain_is_plain_on_a_terminal_too(
    line: str, places: tuple[Server, Path], shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rule: with --plain no command writes an escape sequence, or folds a line, whatever it writes to."""
    server, root = places
    for name, value in (("SHARDBOOK_SERVER", server.address), ("TERM", "xterm-256color"), ("COLUMNS", "20")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.chdir(tmp_path)
    ran = shardbook(*words_of(line, root), "--plain")
    assert "\x1b" not in ran.out + ran.err
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    (tmp_path / "step-1500.metadata").unlink(missing_ok=True)
    (tmp_path / "rows.safetensors").unlink(missing_ok=True)
    piped = shardbook(*words_of(line, root))
    assert len(piped.out.splitlines()) == len(ran.out.splitlines())


def documented_keys(command: str) -> list[str]:
    """The keys of the object that docs/cli.md says a command prints."""
    row = re.search(rf"^\| `shardbook {command}` \| `(\{{.*?\}})`", DOCS.read_text(), flags=re.MULTILINE)
    assert row is not None
    text = row[1]
    depths = [text[:at].count("{") - text[:at].count("}") for at in range(len(text))]
    return [match[1] for match in re.finditer(r'"(\w+)":', text) if depths[match.start()] == 1]


@pytest.mark.parametrize("line", command_lines())
def test_json_is_what_the_documentation_says(
    line: str, places: tuple[Server, Path], shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rule: one object, with the keys of docs/cli.md, no more and no less."""
    server, root = places
    monkeypatch.setenv("SHARDBOOK_SERVER", server.address)
    monkeypatch.chdir(tmp_path)
    words = words_of(line, root)
    assert documented_keys(words[0]) == list(shardbook(*words, "--json").json)
