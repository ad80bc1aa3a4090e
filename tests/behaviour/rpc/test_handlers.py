"""How handlers are written: four steps, and one way to a service."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardbook_server.rpc
from shardbook_server.app import SERVICES

FOLDER = Path(str(shardbook_server.rpc.__file__)).parent
HANDLERS = ("registration", "metadata", "catalog")
MODULES = tuple(sorted(path.stem for path in FOLDER.glob("*.py")))
#: Longest body of a handler, lines of code.
LONGEST_LINES = 15
#: Names under which rpc holds services.
SERVICE_HOLDERS = {"_services", "_catalog", "services"}


def _tree(module: str) -> ast.Module:
    return ast.parse((FOLDER / f"{module}.py").read_text())


def _handlers(module: str) -> Iterator[ast.AsyncFunctionDef]:
    """Methods that answer a call: named as in the proto."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.AsyncFunctionDef) and node.name[0].isupper():
            yield node


def _root_and_path(node: ast.expr) -> tuple[str, ...]:
    """Names of ``a.b.c``, outermost object first; empty for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (rest := _root_and_path(node.value)):
        return (*rest, node.attr)
    return ()


def test_every_call_of_the_api_has_a_handler() -> None:
    """Rule: no call of shardbook.v1 falls through to the generated UNIMPLEMENTED."""
    from shardbook.v1 import catalog_pb2, metadata_pb2, registration_pb2

    declared = {
        method.name
        for file in (registration_pb2, metadata_pb2, catalog_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert declared == {handler.name for module in HANDLERS for handler in _handlers(module)}
    # And RelayService, whose one call is a stream of calls of the others.
    assert 4 == len(SERVICES)


@pytest.mark.parametrize("module", HANDLERS)
def test_handlers_are_thin(module: str) -> None:
    """Rule: check, convert, call, convert; at most 15 lines, no branches that decide, no try."""
    for handler in _handlers(module):
        body = handler.body[1:]  # without the docstring
        lines = body[-1].end_lineno - body[0].lineno + 1 if body[-1].end_lineno else 0
        assert lines <= LONGEST_LINES, f"{handler.name} has {lines} lines"
        kinds = {type(node) for statement in body for node in ast.walk(statement)}
        assert not kinds & {ast.Try, ast.While, ast.For}, f"{handler.name} does more than four steps"


@pytest.mark.parametrize("module", MODULES)
def test_services_are_called_through_the_bridge_alone(module: str) -> None:
    """Rule: rpc hands a service's method to the bridge and never calls one itself: it would stop the event loop."""
    tree = _tree(module)
    # A method kept in a local variable is a service's method all the same.
    local = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and SERVICE_HOLDERS & set(_root_and_path(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            path = _root_and_path(node.func)
            assert not SERVICE_HOLDERS & set(path[:-1]), f"{module}.py:{node.lineno} calls {'.'.join(path)}"
            assert not (len(path) == 1 and path[0] in local), f"{module}.py:{node.lineno} calls {path[0]}"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "bridge"])
def test_only_the_bridge_makes_threads(module: str) -> None:
    """Rule: exactly one bridge; nothing else in rpc starts a thread, an executor, or blocks."""
    forbidden = {"threading", "concurrent", "time.sleep", "asyncio.to_thread", "run_in_executor"}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not forbidden & {name.partition(".")[0] for name in names}, f"{module}.py:{node.lineno}"
        elif isinstance(node, ast.Call):
            path = _root_and_path(node.func)
            assert not forbidden & {".".join(path), *path[-1:]}, f"{module}.py:{node.lineno}"
