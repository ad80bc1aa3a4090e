"""Row 32, the catalogue from end to end: backup, more saves, the database put back, directories imported and synced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from shardbook import Client, verify
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.stored_metadata import StoredMetadata
from shardbook_server.storage import migrate
from tests.databases import KINDS
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.postgres import Cluster, tool
from tests.torch import jobs
from tests.torch.harness import RankPool


class Kept:
    """A database that is backed up and put back as an operator does it: by commands, into a new place."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._folder = folder
        self._cluster = Cluster() if kind == "postgres" else None
        self._backup = folder / "backup"
        self.url = self._url("shardbook")
        migrate.upgrade(self.url)

    def _url(self, name: str) -> str:
        if self._cluster is None:
            return f"sqlite:///{self._folder / name}.db"
        with psycopg.connect(self._cluster.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
        return self._cluster.url.removesuffix("postgres") + name

    def back_up(self) -> None:
        """Makes the backup, while servers run."""
        if self._cluster is None:
            _command("shardbook_server.cli", "db", "backup", str(self._backup), "--database-url", self.url)
        else:
            dump = [tool("pg_dump"), "--format=custom", f"--file={self._backup}", self.url]
            subprocess.run(dump, check=True, timeout=60)

    def restore(self) -> str:
        """Puts it back, and says so; returns where it is now."""
        url = self._url("restored")
        if self._cluster is None:
            shutil.copy(self._backup, self._folder / "restored.db")
        else:
            put_back = [tool("pg_restore"), f"--dbname={url}", "--exit-on-error", str(self._backup)]
            subprocess.run(put_back, check=True, timeout=60)
        _command("shardbook_server.cli", "db", "mark-restored", "--yes", "--database-url", url)
        return url

    def remove(self) -> None:
        """Ends what it started."""
        if self._cluster is not None:
            self._cluster.remove()


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    """A database of either kind, on a server of its own."""
    kept = Kept(request.param, tmp_path)
    yield kept
    kept.remove()


def _command(module: str, *arguments: str, server: str = "") -> str:
    code = f"from {module} import main; main()"
    environment = {**os.environ, "SHARDBOOK_SERVER": server}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Known:
    """What a catalogue says of the committed checkpoints of a run: rows, metadata as stored, tensors, ``latest``."""

    rows: dict[str, Checkpoint]
    metadata: dict[str, dict[str, Any]]
    tensors: dict[str, list[Any]]
    latest: str

    @classmethod
    def of(cls, client: Client, run: str) -> Known:
        """Reads all of it, and proves that none is torn."""
        listed = p2_no_torn_checkpoint(client, run)
        names = [one.name for one in listed if one.state is CheckpointState.COMMITTED]
        return cls(
            {one.name: _timeless(one) for one in listed if one.name in names},
            {name: _payloads(client.get_metadata(name)) for name in names},
            {name: list(client.list_tensors(name)) for name in names},
            client.get_checkpoint(f"{run}@latest").name,
        )


def _timeless(row: Checkpoint) -> Checkpoint:
    """Without what says when and how it came into the catalogue."""
    return replace(row, create_time=None, commit_time=None, recovered=False)


def _payloads(stored: StoredMetadata) -> dict[str, Any]:
    return {**vars(stored), "checkpoint": _timeless(Checkpoint.of(stored.checkpoint))}


def _save(
    pool: RankPool, server: ServerProcess, run: str, layout: str, paths: list[Path], world_size: int
) -> list[int]:
    """A job saves into each of ``paths``; returns the sessions that its checkpoints have."""
    start = {"run": run, "server": server.address, "on_live": "takeover"}
    saved = pool.run(jobs.save, layout, [str(path) for path in paths], start, {}, world_size=world_size)
    names = [result.name for result in saved[0].results]
    assert [True] * len(paths) == [result.state == "COMMITTED" for result in saved[0].results]
    return [server.client.get_checkpoint(name).session for name in names]


@pytest.mark.soak_with("postgres")
def test_what_a_restored_database_lacks_comes_back_from_the_directories(
    kept: Kept, pool: RankPool, run: str, tmp_path: Path
) -> None:
    """Catalogue and metadata are what they were, byte for byte; no session number comes twice; saves go on.

    After the backup: the job goes on, one with another layout and world size takes over, saves a step of the backup's
    again and steps of its own, and a job that the backup does not know at all has a run of its own. One directory
    comes back by ``import``, the others by ``sync``; every checkpoint is verified, by its name and by its place.
    """
    checkpoints = tmp_path / "checkpoints"
    own, later = run, f"{run}-later"
    with ServerProcess(tmp_path / "before", kept.url) as server:
        sessions = _save(pool, server, own, "fsdp", [checkpoints / f"step-{step}" for step in (1, 2)], 2)
        kept.back_up()
        sessions += _save(pool, server, own, "fsdp", [checkpoints / f"step-{step}" for step in (3, 4)], 2)
        sessions += _save(pool, server, own, "hsdp", [checkpoints / f"step-{step}" for step in (4, 5)], 4)
        _save(pool, server, later, "objects", [checkpoints / "later" / "step-7"], 2)
        before = [Known.of(server.client, name) for name in (own, later)]
        assert [6, 1] == [len(known.rows) for known in before]
        server.stop()
    restored = kept.restore()
    with ServerProcess(tmp_path / "after", restored) as server:
        assert {1, 2} == {one.step for one in server.client.list_checkpoints(own)}
        directories = [str(path) for path in sorted([*checkpoints.glob("step-*"), *checkpoints.glob("later/step-*")])]
        one = ("import", str(checkpoints / "step-3"), "--run", own, "--json")
        said = json.loads(_command("shardbook.cli", *one, server=server.address))
        assert ["recorded"] == [one["outcome"] for one in said["checkpoints"]]
        said = json.loads(_command("shardbook.cli", "sync", *directories, "--json", server=server.address))
        assert {"recorded", "present"} == {one["outcome"] for one in _attempts(said)}
        assert before == [Known.of(server.client, name) for name in (own, later)]
        _verify_all(server, before, directories)
        refs = [f"{own}@{step}" for step in (1, 2, 3)]
        environment = {"SHARDBOOK_SERVER": server.address}
        assert [{ref: [] for ref in refs}] * 2 == pool.run(
            jobs.load, "fsdp", refs, world_size=2, environment=environment
        )
        again = _save(pool, server, own, "fsdp", [checkpoints / f"step-{step}" for step in (6, 7)], 2)
        assert max(sessions) < min(again)
        assert f"{own}@7" == server.client.get_checkpoint(f"{own}@latest").ref
        # A second sync finds nothing to do, also with the new ones among them.
        everything = [str(path) for path in sorted(checkpoints.glob("step-*"))]
        said = json.loads(_command("shardbook.cli", "sync", *everything, "--json", server=server.address))
        assert {"present"} == {one["outcome"] for one in _attempts(said)}


def _attempts(said: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = said["attempts"]
    return found


def _verify_all(server: ServerProcess, known: list[Known], directories: list[str]) -> None:
    """Everything is there, the superseded attempt included, and the command says the same."""
    names = [name for one in known for name in one.rows]
    reports = [verify(name, client=server.client) for name in names] + [verify(path) for path in directories]
    assert [True] * (len(names) + len(directories)) == [report.is_ok for report in reports]
    assert {"catalogue", "manifest"} == {report.source.value for report in reports}
    told = _command("shardbook.cli", "verify", names[0], "--json", server=server.address)
    assert reports[0].to_json() == json.loads(told)["report"]
