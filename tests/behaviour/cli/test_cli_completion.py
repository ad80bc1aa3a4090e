"""What the shell completes: projects, runs and refs of the server, and nothing at all when it is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from shardbook.cli import completing
from shardbook.client import Client
from shardbook.errors import NotFoundError
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.saves import save

RUN = "complete/8b-v3"
PATIENCE_S = completing._PATIENCE_S
Complete = Callable[..., list[str]]


@pytest.fixture
def catalogue(client: Client, tmp_path: Path) -> Client:
    """Two runs of one project; one has an alias of its own."""
    with suppress(NotFoundError):
        client.get_checkpoint(f"{RUN}@good")
        return client  # the server is the module's
    for step in (1000, 1500):
        save(client, tmp_path / str(step), step, run=RUN, incarnation=b"c" * 16)
    save(client, tmp_path / "other", 7, run="complete/other", incarnation=b"d" * 16)
    client.set_alias(f"{RUN}@good", f"{RUN}@1000")
    save(client, tmp_path / "gone", 900, run=RUN, incarnation=b"c" * 16)
    client.delete_checkpoint(f"{RUN}@900", force=True)
    return client


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no server that is away."""
    monkeypatch.setattr(completing, "_PATIENCE_S", 20.0)


@pytest.fixture
def complete(shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """What bash is offered for words as it takes them apart; the last one is being written."""

    def run(*words: str) -> list[str]:
        monkeypatch.setenv("_SHARDBOOK_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["shardbook", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        ran = shardbook()
        assert "" == ran.err
        return ran.out.split()

    return run


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("runs", "comp"), ["complete"]),
        (("ls", "complete/"), [RUN, "complete/other"]),
        (("status", "complete/8"), [RUN]),
        (("show", "complete/8"), [f"{RUN}@latest"]),
        (("show", RUN, "@"), ["@latest", "@good", "@1500", "@1000"]),
        (("show", RUN, "@", "1"), ["1500", "1000"]),
        (("show", RUN, ":", "default", "@", "15"), ["1500"]),
        (("diff", RUN, "@", "1000", RUN, "@", "g"), ["good"]),
        (("undelete", RUN, "@"), ["@900.s1.a1"]),
        (("undelete", RUN, "@", "9"), ["900.s1.a1"]),
        (("undelete", "complete/8"), [f"{RUN}@900.s1.a1"]),
        (("undelete", "complete/o"), []),
        (("alias", "production", "complete/o"), ["complete/other"]),
        (("import", "/ckpt", "--run", "complete/o"), ["complete/other"]),
        (("show", "absent/"), []),
        (("show", "absent/run", "@"), []),
        (("verify", "/ckpt"), []),
    ],
)
def test_names_come_from_the_server(
    catalogue: Client, complete: Complete, words: tuple[str, ...], offered: list[str]
) -> None:
    """Rule: what begins like the word; bash gets what stands after the `@` or `:` that it stops at."""
    assert sorted(offered) == sorted(complete(*words))


def test_a_server_that_is_away_completes_to_nothing_soon(complete: Complete, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: silently; the line being written is not disturbed. Commands and options need no server."""
    monkeypatch.setattr(completing, "_PATIENCE_S", PATIENCE_S)
    monkeypatch.setenv("SHARDBOOK_SERVER", "127.0.0.1:9")
    began_s = time.monotonic()
    assert [] == complete("show", "llm/")
    assert time.monotonic() - began_s < 10
    monkeypatch.delenv("SHARDBOOK_SERVER")
    assert [] == complete("show", "llm/")
    assert ["--ranks"] == complete("show", "--ra")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: what --install-completion installs can be shown."""
    monkeypatch.setenv("_SHARDBOOK_COMPLETE", f"source_{shell}")
    ran = shardbook()
    assert (0, True) == (ran.code, f"complete_{shell}" in ran.out)
    assert "SHARDBOOK_COMPLETE" in ran.out
