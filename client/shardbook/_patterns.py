"""Names of several runs at once: ``llm/*``, ``*/8b-*``."""

from __future__ import annotations

import re
from typing import Final

from shardbook.core.names import RunName, check_segment
from shardbook.errors import InvalidArgumentError

#: Stands for anything in a pattern; the wildcard of the API's parents.
_STAR: Final = "*"
_ALL: Final = "-"
_MAX_STARS: Final = 4
_PATTERN: Final = re.compile(r"(?:projects/)?([^/:@]*)/(?:runs/)?([^/:@]*)")


def is_pattern(text: str) -> bool:
    """Returns True when ``text`` names runs by a pattern."""
    return _STAR in text


def listing_place(run: RunName | str, part: str | None) -> tuple[str, list[str]]:
    """Returns the parent of a listing, and conditions on names that it cannot say.

    Args:
        run: A run, or a pattern of runs.
        part: A part; None for all.

    Raises:
        InvalidArgumentError: Neither names anything.
    """
    last = _ALL if part is None else check_segment(part, "part")
    if isinstance(run, RunName) or not is_pattern(run):
        return f"{run if isinstance(run, RunName) else RunName.parse(run)}/parts/{last}", []
    match = _PATTERN.fullmatch(run)
    if match is None:
        raise InvalidArgumentError(
            f"{run[:300]!a} names no runs: write project/run with * for anything, such as llm/8b-*",
            reason="INVALID_NAME",
            field="run",
        )
    names, conditions = [], []
    for field, text in (("project", match[1]), ("run", match[2])):
        if text == _STAR:
            names.append(_ALL)
            continue
        # What a pattern leaves open might be anything that a name may hold.
        check_segment(text.replace(_STAR, "x"), "run")
        if text.count(_STAR) > _MAX_STARS:
            raise InvalidArgumentError(f"a pattern has at most {_MAX_STARS} stars a name", field="run")
        names.append(_ALL if _STAR in text else text)
        if _STAR in text:
            conditions.append(f'{field} = "{text}"')
    return f"projects/{names[0]}/runs/{names[1]}/parts/{last}", conditions
