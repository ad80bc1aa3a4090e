"""What a failed command says on stderr, and the code it exits with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shardbook.cli.output import plain
from shardbook.errors import (
    AbortedError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ShardbookError,
    StorageError,
    UnauthenticatedError,
    UnavailableError,
)

OK: Final = 0
NEGATIVE: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
UNAVAILABLE: Final = 4
DENIED: Final = 5
#: What a shell reports for a command that Ctrl-C ended.
INTERRUPTED: Final = 130

#: What ``report`` knows how to report.
HANDLED: Final = (ShardbookError, KeyboardInterrupt)

#: Reasons of what was not found on storage; the catalogue is no place to look for it.
_ABOUT_DIRECTORIES: Final = frozenset({"NO_DIRECTORY", "NO_CHECKPOINT", "INCOMPLETE"})

_CODES: Final[tuple[tuple[type[ShardbookError], int], ...]] = (
    (InvalidArgumentError, USAGE),
    (NotFoundError, NOT_FOUND),
    (UnauthenticatedError, DENIED),
    (PermissionDeniedError, DENIED),
    (UnavailableError, UNAVAILABLE),
    (DeadlineExceededError, UNAVAILABLE),
    (ResourceExhaustedError, UNAVAILABLE),
    (InternalError, UNAVAILABLE),
    (FailedPreconditionError, NEGATIVE),
)


def exit_code(error: BaseException) -> int:
    """Returns the exit code for ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    for cls, code in _CODES:
        if isinstance(error, cls):
            return code
    # A status without a class of its own, such as UNIMPLEMENTED: the server is not one this client can use.
    return UNAVAILABLE if type(error) is ShardbookError else NEGATIVE


@contextmanager
def asking_storage() -> Iterator[None]:
    """Ends the command as for a server that does not answer when the storage that it asks does not."""
    try:
        yield
    except StorageError as error:
        report(error)
        raise SystemExit(UNAVAILABLE) from error


def hint(error: BaseException) -> str | None:
    """Returns the next command for ``error``; None where the message already names it, or there is none."""
    if isinstance(error, NotFoundError) and error.reason not in _ABOUT_DIRECTORIES:
        # The server's own advice is the better one: it knows what is there.
        if "`shardbook " in error.message:
            return None
        return "`shardbook runs` lists the runs, `shardbook ls project/run --all` every attempt of one"
    if isinstance(error, UnauthenticatedError | PermissionDeniedError) and error.reason != "STORAGE_DENIED":
        return "set SHARDBOOK_TOKEN to a token that is valid and allows this"
    if isinstance(error, AbortedError) and error.reason == "ETAG_MISMATCH":
        return (
            "`shardbook show REF --json` shows the etag of a checkpoint, `shardbook alias RUN --json` those of aliases"
        )
    if (
        isinstance(error, FailedPreconditionError)
        and error.reason == "NOT_COMMITTED"
        and "`shardbook " not in error.message
    ):
        return "`shardbook status PROJECT/RUN` shows how far saves are that are under way, and what came of others"
    if isinstance(error, InternalError):
        return "this is a bug of Shardbook: please report it with the server's log"
    return None


def report(error: BaseException) -> int:
    """Writes what went wrong to stderr and returns the exit code."""
    if isinstance(error, ShardbookError):
        lines = [f"error: {error.message}"]
        lines += [f"  {violation.field}: {violation.description}" for violation in error.violations[1:]]
        advice = hint(error)
        if advice is not None:
            lines.append(f"try: {advice}")
        sys.stderr.write("\n".join(plain(line) for line in lines) + "\n")
    return exit_code(error)
