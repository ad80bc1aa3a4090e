"""What is said of checkpoints, as requests have it: frozen dataclasses that validate themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from shardbook.core.description import check_labels, check_metrics, check_name, check_note
from shardbook.core.lineage import Origin, check_origins
from shardbook.errors import InvalidArgumentError
from shardbook_server.service import checks

#: Phases that a rank measures, in the order in which registrations have them.
PHASES: Final = ("plan", "write", "register")
#: What an update mask may name.
_PATHS: Final = "labels, metrics, labels.KEY, metrics.NAME, note"


@dataclass(frozen=True)
class Writer:
    """Who and what wrote a checkpoint, as ``shardbook.v1.Writer``; each may be empty."""

    host: str = ""
    user: str = ""
    job_id: str = ""
    client_version: str = ""
    torch_version: str = ""
    git_commit: str = ""


#: Nobody said.
NO_WRITER: Final = Writer()


@dataclass(frozen=True)
class Description:
    """What a coordinator says of a checkpoint when it commits it, as ``shardbook.v1.Description``.

    Attributes:
        labels: By key.
        metrics: By name, finite.
        note: JSON text; empty for none.
        writer: Who and what wrote it.
        origins: Where it comes from, each once.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    writer: Writer = NO_WRITER
    origins: tuple[Origin, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", check_labels(self.labels))
        object.__setattr__(self, "metrics", check_metrics(self.metrics))
        object.__setattr__(self, "note", check_note(self.note))
        object.__setattr__(self, "origins", check_origins(self.origins))
        for one in dataclasses.fields(self.writer):
            checks.check_label(getattr(self.writer, one.name), f"writer.{one.name}")


@dataclass(frozen=True)
class Changes:
    """What is to be said of a checkpoint from now on, as UpdateCheckpoint has it.

    Attributes:
        labels: To set, by key.
        metrics: To set, by name.
        note: JSON text, empty for none any more; None leaves it.
        paths: Of the update mask: ``labels``, ``metrics`` (all of them), ``labels.KEY``, ``metrics.NAME``, ``note``.
    """

    labels: Mapping[str, str]
    metrics: Mapping[str, float]
    note: str
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", check_labels(self.labels, "checkpoint.labels"))
        object.__setattr__(self, "metrics", check_metrics(self.metrics, "checkpoint.metrics"))
        object.__setattr__(self, "note", check_note(self.note, "checkpoint.note"))
        if not self.paths:
            raise InvalidArgumentError(f"an update mask is needed: {_PATHS}", field="update_mask")
        for path in self.paths:
            name, dot, key = path.partition(".")
            if name not in ("labels", "metrics", "note") or (dot and name == "note"):
                raise InvalidArgumentError(f"{path[:80]!a} cannot be changed: {_PATHS}", field="update_mask")
            if dot:
                check_name(key, "update_mask")

    def named(self, what: str, held: Mapping[str, object]) -> set[str] | None:
        """Returns which labels or metrics are set or removed, given those held now; None for none."""
        if what in self.paths:
            return set(held) | set(getattr(self, what))
        return {path.partition(".")[2] for path in self.paths if path.startswith(f"{what}.")}


#: Nothing is said.
NO_DESCRIPTION: Final = Description()
