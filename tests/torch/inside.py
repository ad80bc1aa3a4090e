"""A planner that watches the save process from inside and writes down what it saw when that process ends."""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tests.torch.detector import detector

_is_watching = False


class Watching(DefaultSavePlanner):
    """Begins to watch when it arrives in another process, which is before the state dict does.

    Args:
        report: Where the report goes.
    """

    def __init__(self, report: str) -> None:
        super().__init__()
        self.report = report
        self.trainer = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        global _is_watching  # noqa: PLW0603 - one report a process
        if not _is_watching and os.getpid() != self.trainer:
            _is_watching = True
            _watch(self.report)


def _watch(path: str) -> None:
    watching = detector()
    noticed = watching.__enter__()

    def write() -> None:
        watching.__exit__(None, None, None)
        seen = {
            "noticed": noticed,
            "in a group": dist.is_initialized(),
            "uses a device": torch.cuda.is_initialized(),
        }
        Path(path).write_text(json.dumps(seen))

    atexit.register(write)


#: What every report is to say.
NOTHING: dict[str, Any] = {"noticed": [], "in a group": False, "uses a device": False}
