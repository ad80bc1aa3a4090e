"""Pages: their sizes, and the signed tokens that say where the next one begins."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import threading
from collections.abc import Sequence
from typing import Final

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError
from shardbook_server.storage import events as event_rows
from shardbook_server.storage.database import Database

#: What a token remembers: where the page before ended.
Position = Sequence[str | int | float]
_MAC_BYTES: Final = 16
_MAX_TOKEN_CHARS: Final = 2048


def page_count(page_size: int) -> int:
    """Returns the items of a page; raises InvalidArgumentError for a negative size. A large one is cut to the limit."""
    if page_size < 0:
        raise InvalidArgumentError("a page size is not negative", field="page_size")
    return min(page_size or limits.DEFAULT_PAGE_SIZE, limits.MAX_PAGE_SIZE)


class Tokens:
    """Makes and reads page tokens. Thread-safe.

    Signed with a key that the database holds, so that every replica reads the others' tokens and nobody makes one up.
    A token is good for the listing it came from: the same call with the same parent and filters.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._key: bytes | None = None
        self._lock = threading.Lock()

    def make(self, listing: Sequence[str], position: Position) -> str:
        """Returns the token that continues ``listing`` behind ``position``."""
        body = json.dumps(list(position), separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._sign(listing, body) + body).decode().rstrip("=")

    def read(self, listing: Sequence[str], token: str) -> list[str | int | float] | None:
        """Returns the position in a token; None for the empty one.

        Raises:
            InvalidArgumentError: It was not made here for this listing.
        """
        if not token:
            return None
        try:
            if len(token) > _MAX_TOKEN_CHARS:
                raise ValueError("too long")
            content = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
            mac, body = content[:_MAC_BYTES], content[_MAC_BYTES:]
            if not hmac.compare_digest(mac, self._sign(listing, body)):
                raise ValueError("another listing, or forged")
            position: list[str | int | float] = json.loads(body)
        except (ValueError, binascii.Error) as error:
            raise InvalidArgumentError(
                "the page token is not one that this listing gave; start again without one",
                reason="INVALID_PAGE_TOKEN",
                field="page_token",
            ) from error
        return position

    def _sign(self, listing: Sequence[str], body: bytes) -> bytes:
        with self._lock:
            if self._key is None:
                with self._database.read() as connection:
                    self._key = event_rows.read_token_key(connection)
        scope = json.dumps(list(listing)).encode()
        return hmac.new(self._key, scope + b"\0" + body, hashlib.sha256).digest()[:_MAC_BYTES]
