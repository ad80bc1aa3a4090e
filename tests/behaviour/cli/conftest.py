"""Fixtures of the command line's tests."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import structlog

from shardbook.cli import main


@pytest.fixture(scope="package", autouse=True)
def _quiet_server() -> Iterator[None]:
    """A server in this process logs to nobody: its lines are no part of a command's output."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@dataclass(frozen=True)
class Ran:
    """What a command did.

    Attributes:
        code: Exit code.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
    """

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON object on stdout."""
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the table on stdout, header first."""
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in self.out.splitlines()]


Shardbook = Callable[..., Ran]


@pytest.fixture
def shardbook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shardbook:
    """Runs the command in this process."""

    def run(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["shardbook", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ran(code or 0, captured.out, captured.err)

    return run
