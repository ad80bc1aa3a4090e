"""The drivers' errors, made ours: at the edge of a transaction, in one place."""

from __future__ import annotations

from typing import Final

from sqlalchemy import exc

from shardbook.errors import InternalError, ShardbookError, UnavailableError
from shardbook_server.storage.backend import Backend

#: Told to clients that met a database which is away or busy, seconds.
RETRY_S: Final = 0.5


def translate(error: exc.SQLAlchemyError, backend: Backend) -> ShardbookError:
    """Returns the error of ours to raise from one of SQLAlchemy's."""
    if isinstance(error, exc.TimeoutError):
        return UnavailableError(
            "no database connection was free in time; try again", reason="DATABASE_BUSY", retry_delay_s=RETRY_S
        )
    if not isinstance(error, exc.DBAPIError) or error.orig is None:
        return InternalError(f"database error: {type(error).__name__}")
    found = backend.translate(error.orig)
    if found is not None:
        return found
    if error.connection_invalidated:
        return UnavailableError(
            f"the connection to the database was lost: {error.orig}",
            reason="DATABASE_UNAVAILABLE",
            retry_delay_s=RETRY_S,
        )
    return InternalError(f"database error: {type(error.orig).__name__}: {error.orig}")
