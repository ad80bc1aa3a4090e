"""Settings of the client: where each comes from, and what happens to those that do not parse."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from shardbook.config import SETTINGS, Checksum, ClientConfig, Mode, Setting
from shardbook.errors import InvalidArgumentError
from shardbook.stores import Stores

#: A value for each setting: as text, and as parsed.
SAMPLES: dict[str, tuple[str, object]] = {
    "server": ("a.example:7420,b.example:7420", "a.example:7420,b.example:7420"),
    "mode": ("Disabled", Mode.DISABLED),
    "token": ("t0ken", "t0ken"),
    "timeout_s": ("4.5", 4.5),
    "plan_wait_s": ("60", 60.0),
    "checksum": ("crc32c", Checksum.CRC32C),
    "cache": ("off", False),
    "cache_bytes": ("4096", 4096),
    "cache_dir": ("/local/cache", "/local/cache"),
    "git_commit": ("abc123", "abc123"),
    "outage_first_s": ("3", 3.0),
    "outage_later_s": ("0.5", 0.5),
    "stores": (
        "lustre=/lustre/ckpt, s3-eu=s3://bucket/eu",
        Stores({"lustre": "/lustre/ckpt", "s3-eu": "s3://bucket/eu"}),
    ),
}


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """An environment without a configuration file."""
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def test_every_field_is_a_documented_setting() -> None:
    """No attribute without variable, default and description, and no setting without attribute."""
    fields = [field.name for field in dataclasses.fields(ClientConfig)]
    assert fields == [setting.name for setting in SETTINGS]
    assert all(setting.variable == f"SHARDBOOK_{setting.name.upper()}" for setting in SETTINGS)
    assert all(setting.about.endswith(".") for setting in SETTINGS)
    assert all(f"\n        {name}: " in (ClientConfig.__doc__ or "") for name in fields)


def test_documented_defaults_are_the_defaults(nowhere: dict[str, str]) -> None:
    """What the table says is what an empty environment gives; without a server the mode is offline."""
    config = ClientConfig.from_env({**nowhere, "SHARDBOOK_SERVER": "a:1"})
    for setting in SETTINGS:
        if setting.default:
            assert setting.parse(setting.default) == getattr(config, setting.name)
    assert ClientConfig(mode=Mode.OFFLINE) == ClientConfig.from_env(nowhere)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_setting_from_the_environment(setting: Setting, nowhere: dict[str, str]) -> None:
    """Each variable sets its attribute."""
    text, value = SAMPLES[setting.name]
    config = ClientConfig.from_env({**nowhere, "SHARDBOOK_SERVER": "s:1", setting.variable: text})
    assert value == getattr(config, setting.name)


def test_file_is_read_and_the_environment_wins(tmp_path: Path) -> None:
    """TOML below the environment, above the defaults; stores are a table there."""
    path = tmp_path / "shardbook" / "config.toml"
    path.parent.mkdir()
    path.write_text('server = "file:1"\nplan_wait_s = 7\ntimeout_s = 8.5\n[stores]\nlustre = "/lustre/"\n')
    config = ClientConfig.from_env({"XDG_CONFIG_HOME": str(tmp_path), "SHARDBOOK_PLAN_WAIT_S": "9"})
    assert ("file:1", 9.0, 8.5, {"lustre": "/lustre"}) == (
        config.server,
        config.plan_wait_s,
        config.timeout_s,
        dict(config.stores.roots),
    )


@pytest.mark.parametrize(
    ("variables", "field"),
    [
        ({"SHARDBOOK_MODE": "sometimes"}, "mode"),
        ({"SHARDBOOK_PLAN_WAIT_S": "soon"}, "plan_wait_s"),
        ({"SHARDBOOK_PLAN_WAIT_S": "-1"}, "plan_wait_s"),
        ({"SHARDBOOK_TIMEOUT_S": "nan"}, "timeout_s"),
        ({"SHARDBOOK_TIMEOUT_S": "inf"}, "timeout_s"),
        ({"SHARDBOOK_STORES": "lustre"}, "stores"),
        ({"SHARDBOOK_STORES": "Lustre=/x"}, "stores"),
        ({"SHARDBOOK_SERVER": "https://host:1"}, "server"),
        ({"SHARDBOOK_CLIENT_CONFIG": "/nowhere/config.toml"}, "SHARDBOOK_CLIENT_CONFIG"),
    ],
)
def test_bad_setting_names_itself(variables: dict[str, str], field: str, nowhere: dict[str, str]) -> None:
    """A value that does not parse is an error that names the setting, at the start and not in mid-save."""
    with pytest.raises(InvalidArgumentError) as caught:
        ClientConfig.from_env({**nowhere, **variables})
    assert field == caught.value.violations[0].field


@pytest.mark.parametrize(
    ("content", "match"), [("server = ", "not TOML"), ("sever = 1", "unknown setting 'sever'"), ("stores = 1", "table")]
)
def test_bad_file_is_refused(content: str, match: str, tmp_path: Path) -> None:
    """A file that does not parse, or has a misspelt key, is not quietly ignored."""
    path = tmp_path / "config.toml"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=match):
        ClientConfig.from_env({"SHARDBOOK_CLIENT_CONFIG": str(path)})


def test_no_server_means_offline(nowhere: dict[str, str]) -> None:
    """Nothing configured is a way to work; ``init`` says what it means."""
    assert Mode.OFFLINE is ClientConfig.from_env(nowhere).mode


def test_disabled_stays_disabled_without_a_server(nowhere: dict[str, str]) -> None:
    """Without a server only online turns into offline."""
    assert Mode.DISABLED is ClientConfig.from_env({**nowhere, "SHARDBOOK_MODE": "disabled"}).mode


def test_token_is_not_shown(nowhere: dict[str, str]) -> None:
    """A logged configuration holds no secret."""
    config = ClientConfig.from_env({**nowhere, "SHARDBOOK_SERVER": "s:1", "SHARDBOOK_TOKEN": "s3cret"})
    assert "s3cret" not in repr(config)


def test_config_is_picklable(nowhere: dict[str, str]) -> None:
    """Configuration travels to the child that saves in the background."""
    config = ClientConfig.from_env({**nowhere, "SHARDBOOK_STORES": "a=/a"})
    assert config == pickle.loads(pickle.dumps(config))


def test_breaker_has_the_configured_numbers() -> None:
    """The outage settings reach the circuit breaker."""
    breaker = ClientConfig(server="s:1", outage_first_s=3, outage_later_s=0.5).breaker()
    assert (3, 0.5) == (breaker.first_s, breaker.later_s)
