"""What does not fit between a checkpoint and the state dict that it is loaded into."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MismatchKind(StrEnum):
    """How an entry of a state dict and one of a checkpoint differ."""

    #: The checkpoint has no entry of this name.
    MISSING = "missing"
    #: The state dict has none.
    UNEXPECTED = "unexpected"
    #: One of them is a tensor and the other is not.
    KIND = "kind"
    SHAPE = "shape"
    DTYPE = "dtype"


@dataclass(frozen=True)
class Mismatch:
    """One entry that does not fit.

    Attributes:
        fqn: Its name; any ``str``, also with NUL and lone surrogates.
        kind: How it differs.
        expected: What the state dict has, such as ``float32 (8, 4)``; empty when it has none.
        found: What the checkpoint has; empty when it has none.
    """

    fqn: str
    kind: MismatchKind
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        if not self.found:
            return f"{self.fqn!a:.200} is not in the checkpoint"
        if not self.expected:
            return f"{self.fqn!a:.200} is in the checkpoint ({self.found}), not in the state dict"
        return f"{self.fqn!a:.200} is {self.expected} in the state dict, {self.found} in the checkpoint"
