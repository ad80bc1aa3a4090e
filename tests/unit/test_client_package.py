"""The package's front door: public names, version, and that the client knows every call of the API."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest

import shardbook
from shardbook import _describing, _lineage, _moving, _reading, _retaining, _saving, _watching, errors
from shardbook._transport import Rpc, StreamRpc
from shardbook.client import Client
from shardbook.v1 import catalog_pb2, metadata_pb2, registration_pb2

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", shardbook.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """What `__all__` lists can be imported, lazily or not."""
    assert getattr(shardbook, name) is not None
    assert name in dir(shardbook)


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as in any module."""
    with pytest.raises(AttributeError, match="Clinet"):
        _ = shardbook.Clinet


def test_every_error_is_public() -> None:
    """Whoever catches an error of ours finds it at the front door."""
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.ShardbookError)
    }
    assert set() == classes - set(shardbook.__all__)


def test_version_is_the_releases() -> None:
    """The constant that travels with every call is pyproject's version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == shardbook.__version__


def test_client_knows_every_call() -> None:
    """A call added to the proto files without a method of the client fails here."""
    described = {
        method.name
        for module in (registration_pb2, metadata_pb2, catalog_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    known = [
        value.name
        for module in (_saving, _reading, _describing, _lineage, _moving, _retaining, _watching)
        for value in vars(module).values()
        if isinstance(value, Rpc | StreamRpc)
    ]
    assert described == set(known)
    assert len(known) == len(set(known))


def test_every_method_says_what_it_does() -> None:
    """Public methods of the client are documented, thread-safety in the class."""
    methods = [value for name, value in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")]
    assert all(method.__doc__ for method in methods)
    assert "Thread-safe" in (Client.__doc__ or "")
