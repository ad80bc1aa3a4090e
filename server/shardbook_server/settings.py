"""Everything an operator can set, in one frozen object.

Sources, first that says something wins: flags of the command line, ``SHARDBOOK_*`` in the environment, the TOML
file named by ``--config`` or ``SHARDBOOK_CONFIG``, the defaults here. The environment variable of a setting is
its name in capitals: ``listen`` is ``SHARDBOOK_LISTEN``.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from shardbook.errors import FieldViolation, InvalidArgumentError

#: Environment variable that names the TOML file.
CONFIG_VARIABLE: Final = "SHARDBOOK_CONFIG"
ENVIRONMENT_PREFIX: Final = "SHARDBOOK_"
#: Source of what the command line says.
FLAG: Final = "flag"
DEFAULT_LISTEN: Final = "127.0.0.1:7070"
DEFAULT_HTTP_LISTEN: Final = "127.0.0.1:7071"
#: Says that HTTP is off where an empty text says that nothing was set, as in the environment.
OFF: Final = "off"

_Count = Annotated[int, Field(ge=1, le=1 << 31)]
_Threads = Annotated[int, Field(ge=1, le=1024)]
_Bytes = Annotated[int, Field(ge=1 << 10, le=1 << 31)]
_Seconds = Annotated[float, Field(gt=0, le=365 * 86400, allow_inf_nan=False)]


#: What is wrong with a value, by how pydantic's kind of error begins.
_KINDS: Final = {
    "int_": "is not a whole number",
    "float_": "is not a number",
    "finite_number": "is not a finite number",
    "bool_": "is not true or false",
    "string_": "is not a text",
    "greater_than_equal": "is below {ge}",
    "greater_than": "is not above {gt}",
    "less_than_equal": "is above {le}",
}


def default_data_dir() -> Path:
    """Returns the one place for the embedded database: below ``$XDG_DATA_HOME``, else ``~/.local/share``."""
    base = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "share"
    return root / "shardbook"


def default_database_url() -> str:
    """Returns the URL of the embedded database."""
    return f"sqlite:///{default_data_dir() / 'shardbook.db'}"


class Settings(BaseModel):
    """Settings of one server process.

    Each field is documented where it stands; ``load_settings`` reads all sources.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    listen: str = Field(
        default=DEFAULT_LISTEN,
        description="Address to serve gRPC on: host:port (port 0 takes a free one), [ipv6]:port or unix:/path. "
        "The default is reachable from this machine only.",
    )
    http_listen: str = Field(
        default=DEFAULT_HTTP_LISTEN,
        description="Address to serve HTTP on, for /healthz, /readyz and /metrics: host:port (port 0 takes a free one) "
        "or [ipv6]:port; `off`, or empty, for none.",
    )
    database_url: str = Field(
        default_factory=default_database_url,
        description="Where the data is: sqlite:////absolute/path, or postgresql://user@host:5432/name (several hosts, "
        "host1,host2, for a cluster whose primary moves). The default is the embedded "
        "database, $XDG_DATA_HOME/shardbook/shardbook.db (~/.local/share/shardbook/shardbook.db).",
    )
    migration_url: str | None = Field(
        default=None,
        description="Where `shardbook-server db` changes the schema, when that is not database_url: a Postgres behind "
        "pgbouncer is migrated over a direct connection.",
    )
    postgres_synchronous_commit: Literal["on", "remote_apply", "remote_write", "local"] = Field(
        default="on",
        description="When Postgres acknowledges a commit: on, remote_apply, remote_write or local. With on, a commit "
        "survives a crash of the server, and a failover to a synchronous standby.",
    )
    postgres_statement_timeout_s: _Seconds = Field(
        default=30.0,
        description="Longest time of one statement in Postgres; a call's deadline shortens it. It never ends a COMMIT.",
    )
    postgres_prepared_statements: bool = Field(
        default=True,
        description="Let the driver prepare statements in Postgres. Off for poolers that cannot keep them, such as "
        "pgbouncer before 1.21 in transaction mode.",
    )
    worker_threads: _Threads = Field(default=4, description="Threads that run short service calls.")
    heavy_threads: _Threads = Field(
        default=2,
        description="Threads that commit, assemble and decide plans, which can take seconds. A database connection "
        "is kept for each of these and of the worker threads, and two more for looks of the server's own.",
    )
    max_message_bytes: _Bytes = Field(
        default=16 << 20, description="Largest request; a larger one is RESOURCE_EXHAUSTED."
    )
    max_concurrent_rpcs: _Count = Field(
        default=40_000,
        description="Calls in progress, waiting ones included, before further ones are RESOURCE_EXHAUSTED; "
        "a guard for memory, above waiter_limit and call_queue_limit.",
    )
    call_queue_limit: _Count = Field(
        default=2_048,
        description="Calls that may queue for a worker thread before further ones are RESOURCE_EXHAUSTED.",
    )
    waiter_limit: _Count = Field(
        default=32_768,
        description="Calls that may wait for a checkpoint or a lease; a limit apart from the other calls.",
    )
    poll_interval_s: _Seconds = Field(
        default=0.1,
        description="Time between looks at the checkpoints that calls of this process wait for, and at new events.",
    )
    watcher_limit: _Count = Field(
        default=4_096,
        description="Streams of events, and calls that wait for a checkpoint to work on; a limit apart from the other "
        "calls.",
    )
    watch_heartbeat_s: _Seconds = Field(
        default=10.0, description="A stream of events on which nothing happens gives a sign of life this often."
    )
    event_retention_s: _Seconds = Field(
        default=2_592_000.0,
        description="Events older than this are dropped; a watcher that was away for longer has to begin anew.",
    )
    batch_max_count: _Count = Field(default=512, description="Most plans or registrations in one transaction.")
    batch_max_bytes: _Bytes = Field(
        default=32 << 20, description="Most bytes of plans or registrations in one transaction."
    )
    batch_queue_count: _Count = Field(
        default=32_768, description="Plans or registrations that may queue before further ones are RESOURCE_EXHAUSTED."
    )
    batch_queue_bytes: _Bytes = Field(
        default=128 << 20, description="Bytes of plans or registrations that may queue, with the same answer beyond."
    )
    lease_ttl_s: _Seconds = Field(
        default=60.0, description="A session without a sign of life for this long counts as gone."
    )
    reap_interval_s: _Seconds = Field(default=10.0, description="Time between looks for leases that have ended.")
    undelete_s: _Seconds = Field(
        default=604_800.0,
        description="How long a deleted checkpoint can be brought back, before `db gc` may drop what is known of it.",
    )
    drain_s: _Seconds = Field(
        default=10.0, description="On SIGTERM, how long calls in progress may take to finish before they are cut."
    )
    reflection: bool = Field(default=False, description="Serve gRPC reflection, for grpcurl and similar tools.")
    compression: bool = Field(
        default=False,
        description="Accept gzip and deflate messages. Off by default: payloads are compressed already, and gRPC "
        "inflates a message before its size is checked.",
    )
    keepalive_permit_s: _Seconds = Field(default=30.0, description="Clients may ping as often as this.")
    max_connection_age_s: _Seconds = Field(
        default=3600.0,
        description="A connection is asked to reconnect after this long, so that replicas share the load.",
    )
    max_connection_age_grace_s: _Seconds = Field(
        default=60.0, description="How long calls may go on over a connection that was asked to reconnect."
    )
    access_log: Literal["none", "problems", "all"] = Field(
        default="problems",
        description="Calls that get a log line: none, problems (refused, failed, cancelled, or slower than 1 s without "
        "their waiting) or all. Bugs are always logged.",
    )
    otel: bool = Field(
        default=False,
        description="Make an OpenTelemetry span of each call and export it as the standard OTEL_* variables say. Needs "
        "the extra shardbook[otel].",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log lines that are written: debug, info, warning or error."
    )
    log_json: bool | None = Field(
        default=None, description="Write log lines as JSON; unset means JSON unless standard error is a terminal."
    )

    @pydantic.field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        if value.startswith("unix:"):
            if len(value) == len("unix:"):
                raise ValueError("the path is missing: write unix:/path/of/socket")
            return value
        if not _is_host_and_port(value):
            raise ValueError("write host:port, [ipv6]:port or unix:/path")
        return value

    @pydantic.field_validator("http_listen")
    @classmethod
    def _check_http_listen(cls, value: str) -> str:
        if value in ("", OFF):
            return ""
        if not _is_host_and_port(value):
            raise ValueError("write host:port, [ipv6]:port, or off")
        return value

    @property
    def embedded(self) -> bool:
        """True when the data is in the embedded database's own place, which the server looks after by itself."""
        return self.database_url == default_database_url()


