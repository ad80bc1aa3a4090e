"""A copy of the embedded database while it is served, and what a database that was put back has to forget."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Final

from sqlalchemy import update

from shardbook.errors import AlreadyExistsError, FailedPreconditionError
from shardbook_server.storage import sqlite
from shardbook_server.storage.database import Database
from shardbook_server.storage.tables import catalog, parts
from shardbook_server.storage.urls import is_postgres

#: How many session numbers a restored database leaves out: more than can have been handed out since its backup.
SESSION_GAP: Final = 1_000_000
#: Pages copied at a time: a writer that waits gets its turn in between.
_PAGES: Final = 4096


def backup(url: str, target: Path) -> int:
    """Copies the SQLite database at ``url`` to a new file, as of one moment, while servers go on; returns its bytes.

    The copy appears under its name only when it is whole and on the disk.

    Raises:
        AlreadyExistsError: There is such a file.
        FailedPreconditionError: The database is a Postgres, whose own tools do this, or there is none.
    """
    if is_postgres(url):
        raise FailedPreconditionError(
            "a Postgres is backed up by its own tools: pg_dump --format=custom --file=shardbook.dump URL, or a base "
            "backup with archived WAL (deploy/README.md)",
            reason="NOT_SQLITE",
            field="database_url",
        )
    source = sqlite.database_path(url)
    if not source.exists():
        raise FailedPreconditionError(f"there is no database at {source}", reason="NO_DATABASE", field="database_url")
    if target.exists():
        raise AlreadyExistsError(f"{target} is there already: name a new file", field="file")
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        reading, writing = sqlite.connector(source, read_only=True), sqlite.driver().__dict__["connect"]
        with closing(reading()) as reader, closing(writing(str(part))) as writer:
            reader.backup(writer, pages=_PAGES)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return target.stat().st_size


def mark_restored(url: str) -> None:
    """Tells a database that it was put back from a backup: no server may be running on it.

    It gets a new epoch, so that cursors of before mean nothing any more, and session numbers go on beyond all that can
    have been handed out since the backup: no number is an identity twice. What was saved since then is still in its
    directories; ``shardbook sync`` brings it back.
    """
    with closing(Database(url, connections=1)) as database, database.write() as connection:
        connection.execute(update(parts).values(last_session=parts.c.last_session + SESSION_GAP))
        connection.execute(update(catalog).values(epoch=os.urandom(16)))
