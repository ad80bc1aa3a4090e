"""Writes of the catalogue, once however often they are made: by the ids that callers give their requests (AIP-155).

What has a natural key needs none of this: sessions, plans, registrations, commits, claims.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Final

from shardbook.core.columns import frame, unframe
from shardbook.errors import InvalidArgumentError
from shardbook_server.storage import requests as rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.requests import RequestKey

#: How long a request is remembered at least, seconds.
REMEMBERED_S: Final = 86_400.0
#: Requests forgotten in one transaction, about.
_DROP_COUNT: Final = 1_000


class RequestService:
    """Makes a write once. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps no state of its own."""
        self._database = database

    def once(self, key: RequestKey, content_digest: bytes, write: Callable[[], bytes]) -> bytes:
        """Returns what ``write`` answers, or answered when the same request was made before.

        Whatever it writes by way of the database is part of the transaction that remembers the request: both happen, or
        neither. The same request at the same time, on another replica too, waits for the first one.

        Args:
            key: Who asks what.
            content_digest: SHA-256 of what is asked, without the id.
            write: Writes, and returns the serialized answer. What it raises is not remembered.

        Raises:
            InvalidArgumentError: The id was used for something else (``REQUEST_ID_REUSED``).
        """
        with self._database.transaction() as connection:
            made = rows.begin(connection, key, content_digest, self._database.now_us(connection))
            if made is None:
                answer = write()
                rows.put_answer(connection, key, frame(answer))
                return answer
        if made.content_digest != content_digest:
            raise InvalidArgumentError(
                "another request was made with this id: take a new one for each request, and the same one only to make "
                "the same request again",
                reason="REQUEST_ID_REUSED",
                field="request_id",
            )
        return unframe(made.answer)

    def forget_old(self, age_us: int) -> int:
        """Forgets requests older than ``age_us``; returns how many."""
        total = 0
        while True:
            with self._database.write(lock="requests") as connection:
                count = rows.drop_before(connection, self._database.now_us(connection) - age_us, _DROP_COUNT)
            total += count
            if count < _DROP_COUNT:
                return total


def parse_request_id(text: str) -> bytes:
    """Returns the id of a request, 16 bytes; raises InvalidArgumentError."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        found = uuid.UUID(int=0)
    # UUID also reads other spellings, and a nil one is what a program sends that forgot to draw it.
    if not found.int or str(found) != text.lower():
        raise InvalidArgumentError(
            f"{text[:80]!a} is no request id: a random UUID such as 3f1d7a2e-9c40-4a8e-8f5b-0f6f2f1f9a11",
            field="request_id",
        )
    return found.bytes