def _is_host_and_port(value: str) -> bool:
    host, _, port = value.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and int(port) <= 65_535


@dataclass(frozen=True)
class Loaded:
    """Settings, and where each that is not a default comes from.

    Attributes:
        settings: All of them.
        sources: By name, for people: ``flag``, the environment variable, or the file.
    """

    settings: Settings
    sources: Mapping[str, str]


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Reads all sources; see ``load_with_sources``."""
    return load_with_sources(flags, config=config, environment=environment).settings


def load_with_sources(
    flags: Mapping[str, object] | None = None,
    *,
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """Reads all sources, and remembers which one said what.

    Args:
        flags: Settings given on the command line, by name; None values were not given.
        config: TOML file; ``SHARDBOOK_CONFIG`` names one when this is None.
        environment: The environment to read; this process's when None.

    Raises:
        InvalidArgumentError: A value is not valid, or the file cannot be read or has a name that is no setting.
    """
    environment = os.environ if environment is None else environment
    if config is None and environment.get(CONFIG_VARIABLE):
        config = Path(environment[CONFIG_VARIABLE])
    named = {f"{ENVIRONMENT_PREFIX}{name.upper()}": name for name in Settings.model_fields}
    values: dict[str, object] = _read_toml(config) if config is not None else {}
    sources = dict.fromkeys(values, str(config))
    for variable, value in environment.items():
        if variable in named and value:
            values[named[variable]] = value
            sources[named[variable]] = variable
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    values |= given
    sources |= dict.fromkeys(given, FLAG)
    try:
        return Loaded(Settings.model_validate(values), sources)
    except pydantic.ValidationError as error:
        wrong = [(str(e["loc"][0]), _why(e["type"], e)) for e in error.errors(include_url=False)]
        raise InvalidArgumentError(
            "settings are not valid: " + "; ".join(f"{_shown(name, sources)} {why}" for name, why in wrong),
            reason="INVALID_SETTINGS",
            violations=[FieldViolation(name, why) for name, why in wrong],
        ) from None


def _shown(name: str, sources: Mapping[str, str]) -> str:
    """Returns a setting as whoever set it wrote it: the flag, the variable, or the name in the file."""
    source = sources[name]
    if source == FLAG:
        return f"--{name.replace('_', '-')}"
    return source if source.startswith(ENVIRONMENT_PREFIX) else f"{name} in {source}"


def _why(kind: str, error: Mapping[str, Any]) -> str:
    """Returns what is wrong with a setting, for people; values are not repeated, they may be secret."""
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][0]), Settings.model_fields, n=1)
        return "is no setting" + (f": did you mean {near[0]}?" if near else "; docs/SETTINGS.md lists them")
    if kind == "literal_error":
        return f"is not one of {context['expected']}"
    if kind == "value_error":
        return f"is not valid: {context['error']}"
    for beginning, why in _KINDS.items():
        if kind.startswith(beginning):
            return why.format(**context)
    return f"is not valid: {error['msg']}"


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"cannot read settings from {path}: {error}", reason="INVALID_SETTINGS", field="config"
        ) from error
