"""The bar that ``progress`` shows. Apart from it, because rich takes a while to import and most commands show none."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class _Count(MofNCompleteColumn):
    """How many of how many; nothing for what does not count."""

    def render(self, task: Task) -> Text:
        """Returns the text of the column."""
        return Text() if task.total is None else super().render(task)


def new_bar() -> Progress:
    """Returns a bar on standard error, not started; its tasks have the field ``unit``."""
    unit = TextColumn("{task.fields[unit]}")
    columns = (TextColumn("{task.description}"), BarColumn(), _Count(), unit, TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


__all__ = ["new_bar"]
