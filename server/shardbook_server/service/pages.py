"""Pages of listings: sizes, and tokens that say where the next page begins.

A token is signed with a key of the database, so that any replica takes it and nobody can make one up; it is bound
to the listing and its arguments, so that a token of one listing is not taken for another's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError
from shardbook_server.service.views import Page

Row = TypeVar("Row")
Item = TypeVar("Item")
#: Where a page ends: the sort key of its last row.
Position = tuple[int | str, ...]

_MAC_BYTES: Final = 16


def check_page_size(page_size: int) -> int:
    """Returns the rows of a page: the default for 0, at most the limit.

    Raises:
        InvalidArgumentError: It is negative.
    """
    if page_size < 0:
        raise InvalidArgumentError(f"page_size is {page_size}", field="page_size")
    return min(page_size or limits.DEFAULT_PAGE_SIZE, limits.MAX_PAGE_SIZE)


def write_token(key: bytes, listing: Sequence[str], position: Position) -> str:
    """Returns the token of the page behind ``position`` of a listing, named with its arguments."""
    content = json.dumps([list(listing), list(position)], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_mac(key, content) + content).decode()


def read_token(key: bytes, listing: Sequence[str], token: str) -> Position | None:
    """Returns where the page of ``token`` begins; None for the first.

    Raises:
        InvalidArgumentError: The token was not made here, or for another listing.
    """
    if not token:
        return None
    try:
        signed = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
    except ValueError:
        raise _invalid() from None
    mac, content = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(key, content)):
        raise _invalid()
    made_for, position = json.loads(content)
    if made_for != list(listing):
        raise _invalid("it belongs to another listing")
    return tuple(position)


def page_of(
    key: bytes,
    listing: Sequence[str],
    rows: Sequence[Row],
    size: int,
    *,
    position: Callable[[Row], Position],
    item: Callable[[Row], Item],
) -> Page[Item]:
    """Returns a page of the first ``size`` of ``rows``, which are one more than that where another page follows."""
    shown = rows[:size]
    token = write_token(key, listing, position(shown[-1])) if len(rows) > size else ""
    return Page(tuple(item(row) for row in shown), token)


def _mac(key: bytes, content: bytes) -> bytes:
    return hmac.new(key, content, hashlib.sha256).digest()[:_MAC_BYTES]


def _invalid(why: str = "it is damaged") -> InvalidArgumentError:
    return InvalidArgumentError(
        f"page_token is not valid, {why}: ask for the first page", reason="INVALID_PAGE_TOKEN", field="page_token"
    )
