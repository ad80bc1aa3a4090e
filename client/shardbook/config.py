"""What a client is told about its surroundings: server, mode, stores, patience. One frozen object.

Settings come from the environment, else from a TOML file (``SHARDBOOK_CLIENT_CONFIG``, by default
``$XDG_CONFIG_HOME/shardbook/config.toml``), else from the defaults; ``SETTINGS`` lists them all. The file::

    server = "shardbook.example:7070"
    [stores]
    lustre = "/lustre/checkpoints"
    s3-eu = "s3://team-checkpoints/eu"
"""

from __future__ import annotations

import logging
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from shardbook._address import ServerAddress
from shardbook.breaker import FIRST_S, LATER_S, CircuitBreaker
from shardbook.errors import InvalidArgumentError
from shardbook.stores import Stores

_LOG = logging.getLogger(__name__)

CONFIG_VARIABLE: Final = "SHARDBOOK_CLIENT_CONFIG"


#: What a host's readers may keep of what the service answered, bytes, unless told otherwise.
CACHE_BYTES: Final = 1 << 30
_MAX_SIZE_DIGITS: Final = 18


def _default_file(env: Mapping[str, str]) -> Path:
    return Path(env.get("XDG_CONFIG_HOME", "").strip() or "~/.config").expanduser() / "shardbook" / "config.toml"


class Mode(StrEnum):
    """How far a save depends on the service."""

    #: Ranks plan and register through the service; an outage degrades the save to OFFLINE's.
    ONLINE = "online"
    #: The service is never asked; records and manifest are left with the data for a later sync.
    OFFLINE = "offline"
    #: Shardbook stands aside: neither service nor records.
    DISABLED = "disabled"


class Checksum(StrEnum):
    """What saves keep to prove later that a data file is as it was written."""

    #: Nothing.
    NONE = "none"
    #: CRC32C of every item, 4 bytes each.
    CRC32C = "crc32c"


@dataclass(frozen=True)
class Setting:
    """One setting and where it comes from.

    Attributes:
        name: Attribute of ClientConfig, and key in the file.
        variable: Environment variable.
        default: Default as text, for people.
        about: What it does.
        parse: Reads it from text; raises ValueError.
    """

    name: str
    variable: str
    default: str
    about: str
    parse: Callable[[str], Any]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError("not a time above 0")
    return value


def _mode(text: str) -> Mode:
    try:
        return Mode(text.lower())
    except ValueError:
        raise ValueError(f"{text!r} is not one of {', '.join(Mode)}") from None


def _checksum(text: str) -> Checksum:
    try:
        return Checksum(text.lower())
    except ValueError:
        raise ValueError(f"{text!r} is not one of {', '.join(Checksum)}") from None


