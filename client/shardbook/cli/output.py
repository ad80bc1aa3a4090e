"""Tables for people, JSON for programs. Everything goes to stdout; errors are in ``failures``.

With ``--json`` a command prints one object. Its keys are only ever added, see ``docs/cli.md``. Names may hold any
character, also ones that move a cursor or are no valid Unicode: JSON escapes them, tables show them escaped.

rich is imported with the first line that is drawn: neither ``--json`` nor a shell that completes waits for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

#: Width of tables that no terminal shows: wide enough that nothing is cut or wrapped on its way into a pipe.
_PIPE_WIDTH: Final = 4096
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
#: Blanks between columns.
_GAP: Final = 2
#: Least width of a column whose text may be folded.
_FOLDED_WIDTH: Final = 24
_DASH: Final = "-"


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object, ASCII only: readable for every parser in every locale."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def print_json_line(value: dict[str, Any]) -> None:
    """Prints one JSON object on one line, ASCII only: for what has no end."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, allow_nan=False) + "\n")


def print_table(
    columns: Sequence[tuple[str, bool]],
    rows: Iterable[Sequence[str]],
    *,
    expendable: Sequence[str] = (),
    folded: Sequence[str] = (),
    is_plain: bool = False,
) -> None:
    """Prints rows under a header. Cells are never broken, so that names can be copied: the terminal wraps long lines.

    Args:
        columns: Header and True for numbers, which stand right.
        rows: Cells as text; shown as they are, never as markup.
        expendable: Headers of columns to leave out, the first one first, until the rest fits the terminal.
        folded: Headers of columns of prose, which goes on below where the terminal is too narrow.
        is_plain: Print as off a terminal, whatever shows it.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    console = _console(is_plain=is_plain)
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = {
        header: max([cell_len(header), *(cell_len(row[at]) for row in cells)]) for at, (header, _) in enumerate(columns)
    }
    for header in folded:
        widths[header] = min(widths[header], _FOLDED_WIDTH)
    for header in expendable:
        if _line_width(widths) > console.width:
            del widths[header]
    console.width = max(console.width, _line_width(widths))
    shown = [at for at, (header, _) in enumerate(columns) if header in widths]
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for at in shown:
        header, number = columns[at]
        table.add_column(header, justify="right" if number else "left", overflow="fold", no_wrap=header not in folded)
    for row in cells:
        table.add_row(*(Text(row[at]) for at in shown))
    console.print(table)


def _line_width(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)


def print_facts(facts: Iterable[tuple[str, str]], *, is_plain: bool = False) -> None:
    """Prints names and values, one a line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(plain(value)))
    _console(is_plain=is_plain).print(table)


def print_tree(tree: Tree) -> None:
    """Prints a tree for people; its labels are ``Text``, made of what ``plain`` returns."""
    console = _console()
    console.print(tree, soft_wrap=True)


def print_line(text: str, *, is_plain: bool = False) -> None:
    """Prints one line for people."""
    from rich.text import Text

    _console(is_plain=is_plain).print(Text(plain(text)), soft_wrap=True)


def print_error(text: str) -> None:
    """Prints one line on standard error."""
    sys.stderr.write(plain(text) + "\n")


def _console(*, is_plain: bool = False) -> Console:
    from rich.console import Console

    if is_plain or not sys.stdout.isatty():
        # Off a terminal rich would wrap at 80 columns.
        return Console(highlight=False, width=_PIPE_WIDTH, color_system=None if is_plain else "auto")
    # Rich takes NO_COLOR to mean colours only; who sets it wants no escape sequences at all.
    return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


def plain(text: str) -> str:
    """Returns ``text`` on one line, with everything escaped that would not print."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def size(size_bytes: int) -> str:
    """Returns a size in binary units: ``1.4 GiB``."""
    value = float(size_bytes)
    for unit in _UNITS:
        if value < 1023.95 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def count(number: int) -> str:
    """Returns a count with thousands apart: ``2,812,800``."""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Returns so many of something: ``1 file``, ``2,048 files``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def number(value: float) -> str:
    """Returns a number short where that says all of it: ``1.87``, ``1e-05``; else in full, ``123456789012``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value).removesuffix(".0")


def time(stamp: datetime | None) -> str:
    """Returns a time in UTC to the second: ``2026-11-23 09:30:00Z``; a dash for none."""
    return _DASH if stamp is None else stamp.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def table_time(stamp: datetime | None) -> str:
    """Returns a time for a table: to the minute on a terminal, where width is dear, to the second elsewhere."""
    if stamp is None or not sys.stdout.isatty():
        return time(stamp)
    return stamp.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")


def or_dash(text: str) -> str:
    """Returns ``text``, a dash when it is empty."""
    return text or _DASH
