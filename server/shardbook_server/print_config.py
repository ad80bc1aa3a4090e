"""The settings in effect as TOML: what ``serve --print-config`` prints, and what ``--config`` reads again."""

from __future__ import annotations

import json
from typing import Final

from shardbook_server.settings import Loaded
from shardbook_server.storage.urls import shown_url

#: Settings that may hold a password.
_URLS: Final = frozenset({"database_url", "migration_url"})


def as_toml(loaded: Loaded) -> str:
    """Returns a line a setting, with its source as a comment; users and passwords of databases are left out."""
    lines = []
    for name, value in loaded.settings.model_dump().items():
        source = loaded.sources.get(name, "default")
        if value is None:
            lines.append(f"# {name} is not set")
        else:
            shown = shown_url(str(value)) if name in _URLS else value
            lines.append(f"{name} = {_literal(shown)}  # {source}")
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    """Returns a TOML value: JSON's spelling of booleans, numbers and texts is TOML's too, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
