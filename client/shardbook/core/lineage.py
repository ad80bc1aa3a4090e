"""Where checkpoints come from: kinds of lineage, and what may stand at the other end. Both sides check the same.

An edge is about its subject: *subject* was resumed from *object*, or evaluated by it. The object is a checkpoint of
the catalogue, or something that has a name only: a model of another hub, a path, an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from shardbook.core import limits
from shardbook.core.names import CheckpointName, is_ref
from shardbook.core.uris import credentials_in
from shardbook.errors import InvalidArgumentError


class LineageKind(IntEnum):
    """How a checkpoint belongs to something else; numbers as in ``shardbook.v1.LineageKind`` and in the database."""

    #: Training went on from it.
    RESUMED_FROM = 1
    #: Another training began with its weights.
    FINE_TUNED_FROM = 2
    #: The same model in another form.
    CONVERTED_FROM = 3
    #: It was measured by it.
    EVALUATED_BY = 4

    @property
    def label(self) -> str:
        """Its name in arguments and JSON: ``resumed_from``."""
        return self.name.lower()

    @property
    def words(self) -> str:
        """Its name for people: ``resumed from``."""
        return self.label.replace("_", " ")

    @classmethod
    def parse(cls, text: str, field: str = "kind") -> LineageKind:
        """Returns the kind that ``resumed_from``, ``resumed-from`` or ``resumed from`` names.

        Raises:
            InvalidArgumentError: It names none.
        """
        try:
            return cls[text.strip().replace("-", "_").replace(" ", "_").upper()]
        except KeyError:
            known = ", ".join(one.label.replace("_", "-") for one in cls)
            raise InvalidArgumentError(f"{text[:80]!a} is no kind of lineage: {known}", field=field) from None


#: Kinds whose object is the older of the two; an evaluation comes after what it measures.
ORIGIN_KINDS: Final = (LineageKind.RESUMED_FROM, LineageKind.FINE_TUNED_FROM, LineageKind.CONVERTED_FROM)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from, as its job was told. Picklable.

    Attributes:
        kind: One of ``ORIGIN_KINDS``.
        source: Resource name of a checkpoint, or the name of what is not in the catalogue.

    Raises:
        InvalidArgumentError: It cannot be recorded; the field names the attribute.
    """

    kind: LineageKind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ORIGIN_KINDS:
            known = ", ".join(one.label for one in ORIGIN_KINDS)
            raise InvalidArgumentError(f"an origin is one of {known}", field="kind")
        object.__setattr__(self, "source", str(check_end(self.source, "source")))


def check_end(text: str, field: str) -> CheckpointName | str:
    """Returns what an end of an edge means: a checkpoint for a name or ref of one, else the name as it is.

    Raises:
        InvalidArgumentError: It can be neither. What might hold credentials is not repeated.
    """
    if text.startswith("projects/") and "/checkpoints/" in text:
        return CheckpointName.parse(text, field)
    if is_ref(text):
        try:
            return CheckpointName.parse(text, field)
        except InvalidArgumentError:
            pass  # such as a path with an @ in it
    if not text.strip():
        raise InvalidArgumentError("name a checkpoint, or what else it is", field=field)
    if not text.isprintable():
        raise InvalidArgumentError(f"{text[:80]!a} has control or formatting characters", field=field)
    size_bytes = len(text.encode())
    if size_bytes > limits.MAX_LINEAGE_NAME_BYTES:
        raise InvalidArgumentError(
            f"a name of {size_bytes} bytes, the limit is {limits.MAX_LINEAGE_NAME_BYTES}",
            reason="LIMIT_EXCEEDED",
            field=field,
        )
    if any("://" in word and credentials_in(word) for word in text.split()):
        raise InvalidArgumentError(
            "a URL with a user, a password or a signature is not kept: leave them out",
            reason="CREDENTIALS",
            field=field,
        )
    return text


def check_origins(origins: Sequence[Origin], field: str = "origins") -> tuple[Origin, ...]:
    """Returns origins, each once.

    Raises:
        InvalidArgumentError: There are too many.
    """
    distinct = tuple(dict.fromkeys(origins))
    if len(distinct) > limits.MAX_ORIGINS:
        raise InvalidArgumentError(
            f"{len(distinct)} origins, the limit is {limits.MAX_ORIGINS}", reason="LIMIT_EXCEEDED", field=field
        )
    return distinct


def pack_origins(origins: Iterable[Origin]) -> list[list[str]]:
    """Returns origins as JSON in records and manifests holds them."""
    return [[one.kind.label, one.source] for one in origins]


def unpack_origins(packed: Any) -> tuple[Origin, ...]:
    """Returns the origins in ``packed``; one that is damaged, or of a kind of a later release, is left out.

    What else is said of a checkpoint counts without them.
    """
    found = []
    for one in packed if isinstance(packed, list) else []:
        try:
            kind, source = one
            found.append(Origin(LineageKind.parse(kind), source))
        except (InvalidArgumentError, TypeError, ValueError, AttributeError):
            continue
    return tuple(dict.fromkeys(found))[: limits.MAX_ORIGINS]


__all__ = [
    "ORIGIN_KINDS",
    "LineageKind",
    "Origin",
    "check_end",
    "check_origins",
    "pack_origins",
    "unpack_origins",
]
