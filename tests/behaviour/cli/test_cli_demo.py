"""`shardbook demo`: a server of its own, ranks without torch, and every step holds."""

from __future__ import annotations

import importlib.util
import io
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch

from shardbook.demo.archive import saved_tensor
from tests.behaviour.cli.conftest import Shardbook

_find = importlib.util.find_spec


def without(*names: str) -> object:
    """What a machine finds that lacks some packages."""

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in names else _find(name, package)

    return find


def test_the_whole_story_holds_without_torch(
    shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: one machine, one command; what was saved stays where it was told to, and nothing else is left."""
    monkeypatch.setattr(importlib.util, "find_spec", without("torch"))
    monkeypatch.delenv("SHARDBOOK_SERVER", raising=False)
    ran = shardbook("demo", "--keep", str(tmp_path / "kept"), "--json")
    assert (0, "") == (ran.code, ran.err)
    assert ["held", "took_s", "directory"] == list(ran.json)
    held = ran.json["held"]
    for step in ("shardbook sync", "shardbook verify", "shardbook status", "demo/tiny@300 is committed"):
        assert step in held
    assert 4 == sum("as it was saved" in one or "@300 is committed" in one for one in held)
    kept = tmp_path / "kept"
    assert {"ckpt", "shardbook.db", "server.log"} <= {path.name for path in kept.iterdir()}
    assert ["100", "200", "300", "400", "500"] == sorted(path.name[5:] for path in (kept / "ckpt").iterdir())
    again = shardbook("demo", "--keep", str(kept))
    assert (2, True) == (again.code, "is not empty" in again.err)


def test_without_a_server_to_start_the_extra_is_named(shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: 2, and what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", without("sqlalchemy"))
    ran = shardbook("demo")
    assert (2, "") == (ran.code, ran.out)
    assert "pip install 'shardbook[server]'" in ran.err


def test_torch_loads_what_the_demos_ranks_write() -> None:
    """Rule: byte for byte a file that torch.save could have written, for its safe loader too."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    loaded = torch.load(io.BytesIO(saved_tensor(values)), weights_only=True)
    assert torch.equal(torch.from_numpy(values), loaded)
