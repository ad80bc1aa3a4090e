"""Which training step a checkpoint directory is of, where nobody says it."""

from __future__ import annotations

import os
import re
from typing import Final

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError

_DIGITS: Final = re.compile(r"[0-9]+")


def step_of(step: object, path: str | os.PathLike[str]) -> int:
    """Returns the step of a save: as given, else the last group of digits in the last component of its path.

    Raises:
        InvalidArgumentError: Neither says one.
    """
    if step is not None:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= limits.INT64_MAX:
            raise InvalidArgumentError(f"step is {step!r}, not an integer of 0 or more", field="step")
        return step
    groups = _DIGITS.findall(os.fspath(path).rstrip("/").rpartition("/")[2])
    if not groups or int(groups[-1]) > limits.INT64_MAX:
        raise InvalidArgumentError(
            f"which step is {os.fspath(path)!r}? pass step=, or end the path with it, as in step-1500",
            reason="NO_STEP",
            field="step",
        )
    return int(groups[-1])


__all__ = ["step_of"]