def _switch(text: str) -> bool:
    try:
        return {"on": True, "1": True, "true": True, "off": False, "0": False, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(f"{text!r} is neither on nor off") from None


def _size_bytes(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_SIZE_DIGITS):
        raise ValueError(f"{text!r} is not a number of bytes")
    return int(text)


def _stores(text: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError("not name=root,name=root")
    return {name.strip(): root.strip() for name, _, root in pairs}


#: Every setting of the client.
SETTINGS: Final[tuple[Setting, ...]] = (
    Setting(
        "server",
        "SHARDBOOK_SERVER",
        "",
        "Address of the service: `host:port`, or `host:port,host:port` for replicas, "
        "`unix:///path` for a relay. None means mode `offline`.",
        str,
    ),
    Setting(
        "mode",
        "SHARDBOOK_MODE",
        "online",
        "`online`: save through the service; `offline`: leave records with the data only; `disabled`: stand aside.",
        _mode,
    ),
    Setting("token", "SHARDBOOK_TOKEN", "", "Bearer token that is sent with every call.", str),
    Setting("timeout_s", "SHARDBOOK_TIMEOUT_S", "30", "Deadline of calls that do not wait, seconds.", _seconds),
    Setting(
        "plan_wait_s",
        "SHARDBOOK_PLAN_WAIT_S",
        "120",
        "How long a rank waits for the other ranks' plans before it writes its whole plan, seconds.",
        _seconds,
    ),
    Setting(
        "outage_first_s",
        "SHARDBOOK_OUTAGE_FIRST_S",
        f"{FIRST_S:g}",
        "What an outage of the service may cost the first save that meets it, seconds.",
        _seconds,
    ),
    Setting(
        "outage_later_s",
        "SHARDBOOK_OUTAGE_LATER_S",
        f"{LATER_S:g}",
        "What the same outage may cost every later save, seconds.",
        _seconds,
    ),
    Setting(
        "checksum",
        "SHARDBOOK_CHECKSUM",
        "none",
        "`crc32c`: saves keep a checksum of every item, 4 bytes each and save, computed while it is written; `none`.",
        _checksum,
    ),
    Setting(
        "cache",
        "SHARDBOOK_CACHE",
        "on",
        "`off` (or `0`): readers keep nothing of what the service answers about committed checkpoints.",
        _switch,
    ),
    Setting(
        "cache_bytes",
        "SHARDBOOK_CACHE_BYTES",
        f"{CACHE_BYTES}",
        "Most that is kept of it on a host, bytes; 0 is `off`.",
        _size_bytes,
    ),
    Setting(
        "cache_dir",
        "SHARDBOOK_CACHE_DIR",
        "",
        "Where it is kept, in a folder of each user's own. When empty: `$XDG_CACHE_HOME`, usually `~/.cache`; the "
        "machine's temporary directory where that lies on a network file system.",
        str,
    ),
    Setting(
        "git_commit",
        "SHARDBOOK_GIT_COMMIT",
        "",
        "Commit of the training code, kept with every checkpoint that is saved.",
        str,
    ),
    Setting(
        "stores",
        "SHARDBOOK_STORES",
        "",
        "Names of storage roots, `lustre=/lustre/ckpt,s3-eu=s3://bucket/eu`; a table `[stores]` in the file.",
        _stores,
    ),
)


@dataclass(frozen=True)
class ClientConfig:
    """Settings of a client. Immutable, picklable, thread-safe.

    Attributes:
        server: Address of the service; None when there is none.
        mode: How far saves depend on it; OFFLINE whenever there is no server, unless DISABLED.
        token: Bearer token.
        timeout_s: Deadline of calls that do not wait, seconds.
        plan_wait_s: How long a rank waits for the others' plans, seconds.
        outage_first_s: What an outage may cost the first save, seconds.
        outage_later_s: What it may cost every later save, seconds.
        checksum: What saves keep of every item's bytes, unless they say.
        cache: Whether readers keep what the service answers.
        cache_bytes: Most that they keep, bytes; 0 for nothing.
        cache_dir: Where; empty for the user's cache directory, or the machine's temporary one where that is shared.
        git_commit: Commit of the training code; empty when it is not known.
        stores: Named storage roots.

    Raises:
        InvalidArgumentError: A value is out of range; the error names the setting.
    """

    server: str | None = None
    mode: Mode = Mode.ONLINE
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 30.0
    plan_wait_s: float = 120.0
    outage_first_s: float = FIRST_S
    outage_later_s: float = LATER_S
    checksum: Checksum = Checksum.NONE
    cache: bool = True
    cache_bytes: int = CACHE_BYTES
    cache_dir: str = ""
    git_commit: str = ""
    stores: Stores = field(default_factory=Stores)

    def __post_init__(self) -> None:
        if self.server is not None:
            ServerAddress.parse(self.server)
        elif self.mode is Mode.ONLINE:
            object.__setattr__(self, "mode", Mode.OFFLINE)
        for name in ("timeout_s", "plan_wait_s", "outage_first_s", "outage_later_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidArgumentError(f"{name} is {value}, not a time above 0", field=name)
        if self.cache_bytes < 0:
            raise InvalidArgumentError(f"cache_bytes is {self.cache_bytes}, not a size", field="cache_bytes")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> ClientConfig:
        """Returns the settings of this process.

        An unset and an empty variable are the same.

        Args:
            environ: Environment to read; the process's own when None.

        Raises:
            InvalidArgumentError: A setting, or the file, does not parse; the error names it.
        """
        env = os.environ if environ is None else environ
        values = _from_file(env)
        for setting in SETTINGS:
            text = env.get(setting.variable, "").strip()
            if text:
                values[setting.name] = _parsed(setting, text, setting.variable)
        values["stores"] = Stores(MappingProxyType(values.get("stores", {})))
        return cls(**values)

    def breaker(self) -> CircuitBreaker:
        """Returns a new circuit breaker with these settings' numbers; make one per process."""
        return CircuitBreaker(first_s=self.outage_first_s, later_s=self.outage_later_s)

    def location_of(self, path: str | os.PathLike[str]) -> str:
        """Returns what the catalogue records for a checkpoint directory, see ``Stores.location_of``."""
        return self.stores.location_of(path)


def _from_file(env: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings in the TOML file; none when the default file does not exist."""
    named = env.get(CONFIG_VARIABLE, "").strip()
    path = Path(named).expanduser() if named else _default_file(env)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if named:
            raise _bad(CONFIG_VARIABLE, f"{path} does not exist") from None
        return {}
    except OSError as error:
        # An unreadable home directory is no reason to lose a save.
        if named:
            raise _bad(CONFIG_VARIABLE, f"{path} cannot be read: {error.strerror}") from error
        _LOG.warning("%s cannot be read and is ignored: %s", path, error.strerror)
        return {}
    try:
        table = tomllib.loads(content.decode())
    except ValueError as error:
        raise _bad(CONFIG_VARIABLE, f"{path} is not TOML: {error}") from error
    return _from_table(table, path)


def _from_table(table: dict[str, Any], path: Path) -> dict[str, Any]:
    known = {setting.name: setting for setting in SETTINGS}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise _bad(key, f"{path} has an unknown setting {key!r}; known are {', '.join(known)}")
        if key == "stores":
            if not isinstance(value, dict) or not all(isinstance(root, str) for root in value.values()):
                raise _bad(key, f"[stores] in {path} is not a table of names and roots")
            values[key] = value
        else:
            values[key] = _parsed(known[key], str(value), f"{key} in {path}")
    return values


def _parsed(setting: Setting, text: str, source: str) -> Any:
    try:
        return setting.parse(text)
    except ValueError as error:
        raise _bad(setting.name, f"{source} does not parse: {error}") from error


def _bad(name: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="INVALID_SETTING", field=name)
