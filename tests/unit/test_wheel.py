"""The wheel that users install holds everything that runs."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("client", "server", "migrations")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tree, without the network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("shardbook-*-py3-none-any.whl")
    return built


def test_wheel_holds_every_file_of_the_three_packages(wheel: Path) -> None:
    """Rule: stubs, `py.typed`, migrations and their template are in the wheel, and nothing but the three packages."""
    expected = {
        path.relative_to(ROOT / root).as_posix()
        for root in SOURCE_ROOTS
        for path in (ROOT / root).rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert expected == packed
    assert "shardbook_migrations/script.py.mako" in packed
    assert any(name.startswith("shardbook_migrations/versions/0001") for name in packed)


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    """Rule: base, extras and commands are those of the design; the licence travels along."""
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_string(archive.read(f"{info}/METADATA").decode())
        commands = archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    extras = {"torch", "checksum", "cli", "read", "server", "postgres", "web", "otel", "dev", "all"}
    assert extras == set(metadata.get_all("Provides-Extra", []))
    base = {Requirement(line).name for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {"grpcio", "grpcio-status", "numpy", "protobuf", "zstandard"} == base
    assert "shardbook = shardbook.cli:main" in commands
    assert "shardbook-server = shardbook_server.cli:main" in commands


def test_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    """Rule: unpacked anywhere, the server migrates a new database with what is in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys, shardbook, shardbook_migrations;"
        "from shardbook_server.cli import main;"
        "print(shardbook.__file__, shardbook_migrations.__file__, flush=True);"
        "sys.argv = ['shardbook-server', 'db', 'upgrade'];"
        "main()"
    )
    environment = {
        "PYTHONPATH": str(tmp_path / "site"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path / "site")) for path in done.stdout.splitlines()[0].split())
    assert (tmp_path / "data" / "shardbook" / "shardbook.db").exists()
