"""How far a command is, on standard error: when somebody watches, and only once it takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Timer
from typing import Final

#: What nobody needs to be told the progress of, seconds.
_SOON_S: Final = 1.0


@contextmanager
def shown(what: str, *, is_wanted: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """Yields what hears how many of how many are done, and of what, from any thread; takes it away at the end.

    Args:
        what: What is being done, for people.
        is_wanted: False shows nothing.
    """
    if not (is_wanted and sys.stderr.isatty()):
        yield lambda _done, _total, _unit: None
        return
    from shardbook.cli.bars import new_bar

    bar = new_bar()
    task = bar.add_task(what, total=None, unit="")
    lock, has_ended = Lock(), False

    def start() -> None:
        with lock:
            if not has_ended:
                bar.start()

    timer = Timer(_SOON_S, start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done, total, unit: bar.update(task, completed=done, total=total, unit=unit)
    finally:
        timer.cancel()
        with lock:
            has_ended = True
        bar.stop()


__all__ = ["shown"]
