"""How the tree is laid out: what import-linter and ruff cannot say."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("client/shardbook", "server/shardbook_server", "migrations/shardbook_migrations")
FOLDERS = (*PACKAGES, "benchmarks", "examples", "proto", "tests")
MAX_LINES = 400

#: What the server may take from the client.
SHARED = {"core", "errors", "v1"}
#: Parts of the standard library by which a module would read or write something outside the process.
IO_MODULES = {
    "asyncio",
    "http",
    "io",
    "os",
    "pathlib",
    "shutil",
    "socket",
    "sqlite3",
    "subprocess",
    "tempfile",
    "urllib",
}


def _sources(*folders: str) -> Iterator[Path]:
    """Every hand-written Python file below ``folders``."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "client/shardbook/v1" not in path.as_posix() or path.name == "__init__.py":
                yield path


def _imports(path: Path) -> set[str]:
    """Every module that a file names in an import statement, at any depth; `from a import b` counts as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _relative(paths: Iterator[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.mark.parametrize("path", _relative(_sources(*FOLDERS)))
def test_files_are_short_and_say_what_they_hold(path: str) -> None:
    """Rule: a module begins with a docstring and has at most 400 lines."""
    text = (ROOT / path).read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert MAX_LINES >= text.count("\n")


def test_every_folder_of_a_package_is_a_package() -> None:
    """Rule: a folder that holds modules has an `__init__.py`, so that the wheel and type checkers see the same tree."""
    folders = {path.parent for path in _sources(*PACKAGES, "tests", "benchmarks")}
    assert [] == sorted(folder.as_posix() for folder in folders if not (folder / "__init__.py").exists())


def test_core_imports_nothing_that_does_io() -> None:
    """Rule: shardbook.core stands on numpy, zstandard, shardbook.errors and pure parts of the standard library."""
    allowed = sys.stdlib_module_names - IO_MODULES | {"numpy", "zstandard"}
    wrong = [
        (path.name, name)
        for path in _sources("client/shardbook/core")
        for name in sorted(_imports(path))
        if name.partition(".")[0] not in allowed and not re.match(r"(shardbook\.(core|errors)|urllib\.parse)\b", name)
    ]
    assert [] == wrong


def test_server_takes_three_things_from_the_client() -> None:
    """Rule: the server imports shardbook.core, shardbook.errors and shardbook.v1, nothing else of shardbook."""
    wrong = [
        (path.name, name)
        for path in _sources("server", "migrations")
        for name in sorted(_imports(path))
        if name.split(".")[0] == "shardbook" and name.split(".")[1:2] not in [[part] for part in SHARED]
    ]
    assert [] == wrong


def test_packages_are_typed() -> None:
    """Rule: each package ships `py.typed`, so that users' type checkers read our annotations."""
    assert [] == [package for package in PACKAGES if not (ROOT / package / "py.typed").exists()]
