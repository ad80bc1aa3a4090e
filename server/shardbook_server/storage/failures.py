"""The drivers' errors, made ours: at the edge of a transaction, in one place."""

from __future__ import annotations

from sqlalchemy import exc

from shardbook.errors import InternalError, ResourceExhaustedError, ShardbookError, UnavailableError

#: Primary result codes of SQLite, https://www.sqlite.org/rescode.html.
_BUSY, _LOCKED, _READONLY, _IOERR, _CORRUPT, _FULL, _CANTOPEN, _NOTADB = 5, 6, 8, 10, 11, 13, 14, 26
_RETRY_S = 0.5


def translate(error: exc.SQLAlchemyError) -> ShardbookError:
    """Returns the error of ours to raise from one of SQLAlchemy's."""
    if isinstance(error, exc.TimeoutError):
        return UnavailableError(
            "no database connection was free in time; try again", reason="DATABASE_BUSY", retry_delay_s=_RETRY_S
        )
    if not isinstance(error, exc.DBAPIError):
        return InternalError(f"database error: {type(error).__name__}")
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if code == _FULL:
        return ResourceExhaustedError("the database's disk is full; free some space", reason="STORAGE_FULL")
    if code in (_BUSY, _LOCKED):
        return UnavailableError(
            "the database is busy with another process; try again", reason="DATABASE_BUSY", retry_delay_s=_RETRY_S
        )
    if code in (_READONLY, _IOERR, _CANTOPEN) or error.connection_invalidated:
        return UnavailableError(
            f"the database cannot be read or written now: {error.orig}",
            reason="DATABASE_UNAVAILABLE",
            retry_delay_s=2 * _RETRY_S,
        )
    if code in (_CORRUPT, _NOTADB):
        return InternalError(f"the database file is damaged: {error.orig}", reason="DATABASE_DAMAGED")
    return InternalError(f"database error: {type(error.orig).__name__}: {error.orig}")
