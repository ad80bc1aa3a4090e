"""What importing Shardbook loads, asked of fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import shardbook
import shardbook_server

ROOT = Path(__file__).resolve().parents[2]

#: What no trainer should pay for by ``import shardbook``, and no server by ``import shardbook_server``.
HEAVY = {"alembic", "pydantic", "rich", "shardbook_server", "sqlalchemy", "structlog", "torch", "typer"}

_REPORT = """
import json, sys
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def _loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    return set(json.loads(_run(code + _REPORT)))


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _modules_of(package: ModuleType) -> list[str]:
    """Every module of a package by name, found without importing any."""
    (folder,) = (Path(path) for path in package.__path__)
    parts = [path.relative_to(folder.parent).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    return [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts if part[-1] != "__main__"]


def test_import_shardbook_is_light() -> None:
    """Rule: `import shardbook` never loads torch, SQL, the command line's libraries or the server."""
    assert set() == _loaded_by("import shardbook") & HEAVY


def test_client_base_needs_no_extra() -> None:
    """Rule: all of shardbook but `dcp` and `cli` works with the base dependencies alone."""
    base = [name for name in _modules_of(shardbook) if not name.startswith(("shardbook.dcp", "shardbook.cli"))]
    assert set() == _loaded_by("\n".join(f"import {name}" for name in base)) & HEAVY


def test_server_never_loads_torch() -> None:
    """Rule: the server, every module of it, runs without torch."""
    names = _modules_of(shardbook_server)
    assert "torch" not in _loaded_by("\n".join(f"import {name}" for name in names))


def test_core_is_numpy_and_zstandard() -> None:
    """Rule: shardbook.core loads no third-party module but numpy and zstandard, on either side of the wire.

    The parent package is replaced by an empty one, so that only what core itself imports is counted.
    """
    folder = Path(str(shardbook.__file__)).parent
    core = sorted(f"shardbook.core.{path.stem}" for path in (folder / "core").glob("[!_]*.py"))
    code = f"""
import sys, types
parent = types.ModuleType("shardbook")
parent.__path__ = [{str(folder)!r}]
sys.modules["shardbook"] = parent
before = set(sys.modules)
import {", ".join(core)}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
import json
print(json.dumps(sorted(new)))
"""
    # What the wheels of numpy and zstandard bring along: Cython's runtime, and cffi for one of zstandard's backends.
    loaded = {name for name in json.loads(_run(code)) if not name.startswith("_")} - {"cffi", "cython_runtime"}
    assert {"numpy", "shardbook", "zstandard"} == loaded


def test_command_line_starts_without_torch() -> None:
    """Rule: `shardbook --help` and every catalogue command answer without loading torch or SQL."""
    assert set() == _loaded_by("import shardbook.cli") & {"torch", "sqlalchemy", "alembic", "shardbook_server"}


@pytest.mark.parametrize("module", ["shardbook.dcp", "shardbook.cli", "shardbook_server.cli"])
def test_imports_warn_of_nothing(module: str) -> None:
    """Rule: nobody's `-W error` is broken by an import of ours, whatever it loads."""
    assert "" == _run(f"import warnings; warnings.simplefilter('error'); import {module}")


@pytest.mark.parametrize("package", ["shardbook", "shardbook.core.assembly"])
def test_own_modules_import_quickly(package: str) -> None:
    """Rule: beyond its dependencies, an import costs at most half a second of CPU time (measured: some 50 ms)."""
    code = f"""
import time, numpy, zstandard, grpc, grpc_status.rpc_status, google.protobuf.timestamp_pb2
begin = time.process_time()
import {package}
print(time.process_time() - begin)
"""
    assert float(_run(code)) < 0.5
