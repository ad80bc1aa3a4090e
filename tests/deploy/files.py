"""The files under test, and what is true of them whatever reads them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import typer
import yaml

from shardbook.config import SETTINGS
from shardbook_server.cli import app
from shardbook_server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"
KUBERNETES = ROOT / "deploy" / "kubernetes"
#: Environment variables that a server reads.
SERVER_VARIABLES = {CONFIG_VARIABLE, *(f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in Settings.model_fields)}
#: Those of servers and clients.
VARIABLES = SERVER_VARIABLES | {setting.variable for setting in SETTINGS}


def version() -> str:
    """The version that is being developed."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def read_yaml(path: Path) -> Any:
    """The one document of a file; merge keys and anchors are resolved."""
    return yaml.safe_load(path.read_text())


def is_server_command(words: Iterable[str]) -> bool:
    """Says whether ``shardbook-server WORDS`` is a command that does something."""
    command: Any = typer.main.get_command(app)
    for word in words:
        commands: dict[str, Any] = getattr(command, "commands", {})
        if word not in commands:
            return False
        command = commands[word]
    return isinstance(command, click.Command) or not hasattr(command, "commands")


def server_settings(environment: Mapping[str, object]) -> dict[str, object]:
    """The variables of an environment that are meant for Shardbook."""
    return {name: value for name, value in environment.items() if name.startswith(ENVIRONMENT_PREFIX)}


def drain_s(environment: Mapping[str, object]) -> float:
    """How long a server with this environment drains, seconds."""
    return float(str(environment.get("SHARDBOOK_DRAIN_S", Settings.model_fields["drain_s"].default)))


def seconds(duration: str) -> float:
    """Reads a duration of Compose, such as ``60s``."""
    found = re.fullmatch(r"(\d+)s", duration)
    assert found is not None, duration
    return float(found[1])


def literal_passwords(text: str) -> list[str]:
    """URLs with a password in them."""
    return re.findall(r"\w+://[^\s:/@]+:[^\s@/]+@\S+", text)
