"""The README says what is there: commands, names, files."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/ARCHITECTURE.md",
    "docs/RUNBOOK.md",
    "docs/SETTINGS.md",
    "docs/cli.md",
    "docs/filters.md",
    "docs/decisions/README.md",
    "deploy/README.md",
)


def _blocks(page: str, language: str) -> Iterator[str]:
    return iter(re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL))


def _commands(page: str) -> Iterator[list[str]]:
    """Every command line in a page's shell blocks, as words."""
    for block in _blocks(page, "shell"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_somewhere(page: str) -> None:
    """Rule: relative links of a page exist."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [] == [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists_and_is_listed(page: str) -> None:
    """Rule: what a page tells people to make is in `make help`."""
    text = (ROOT / page).read_text()
    wanted = {words[1] for words in _commands(page) if words[0] == "make"}
    wanted |= set(re.findall(r"`make ([a-z-]+)", text))
    assert set() == wanted - _make_targets()


def test_first_screen_shows_the_whole_story() -> None:
    """Rule: one sentence, install and serve, the diff, the laptop; each within the first sixty lines."""
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:60])
    for line in (
        "pip install 'shardbook[torch,cli,server]'",
        "shardbook-server serve",
        "+import shardbook.dcp as dcp",
        "+dcp.init(run=",
        "dcp.async_save(state, checkpoint_id=",
        '+dcp.load(state, "llm/8b-v3@latest")',
        "shardbook tensors",
    ):
        assert line in screen


def test_ci_runs_the_commands_of_the_readme() -> None:
    """Rule: CI calls the README's own test command, and `make check`."""
    script = (ROOT / ".ci" / "run").read_text()
    assert ["make", "test"] in list(_commands("README.md"))
    assert re.search(r"^make test\b", script, flags=re.MULTILINE)
    assert re.search(r"^make check\b", script, flags=re.MULTILINE)


def test_python_examples_fit_the_real_signatures() -> None:
    """Rule: every call of `dcp` in the README, in the diff too, binds to the function it names."""
    import shardbook.dcp as dcp  # torch: only here

    calls = [call for block in _blocks("README.md", "python") for call in _dcp_calls(block)]
    for block in _blocks("README.md", "diff"):
        kept = [line[1:].strip() for line in block.splitlines() if not line.startswith("-")]
        calls += [call for line in kept if line.startswith("dcp.") for call in _dcp_calls(line)]
    assert {"init", "async_save", "load"} <= {name for name, _ in calls}
    for name, call in calls:
        arguments = [None] * len(call.args)
        keywords = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(getattr(dcp, name)).bind(*arguments, **keywords)


def _dcp_calls(code: str) -> list[tuple[str, ast.Call]]:
    return [
        (node.func.attr, node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "dcp"
    ]


def test_generated_pages_are_what_the_code_says() -> None:
    """Rule: every setting, command, option and JSON key is documented, from the code itself."""
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ("", 0) == (done.stderr, done.returncode)


@pytest.mark.parametrize("program", ["shardbook", "shardbook-server"])
def test_every_command_shown_exists_with_its_options(program: str) -> None:
    """Rule: a command in a page parses: subcommand, options and number of arguments."""
    shown = [words[1:] for page in PAGES for words in _commands(page) if words[0] == program]
    assert shown
    for words in shown:
        _parse(program, words)


def _parse(program: str, words: list[str]) -> None:
    """Parses a command line as the program would, without running it; raises what click raises."""
    module = importlib.import_module("shardbook.cli.app" if program == "shardbook" else "shardbook_server.cli")
    command = typer.main.get_command(module.app)
    rest = list(words)
    parent = None
    while isinstance(command, typer.core.TyperGroup):
        context = command.make_context(program, rest, parent=parent)
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None, f"{program} has no command {name}"
        command, parent = found, context
    command.make_context(words[0], rest, parent=parent)
