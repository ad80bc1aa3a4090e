"""A process of the writers' test: four threads that increment one number through write transactions."""

from __future__ import annotations

import sys
import threading

from sqlalchemy import text

from shardbook.core.names import RunName
from shardbook_server.storage.database import Database

THREADS, ROUNDS = 4, 20
#: Whose lock they take: what keeps writers apart where BEGIN alone does not.
RUN = RunName("llm", "8b")


def increment(database: Database, failures: list[BaseException]) -> None:
    """Reads the number, then writes the next one: what loses updates when both are not one transaction."""
    try:
        for _ in range(ROUNDS):
            with database.write([RUN]) as connection:
                number = connection.execute(text("SELECT cursor FROM catalog")).scalar_one()
                connection.execute(text("UPDATE catalog SET cursor = :next"), {"next": number + 1})
    except BaseException as error:  # noqa: BLE001 - the main thread tells
        failures.append(error)


def main(url: str) -> None:
    """Runs the threads; exits with 1 and the errors when one failed."""
    database = Database(url)
    failures: list[BaseException] = []
    threads = [threading.Thread(target=increment, args=(database, failures)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()
    if failures:
        sys.exit("\n".join(map(repr, failures)))


if __name__ == "__main__":
    main(sys.argv[1])
