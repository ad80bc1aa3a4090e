"""Planners that watch the save process from inside and write down what they saw when that process ends."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tests.torch.detector import detector

T = TypeVar("T")
_is_watching = False


class Arriving(DefaultSavePlanner):
    """Notices when it arrives in another process, which is before the state dict does.

    Args:
        report: Where the report goes.
    """

    def __init__(self, report: str) -> None:
        super().__init__()
        self.report = report
        self.trainer = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() != self.trainer:
            self.arrived()

    def arrived(self) -> None:
        """Called in the other process."""
        raise NotImplementedError


def report_at_exit(path: str, watching: AbstractContextManager[T], told: Callable[[T], object]) -> None:
    """Watches until this process ends, and then writes down what that told."""
    noticed = watching.__enter__()

    def write() -> None:
        watching.__exit__(None, None, None)
        Path(path).write_text(json.dumps(told(noticed)))

    atexit.register(write)


class Watching(Arriving):
    """Reports what the process says to others, and what else it should not do."""

    def arrived(self) -> None:
        """Begins to watch, once a process."""
        global _is_watching  # noqa: PLW0603 - one report a process
        if not _is_watching:
            _is_watching = True
            report_at_exit(self.report, detector(), _seen)


def _seen(noticed: list[str]) -> dict[str, Any]:
    return {"noticed": noticed, "in a group": dist.is_initialized(), "uses a device": torch.cuda.is_initialized()}


#: What every report is to say.
NOTHING: dict[str, Any] = {"noticed": [], "in a group": False, "uses a device": False}
