"""The catalogue's cursor: events in order, none lost."""

from __future__ import annotations

import threading

from sqlalchemy import text

from shardbook_server.storage import events
from shardbook_server.storage.database import Database
from shardbook_server.storage.events import Event, EventKind


def test_events_are_numbered_in_the_order_they_appear(database: Database) -> None:
    """A poller that has seen cursor n never finds a smaller one later: writers of events follow each other."""
    seen: list[int] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set() or not seen or seen[-1] < 60:
            with database.read() as connection:
                found = events.read_after(connection, seen[-1] if seen else 0, 100)
            seen.extend(stored.cursor for stored in found)

    def write(part_id: int) -> None:
        for at in range(20):
            with database.write() as connection:
                events.append(connection, [Event(EventKind.COMMITTED, part_id, at)], 1)

    poller = threading.Thread(target=poll)
    poller.start()
    writers = [threading.Thread(target=write, args=(part_id,)) for part_id in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    poller.join(timeout=30)
    assert list(range(1, 61)) == seen


def test_events_of_one_transaction_keep_their_order(database: Database) -> None:
    """And an event of a transaction that failed leaves no gap."""
    news = [Event(kind, 1, 2) for kind in EventKind]
    with database.write() as connection:
        events.append(connection, news, 7)
        events.append(connection, [], 8)
    try:
        with database.write() as connection:
            events.append(connection, news, 9)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    with database.write() as connection:
        events.append(connection, news[:1], 10)
    with database.read() as connection:
        stored = events.read_after(connection, 0, 100)
        cursor = connection.execute(text("SELECT cursor FROM catalog")).scalar_one()
    assert [*news, news[0]] == [one.event for one in stored]
    assert list(range(1, cursor + 1)) == [one.cursor for one in stored]
