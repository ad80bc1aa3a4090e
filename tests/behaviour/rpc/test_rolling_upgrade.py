"""A schema that is upgraded while servers of the release before serve it."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

from shardbook_server.app import prepare_database, running_server
from tests.behaviour.rpc.api import Api, Job, api_of, settings_in, wait_until
from tests.databases import Databases
from tests.storage.releases import NEXT, start_upgrade, write_next_release


class Saving:
    """A job that saves step after step in a thread of its own, without any retry of the client's.

    Args:
        api: The server it speaks to.
        run: The run it writes.
    """

    def __init__(self, api: Api, run: str) -> None:
        self._job = Job.start(api, run)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._save_on)
        self.saved_count = 0
        self.failures: list[Exception] = []

    def __enter__(self) -> Saving:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)

    def await_saves(self, count: int) -> None:
        """Waits until so many further steps are saved."""
        target = self.saved_count + count
        wait_until(lambda: self.saved_count >= target or bool(self.failures), within_s=30)

    def _save_on(self) -> None:
        try:
            for step in itertools.takewhile(lambda _: not self._ended.is_set(), itertools.count(1)):
                self._job.save(step)
                self.saved_count += 1
        except Exception as error:  # noqa: BLE001 - the test shows it
            self.failures.append(error)


def test_an_old_server_serves_on_while_and_after_the_schema_is_upgraded(
    databases: Databases, run: str, tmp_path: Path
) -> None:
    """Rule: a rolling upgrade migrates first, and costs no call; an old server even starts on the newer schema."""
    settings = settings_in(tmp_path, database_url=databases.new())
    location = write_next_release(tmp_path)
    with running_server(settings) as server, api_of(server.address) as api, Saving(api, run) as job:
        # Enough for the driver to have prepared its statements.
        job.await_saves(6)
        upgrade = start_upgrade(settings.database_url, location)
        assert f"{NEXT}\n" == upgrade.communicate(timeout=60)[0]
        job.await_saves(3)
        assert NEXT == prepare_database(settings)
        with running_server(settings) as other, api_of(other.address) as other_api:
            Job.start(other_api, run + "-other").save(1)
        job.await_saves(1)
    assert [] == job.failures
    assert 0 == server.database.checked_out()
