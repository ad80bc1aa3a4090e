"""What every benchmark shares: arguments, interleaved timing, memory, goals, and the form of the result."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

#: Seed of everything random in a benchmark.
SEED = 20261123

#: What a row may hold; seconds, bytes and counts carry their unit in the column's name.
Cell = str | int | float | None


def parse_arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments that every benchmark takes: ``quick`` and ``check``."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    return parser.parse_args(argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that every benchmark takes."""
    parser.add_argument("--quick", action="store_true", help="end in less than a minute, on smaller workloads")
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed, and name it")


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """Seconds of the same work, done several times."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median, what is reported."""
        return statistics.median(self.samples_s)

    def columns(self, name: str = "time") -> dict[str, Cell]:
        """Returns median, min and max as columns of a row, seconds."""
        values = {"median": self.median_s, "min": min(self.samples_s), "max": max(self.samples_s)}
        return {f"{name}_{statistic}_s": round(value, 6) for statistic, value in values.items()}


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 3, warmups: int = 1
) -> dict[str, Timing]:
    """Times each contender ``rounds`` times, one after the other in every round, so that noise meets all alike.

    Garbage is collected before each run, outside its time. Results are dropped.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmups + rounds):
        for name, work in contenders.items():
            gc.collect()
            begin = time.perf_counter()
            work()
            elapsed_s = time.perf_counter() - begin
            if turn >= warmups:
                samples[name].append(elapsed_s)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


@contextmanager
def stopwatch(into: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds of its body to ``into[stage]``."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        into[stage] = into.get(stage, 0.0) + time.perf_counter() - begin


@contextmanager
def garbage_collector(*, enabled: bool) -> Iterator[None]:
    """Runs its body with Python's garbage collector on or off, and restores what was."""
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()


def cpu_s(pid: int) -> float:
    """Returns the processor time of a process so far, with that of its ended children, seconds; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- memory


def rss_bytes(pid: int | str = "self") -> int:
    """Returns the resident memory of a process now."""
    return _status_bytes(pid, "VmRSS")


def peak_rss_bytes(pid: int | str = "self") -> int:
    """Returns the largest resident memory of a process since it began, or since ``reset_peak_rss``."""
    return _status_bytes(pid, "VmHWM")


def reset_peak_rss() -> None:
    """Makes ``peak_rss_bytes`` of this process begin anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(pid: int | str, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has no {key}: it has ended")


@dataclass(frozen=True)
class Measured:
    """What work in a fresh process returned, and what it took there."""

    value: Any
    time_s: float
    peak_rss_bytes: int


def in_fresh_process(work: Callable[..., Any], *args: Any) -> Measured:
    """Runs a module-level function in a new interpreter, so that its peak memory is its own.

    Imports of the function's module are not in its time, but are in its memory. Errors are raised here.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (work, args))


def _measure(work: Callable[..., Any], args: tuple[Any, ...]) -> Measured:
    begin = time.perf_counter()
    value = work(*args)
    return Measured(value, time.perf_counter() - begin, peak_rss_bytes())


# ---------------------------------------------------------------- the result


@dataclass(frozen=True)
class Goal:
    """A bound that a ratio has to keep."""

    comparison: Literal[">=", "<="]
    bound: float

    def met(self, value: float) -> bool:
        """Tells whether ``value`` keeps the bound."""
        return value >= self.bound if self.comparison == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.comparison} {self.bound:g}"


@dataclass
class Report:
    """Rows and ratios of one benchmark, printed as they come; ``finish`` prints the whole.

    Attributes:
        name: The benchmark's module name.
        settings: What the figures depend on, durability first; becomes part of ``machine``.
    """

    name: str
    settings: Mapping[str, Cell] = field(default_factory=dict)
    rows: list[dict[str, Cell]] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    goals: dict[str, Goal] = field(default_factory=dict)

    def row(self, **cells: Cell) -> None:
        """Adds a row; rows may have different columns."""
        self.rows.append(cells)

    def ratio(self, name: str, value: float, goal: Goal | None = None) -> None:
        """Adds a figure that is compared, not just shown: a ratio of medians, or bytes a chunk."""
        self.ratios[name] = value
        if goal is not None:
            self.goals[name] = goal

    def missed(self) -> list[str]:
        """Returns a sentence for each goal that is missed."""
        return [
            f"{name} is {self.ratios[name]:.4g}, the goal is {goal}"
            for name, goal in self.goals.items()
            if not goal.met(self.ratios[name])
        ]

    def finish(self, *, check: bool) -> int:
        """Prints the tables and, last, the JSON line; returns the exit code, 1 for a missed goal under ``check``."""
        machine = {**machine_facts(), "settings": dict(self.settings)}
        print(f"{self.name} on {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}")
        for key, value in self.settings.items():
            print(f"  {key}: {value}")
        print(table(self.rows))
        print(table([self._ratio_row(name) for name in self.ratios]))
        missed = self.missed()
        for sentence in missed:
            print(f"MISSED: {sentence}", file=sys.stderr)
        ratios = {name: float(f"{value:.6g}") for name, value in self.ratios.items()}
        print(json.dumps({"name": self.name, "machine": machine, "rows": self.rows, "ratios": ratios}), flush=True)
        return 1 if check and missed else 0

    def _ratio_row(self, name: str) -> dict[str, Cell]:
        goal = self.goals.get(name)
        verdict = None if goal is None else "met" if goal.met(self.ratios[name]) else "MISSED"
        return {"ratio": name, "value": self.ratios[name], "goal": str(goal or ""), "verdict": verdict}


def table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Returns rows as aligned text; columns in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns] + [[_text(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def machine_facts() -> dict[str, Any]:
    """Returns what a reader has to know of the machine: no name, no address."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "grpcio", "protobuf", "sqlalchemy")},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
