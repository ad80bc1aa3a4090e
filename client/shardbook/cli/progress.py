"""How far a command is, on standard error: when somebody watches, and only once it takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Timer
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

#: What nobody needs to be told the progress of, seconds.
_SOON_S: Final = 1.0


class _Count(MofNCompleteColumn):
    """How many of how many; nothing for what does not count."""

    def render(self, task: Task) -> Text:
        """Returns the text of the column."""
        return Text() if task.total is None else super().render(task)


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
    unit = TextColumn("{task.fields[unit]}")
    columns = (TextColumn("{task.description}"), BarColumn(), _Count(), unit, TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
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
