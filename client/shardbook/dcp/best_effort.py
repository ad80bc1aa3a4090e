"""What may fail without costing a save."""

from __future__ import annotations

import logging
from types import TracebackType

from shardbook.errors import ShardbookError
from shardbook.stores import encodable

_LOG = logging.getLogger(__name__)


class best_effort:  # noqa: N801 - reads as a statement, like contextlib.suppress
    """Runs a block whose failure is a line in the log and nothing else: a look at storage, a word to the others.

    Filesystems and their libraries raise what they like. What neither the operating system nor the service says may be
    a mistake of ours too, so it is logged with its traceback.

    Args:
        doing: What is tried, for the log.
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        """Begins."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Logs what went wrong; returns True when the block's error ends here."""
        if not isinstance(error, Exception):
            return False
        unexpected = not isinstance(error, (OSError, ShardbookError))
        told = encodable(str(error))
        _LOG.warning("could not %s: %s: %s", self._doing, type(error).__name__, told, exc_info=unexpected)
        return True
