"""What every test may rely on: no setting leaks in, nothing is written outside temporary folders.

Markers, warnings and time limits stand in pyproject.toml. Property tests: ``--hypothesis-profile=soak`` tries many
more examples; a failing example is printed in a form that can be pasted into the test.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from shardbook._channel import connections
from tests.databases import KINDS, Databases
from tests.postgres import Postgres, described, running_postgres

_HERE = Path(__file__).parent
_SLOW_FOLDERS = {"faults", "torch", "deploy"}

# Compiled once, not by each of the hundreds of processes that tests start.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("default", deadline=None, print_blob=True, max_examples=60)
settings.register_profile("soak", deadline=None, print_blob=True, max_examples=1_000)
settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow cases of parametrised tests, before ``-m`` chooses; puts the slow folders first.

    Workers take a file at a time: long ones at the end would leave all but one of them idle.
    """
    items.sort(key=lambda item: _SLOW_FOLDERS.isdisjoint(item.path.relative_to(_HERE).parts))
    for item in items:
        slow = {str(word) for marker in item.iter_markers("soak_with") for word in marker.args}
        callspec = getattr(item, "callspec", None)
        if slow and callspec is not None and slow & set(callspec.id.split("-")):
            item.add_marker(pytest.mark.soak)


def pytest_report_header() -> str:
    """Says which Postgres the run is on."""
    return f"postgres: {described()}"


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hides the developer's settings and data from this process and all that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SHARDBOOK_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        # Servers of parallel tests would all want the same port; tests of HTTP ask for one of their own.
        patch.setenv("SHARDBOOK_HTTP_LISTEN", "off")
        # Ranks and workers share few cores: one thread each.
        patch.setenv("OMP_NUM_THREADS", "1")
        # A terminal's width and colours are no part of an output.
        patch.setenv("COLUMNS", "200")
        patch.setenv("NO_COLOR", "1")
        patch.delenv("FORCE_COLOR", raising=False)
        yield


@pytest.fixture(autouse=True)
def _no_channels_from_before() -> Iterator[None]:
    """Forgets the process's channels: ports are used again, and one whose server ended refuses calls for a while."""
    yield
    connections._open.clear()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real Postgres, one for each process of tests; started by the first test that asks for it."""
    with running_postgres() as postgres:
        yield postgres


#: Makes the databases of one kind.
MakeDatabases = Callable[[str], Databases]


@pytest.fixture(scope="session")
def make_databases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeDatabases:
    """Databases by kind, whatever the scope of the fixture that hands them out."""
    made: dict[str, Databases] = {}

    def make(kind: str) -> Databases:
        if kind not in made:
            server = request.getfixturevalue("postgres") if kind == "postgres" else None
            made[kind] = Databases(kind, tmp_path_factory.mktemp(kind), server)
        return made[kind]

    return make


@pytest.fixture(params=KINDS)
def databases(request: pytest.FixtureRequest, make_databases: MakeDatabases) -> Databases:
    """Databases of either kind: whoever asks for them runs once on each."""
    return make_databases(request.param)


@pytest.fixture(scope="module", params=KINDS)
def module_databases(request: pytest.FixtureRequest, make_databases: MakeDatabases) -> Databases:
    """The same, for fixtures that a whole module shares."""
    return make_databases(request.param)
