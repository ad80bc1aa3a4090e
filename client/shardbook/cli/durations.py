"""Durations as people write them: ``90s``, ``30m``, ``2h``, ``1d12h``."""

from __future__ import annotations

import math
import re
from typing import Final

import typer

_UNITS: Final = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION: Final = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in _UNITS))
#: From here on seconds are told as whole ones.
_WHOLE_S: Final = 10.0


def option(text: str) -> float:
    """Returns the seconds of an option's value; raises typer.BadParameter when it is no duration."""
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def parse(text: str) -> float:
    """Returns the seconds of a duration; raises ValueError when it is none."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"{text!r} is no duration: write 90s, 30m, 2h or 1d12h")
    seconds = sum(float(part) * unit for part, unit in zip(match.groups(), _UNITS.values(), strict=True) if part)
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is no duration: it is too long")
    return seconds


def told(seconds: float) -> str:
    """Returns a duration for people, its two largest units: ``1.4s``, ``2m 5s``, ``3h 20m``, ``4d 1h``."""
    if seconds < _WHOLE_S:
        return f"{seconds:.1f}s"
    left = round(seconds)
    parts: list[str] = []
    for name, unit in _UNITS.items():
        count, left = divmod(left, int(unit))
        if count or parts:
            parts.append(f"{count}{name}")
    return " ".join(part for part in parts[:2] if not part.startswith("0"))


__all__ = ["option", "parse", "told"]
