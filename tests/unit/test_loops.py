"""Which event loop the server runs on."""

from __future__ import annotations

import asyncio

import pytest

from shardbook_server import loops


async def _module() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_uvloop_is_used_where_it_is_installed() -> None:
    """It comes with the extra [server]."""
    assert "uvloop" == loops.run(_module())


def test_without_it_the_server_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On asyncio's own loop."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert loops.run(_module()).startswith("asyncio")
