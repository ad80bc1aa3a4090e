"""`shardbook-server db`, as an operator and a migrate job use it, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from shardbook_server import cli
from shardbook_server.service.services import build_services
from shardbook_server.storage import migrate, postgres
from shardbook_server.storage.urls import shown_url
from tests.behaviour.service.saves import Job, Model, whole
from tests.conftest import MakeDatabases
from tests.databases import Databases, opened
from tests.storage.releases import NEXT, THIS, become_next_release, write_next_release
from tests.storage.schemas import set_version

URL, MIGRATION_URL = "SHARDBOOK_DATABASE_URL", "SHARDBOOK_MIGRATION_URL"


def _db(*arguments: str, **environment: str) -> Result:
    """Runs a `db` command in this process."""
    return CliRunner().invoke(cli.app, ["db", *arguments], env=environment)


def _done(*arguments: str, **environment: str) -> str:
    """Runs a command that succeeds; returns what it prints."""
    result = _db(*arguments, **environment)
    assert (0, "") == (result.exit_code, result.stderr)
    return result.stdout.rstrip("\n")


def _refused(*arguments: str, **environment: str) -> str:
    """Runs a command that is refused; returns the one line that says why."""
    result = _db(*arguments, **environment)
    assert (1, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith("error: ")
    assert 1 == len(result.stderr.splitlines())
    return result.stderr


def _shown(url: str) -> str:
    return url.removeprefix("sqlite:///") if url.startswith("sqlite") else shown_url(url)


def test_a_database_s_life(databases: Databases) -> None:
    """Rule: up, looked at, down and up again, each with one line that says where and at which revision."""
    url = databases.bare()
    variables = {URL: url}
    assert f"{_shown(url)}: schema is at {migrate.HEAD}" == _done("upgrade", **variables)
    assert f"{_shown(url)}: schema is at {migrate.HEAD}, which this release serves" == _done("check", **variables)
    assert f"{_shown(url)}: schema is at base" == _done("downgrade", "base", "--yes", **variables)
    assert "base" == _done("current", **variables)
    assert "shardbook-server db upgrade" in _refused("check", **variables)
    assert f"{_shown(url)}: schema is at {migrate.HEAD}" == _done("upgrade", **variables)
    assert migrate.HEAD == _done("current", **variables)


def test_the_history_needs_no_database() -> None:
    """Rule: every revision of this release with what it does, oldest first."""
    lines = _done("history", **{URL: "nonsense"}).splitlines()
    assert "0001  The first schema." == lines[0]
    assert lines[-1].startswith(migrate.HEAD)


def test_going_back_drops_data_and_asks_to_be_told_so(databases: Databases) -> None:
    """Rule: nothing is dropped without --yes, and only known revisions are gone back to."""
    url = databases.new()
    assert "--yes" in _refused("downgrade", "base", "--database-url", url)
    assert "shardbook-server db history" in _refused("downgrade", "0", "--yes", "--database-url", url)
    assert migrate.HEAD == _done("current", "--database-url", url)
    assert 2 == _db("downgrade", "--yes", "--database-url", url).exit_code


def test_a_schema_of_a_newer_release_is_left_alone(databases: Databases) -> None:
    """Rule: an old release neither upgrades nor downgrades what it does not know; it may serve it when allowed."""
    url = databases.new()
    set_version(url, "9999", oldest=migrate.HEAD)
    for command in (["upgrade"], ["downgrade", "base", "--yes"]):
        assert "pip install --upgrade shardbook" in _refused(*command, "--database-url", url)
    assert "schema is at 9999" in _done("check", "--database-url", url)


def test_migrations_have_a_url_of_their_own(databases: Databases, tmp_path: Path) -> None:
    """Rule: --database-url, else SHARDBOOK_MIGRATION_URL, else SHARDBOOK_DATABASE_URL; from a file just as well."""
    flag, own, server = (databases.bare() for _ in range(3))
    variables = {URL: server, MIGRATION_URL: own}
    _done("upgrade", "--database-url", flag, **variables)
    assert migrate.HEAD == migrate.current(flag)
    assert _shown(own) in _done("upgrade", **variables)
    assert [migrate.HEAD] * 2 == [_done("current", **variables), migrate.current(own)]
    assert _shown(own) in _done("check", **variables)
    assert "base" == _done("downgrade", "base", "--yes", **variables).split()[-1]
    file = tmp_path / "server.toml"
    file.write_text(f'database_url = "{own}"\nmigration_url = "{server}"\n')
    assert _shown(server) in _done("upgrade", "--config", str(file))
    assert "base" == migrate.current(own)


def test_an_upgrade_beside_busy_servers_says_so_and_ends_when_run_again(
    make_databases: MakeDatabases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: DDL waits some seconds for what servers hold, then gives way to them; nothing is half done."""
    url = make_databases("postgres").new()
    become_next_release(monkeypatch, write_next_release(tmp_path))
    monkeypatch.setattr(postgres, "_SCHEMA_LOCK_S", 0.2)
    with opened(url) as database, database.write() as connection:
        connection.execute(text("LOCK TABLE checkpoints IN ROW EXCLUSIVE MODE"))
        said = _refused("upgrade", "--database-url", url)
        assert "others held what is to be changed for too long, so nothing was changed; try again" in said
    assert THIS == _done("current", "--database-url", url)
    assert f"schema is at {NEXT}" in _done("upgrade", "--database-url", url)


def test_garbage_is_counted_and_dropped(databases: Databases) -> None:
    """Rule: a line a kind with count and bytes, and the total; a dry run drops nothing."""
    url = databases.new()
    with opened(url) as database:
        job = Job(build_services(database, lease_ttl_s=60), Model(2))
        job.start()
        job.save(1)
        job.model = Model(2, sharded=4)
        job.register(2, whole(job.model))
        job.services.commits.abort(job.key(2), "enough")
    young = _done("gc", "--database-url", url).splitlines()
    assert {"0"} == {line.split()[-3] for line in young}
    said = [_done("gc", "--older-than", "0", *dry, "--database-url", url) for dry in (["--dry-run"], [])]
    assert said[0].replace("would be dropped", "dropped         ") == said[1]
    counts = {" ".join(line.split()[:-3]): int(line.split()[-3]) for line in said[1].splitlines()}
    assert {"rank structures": 2, "rank plans": 2, "rank tables": 1, "dropped": 5} == {
        kind: count for kind, count in counts.items() if count
    }
    assert "dropped" == _done("gc", "--older-than", "0", "--database-url", url).splitlines()[-1].split()[0]


def test_garbage_of_another_release_s_schema_is_left_alone(databases: Databases) -> None:
    """Rule: what that release refers to is not known here."""
    url = databases.new()
    set_version(url, "9999", oldest="9999")
    assert "pip install --upgrade shardbook" in _refused("gc", "--database-url", url)
    assert 2 == _db("gc", "--older-than", "-1", "--database-url", url).exit_code


@pytest.mark.parametrize("command", [["upgrade"], ["gc"], ["current"], ["check"], ["downgrade", "base", "--yes"]])
def test_a_database_that_is_away_is_one_line_without_the_password(command: list[str]) -> None:
    """Rule: what an operator pastes into a ticket gives nothing away."""
    said = _refused(*command, "--database-url", "postgresql://ada:hunter2@127.0.0.1:1/shardbook")
    assert "cannot be reached" in said
    assert "hunter2" not in said
