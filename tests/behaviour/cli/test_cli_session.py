"""The session of examples/catalogue.py holds, on a small catalogue, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from subprocess import CompletedProcess

import pytest
from examples.catalogue import Known, Session, tell

from benchmarks.catalogue_rows import catalogue
from benchmarks.catalogue_whole import fill, give_structures
from shardbook_server.app import running_server
from shardbook_server.settings import Settings
from tests.behaviour.cli.conftest import Shardbook
from tests.databases import Databases, opened


@pytest.mark.soak_with("postgres")
def test_every_command_of_the_session_does_what_it_should(
    databases: Databases, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rule: the session ends well, and shows each command, what it printed and its time."""
    url, saves = databases.new(), catalogue(4, 60)
    shown = []

    def run(words: Sequence[str]) -> CompletedProcess[str]:
        # What the session itself prints is no part of the command's output.
        shown.append(capsys.readouterr().out)
        ran = shardbook(*words)
        return CompletedProcess(words, ran.code, ran.out, ran.err)

    with opened(url) as database:
        fill(database, saves)
        with running_server(Settings(listen="127.0.0.1:0", http_listen="", database_url=url, drain_s=5)) as server:
            monkeypatch.setenv("SHARDBOOK_SERVER", server.address)
            runs = give_structures(database, server.address, saves)
            session = Session(run)
            tell(session, Known(saves, runs["llm"], server.address))
    text = "".join(shown)
    assert session.command_count == text.count("\n$ shardbook ")
    assert session.command_count - 1 <= text.count(" s, exit ")


@pytest.mark.parametrize(
    ("told", "arguments"),
    [
        (CompletedProcess([], 1, "", ""), {}),
        (CompletedProcess([], 0, "other\n", ""), {"says": "this"}),
        (CompletedProcess([], 0, "REF\na\n", ""), {"rows": 2}),
    ],
)
def test_a_command_that_does_something_else_ends_the_session(
    told: CompletedProcess[str], arguments: dict[str, object]
) -> None:
    """Rule: another exit code, other words, other rows."""
    with pytest.raises(SystemExit, match="FAILED"):
        Session(lambda _: told).type("ls", **arguments)  # type: ignore[arg-type]
