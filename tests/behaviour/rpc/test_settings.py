"""Settings: where they come from, which one wins, and what a wrong one is told."""

from __future__ import annotations

import re
from pathlib import Path

import pydantic
import pytest

from shardbook.errors import InvalidArgumentError
from shardbook_server.print_config import as_toml
from shardbook_server.settings import Settings, default_data_dir, load_settings, load_with_sources


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    """Rule: flags > SHARDBOOK_* > TOML > defaults; a flag that was not given says nothing."""
    file = tmp_path / "server.toml"
    file.write_text('listen = "127.0.0.1:1"\nworker_threads = 3\ndrain_s = 4\n')
    environment = {"SHARDBOOK_LISTEN": "127.0.0.1:2", "SHARDBOOK_WORKER_THREADS": "5", "SHARDBOOK_CONFIG": str(file)}
    settings = load_settings({"listen": "127.0.0.1:3", "drain_s": None}, environment=environment)
    assert ("127.0.0.1:3", 5, 4.0) == (settings.listen, settings.worker_threads, settings.drain_s)
    assert Settings().poll_interval_s == settings.poll_interval_s


def test_the_client_s_variables_and_empty_ones_are_not_settings() -> None:
    """Rule: one environment serves client and server; an empty variable is an unset one."""
    environment = {"SHARDBOOK_SERVER": "x:1", "SHARDBOOK_MODE": "offline", "SHARDBOOK_LISTEN": ""}
    assert Settings() == load_settings(environment=environment)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("worker_threads = 0", "worker_threads"),
        ("poll_interval_s = nan", "poll_interval_s"),
        ('log_level = "loud"', "log_level"),
        ('listen = "nowhere"', "listen"),
        ('listen = "host:99999"', "listen"),
        ('http_listen = "nowhere"', "http_listen"),
        ('http_listen = "unix:/tmp/x"', "http_listen"),
        ('access_log = "some"', "access_log"),
        ("no_such_setting = 1", "no_such_setting"),
        ("not toml", "config"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, field: str) -> None:
    """Rule: a setting that is not valid, or none at all, is refused by name."""
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError) as refused:
        load_settings(config=file, environment={})
    assert [field] == [violation.field for violation in refused.value.violations]
    assert field in refused.value.message or str(file) in refused.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Rule: a settings file that was asked for is never skipped."""
    with pytest.raises(InvalidArgumentError):
        load_settings(config=tmp_path / "absent.toml", environment={})


def test_secrets_are_not_repeated() -> None:
    """Rule: the value that was refused may be a password: it is not in the message."""
    with pytest.raises(InvalidArgumentError) as refused:
        load_settings(environment={"SHARDBOOK_LOG_LEVEL": "hunter2"})
    assert "hunter2" not in str(refused.value)


def test_what_is_in_effect_can_be_printed_and_read_again(tmp_path: Path) -> None:
    """Rule: `--print-config` is TOML of every setting with its source, and means the same when it is read."""
    file = tmp_path / "server.toml"
    file.write_text('access_log = "all"\nworker_threads = 3\nhttp_listen = ""\n')
    environment = {"SHARDBOOK_WORKER_THREADS": "5", "SHARDBOOK_CONFIG": str(file)}
    loaded = load_with_sources({"listen": "127.0.0.1:3"}, environment=environment)
    text = as_toml(loaded)
    lines = text.splitlines()
    assert 'listen = "127.0.0.1:3"  # flag' in lines
    assert "worker_threads = 5  # SHARDBOOK_WORKER_THREADS" in lines
    assert f'access_log = "all"  # {file}' in lines
    assert "drain_s = 10.0  # default" in lines
    assert "# migration_url is not set" in lines
    assert len(Settings.model_fields) == len(lines)
    printed = tmp_path / "printed.toml"
    printed.write_text(text)
    assert loaded.settings == load_settings(config=printed, environment={})


def test_what_is_printed_has_no_password() -> None:
    """Rule: URLs of databases are shown without user, password and other secrets."""
    url = "postgresql://ada:hunter2@db/shardbook?sslpassword=hunter3&sslmode=require"
    text = as_toml(load_with_sources({"database_url": url, "migration_url": url}, environment={}))
    shown = '"postgresql://db/shardbook?sslmode=require"'
    assert f"database_url = {shown}  # flag" in text
    assert f"migration_url = {shown}  # flag" in text
    assert not re.search("hunter|ada", text)


def test_settings_do_not_change() -> None:
    """Rule: one frozen object."""
    with pytest.raises(pydantic.ValidationError):
        Settings().listen = "elsewhere:1"


def test_every_setting_is_described_and_names_its_unit() -> None:
    """Rule: each setting says what it is for; numbers carry their unit or what they count."""
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            assert re.search(r"_(s|bytes|count|threads|limit|rpcs)$", name), name


def test_the_default_database_lies_in_one_predictable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: $XDG_DATA_HOME/shardbook, else ~/.local/share/shardbook; a relative XDG path does not count."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert tmp_path / "shardbook" == default_data_dir()
    assert Settings().embedded
    assert f"sqlite:///{tmp_path}/shardbook/shardbook.db" == Settings().database_url
    assert not Settings(database_url=f"sqlite:///{tmp_path}/other.db").embedded
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert tmp_path / ".local" / "share" / "shardbook" == default_data_dir()
