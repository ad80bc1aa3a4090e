"""Several writers, in threads and processes, and readers beside them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from sqlalchemy import text

from shardbook.errors import UnavailableError
from shardbook_server.storage.database import Database
from tests.databases import opened
from tests.storage import writers

PROCESSES = 2


def test_no_update_is_lost_and_nobody_finds_the_database_locked(database: Database) -> None:
    """A read before the write that depends on it is what loses updates: 118 of 160, silently, with Python's own SQLite.

    4 threads in each of 2 processes read a number and write the next one; every one of them counts.
    """
    command = [sys.executable, "-m", "tests.storage.writers", database.url]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [(0, "")] * PROCESSES == [
        (process.returncode, error) for process, error in zip(started, errors, strict=True)
    ]
    with database.read() as connection:
        number = connection.execute(text("SELECT cursor FROM catalog")).scalar_one()
    assert PROCESSES * writers.THREADS * writers.ROUNDS == number


def test_a_writer_waits_for_a_slow_one(database: Database) -> None:
    """It is not told "database is locked" within five seconds: it waits its turn, and sees what the other did."""
    begun, waited = threading.Event(), []

    def hold() -> None:
        with database.write([writers.RUN]) as connection:
            connection.execute(text("UPDATE catalog SET cursor = cursor + 1"))
            begun.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(5)
    start_s = time.monotonic()
    with opened(database.url) as other, other.write([writers.RUN]) as connection:
        waited.append(connection.execute(text("SELECT cursor FROM catalog")).scalar_one())
    holder.join()
    assert [1] == waited
    assert time.monotonic() - start_s > 0.2


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    """They see what was committed before."""
    with database.write() as writing:
        writing.execute(text("UPDATE catalog SET cursor = 5"))
        with database.read() as reading:
            assert 0 == reading.execute(text("SELECT cursor FROM catalog")).scalar_one()
    with database.read() as reading:
        assert 5 == reading.execute(text("SELECT cursor FROM catalog")).scalar_one()


def test_a_read_is_of_one_moment(database: Database) -> None:
    """What is committed in between does not show."""
    with database.read() as reading:
        first = reading.execute(text("SELECT cursor FROM catalog")).scalar_one()
        with database.write() as writing:
            writing.execute(text("UPDATE catalog SET cursor = cursor + 1"))
        assert first == reading.execute(text("SELECT cursor FROM catalog")).scalar_one()


def test_an_error_takes_the_whole_transaction_back(database: Database) -> None:
    """All or nothing."""

    def write_and_fail() -> None:
        with database.write() as connection:
            connection.execute(text("UPDATE catalog SET cursor = 5"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    with database.read() as connection:
        assert 0 == connection.execute(text("SELECT cursor FROM catalog")).scalar_one()


def test_a_reading_connection_refuses_to_write(database: Database) -> None:
    """A write that went astray is found in the first test that makes it."""
    with pytest.raises(UnavailableError, match=r"read-?only"), database.read() as connection:
        connection.execute(text("UPDATE catalog SET cursor = 5"))
