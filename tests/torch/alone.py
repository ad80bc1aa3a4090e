"""A small state dict for tests of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shardbook import dcp


def some_state() -> dict[str, Any]:
    """Tensors and a number."""
    return {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(()), "lr": 0.5}


def blank_state() -> dict[str, Any]:
    """The same keys with other values."""
    return {"w": torch.zeros(3, 4), "b": torch.zeros(()), "lr": 0.0}


def loads(target: str | Path, **options: Any) -> bool:
    """Returns whether loading fills a blank state dict with the true values."""
    state = blank_state()
    dcp.load(state, target, **options)
    right = some_state()
    return torch.equal(state["w"], right["w"]) and torch.equal(state["b"], right["b"]) and state["lr"] == right["lr"]
