"""Where checkpoints come from, and what came of them, as the catalogue says it. Frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shardbook._times import datetime_of, rfc3339
from shardbook.core.lineage import LineageKind
from shardbook.v1 import lineage_pb2, types_pb2

Json = dict[str, Any]


@dataclass(frozen=True)
class LineageNode:
    """A checkpoint, or something that has a name only.

    Attributes:
        ref: Short form, ``project/run@1500``; the name of what is not in the catalogue.
        name: Resource name of the checkpoint; empty for what is not in the catalogue.
        state: Such as ``COMMITTED`` or ``DELETED``; empty for what is not in the catalogue.
        create_time: When it was saved; None for what is not in the catalogue.
    """

    ref: str
    name: str
    state: str
    create_time: datetime | None

    @classmethod
    def of(cls, message: lineage_pb2.LineageNode) -> LineageNode:
        """Returns what ``message`` says."""
        state = types_pb2.CheckpointState.Name(message.state) if message.checkpoint else ""
        return cls(
            ref=message.ref,
            name=message.checkpoint,
            state=state.removeprefix("CHECKPOINT_STATE_"),
            create_time=datetime_of(message.create_time),
        )

    @property
    def is_known(self) -> bool:
        """True for a checkpoint of the catalogue."""
        return bool(self.name)

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {**vars(self), "create_time": rfc3339(self.create_time)}


@dataclass(frozen=True)
class LineageEdge:
    """Says that its subject was resumed, fine-tuned or converted from its object, or evaluated by it.

    Attributes:
        kind: ``resumed_from``, ``fine_tuned_from``, ``converted_from`` or ``evaluated_by``.
        subject: What it is about.
        object: The other end.
        create_time: When it was recorded.
        told: A job told it with the checkpoint; False when it was added by hand.
        depth: Edges between it and the checkpoint asked about, 1 or more; 0 where that was not the question.
    """

    kind: str
    subject: LineageNode
    object: LineageNode
    create_time: datetime | None
    told: bool
    depth: int

    @classmethod
    def of(cls, message: lineage_pb2.LineageEdge) -> LineageEdge:
        """Returns what ``message`` says; a kind of a later release by its number."""
        known = {int(one): one.label for one in LineageKind}
        return cls(
            kind=known.get(int(message.kind), str(message.kind)),
            subject=LineageNode.of(message.subject),
            object=LineageNode.of(message.object),
            create_time=datetime_of(message.create_time),
            told=message.told,
            depth=message.depth,
        )

    @property
    def older(self) -> LineageNode:
        """The end that was there first: an evaluation comes after what it measures."""
        return self.subject if self.kind == LineageKind.EVALUATED_BY.label else self.object

    @property
    def younger(self) -> LineageNode:
        """The other one."""
        return self.object if self.kind == LineageKind.EVALUATED_BY.label else self.subject

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            **vars(self),
            "subject": self.subject.to_json(),
            "object": self.object.to_json(),
            "create_time": rfc3339(self.create_time),
        }


@dataclass(frozen=True)
class Lineage:
    """What a checkpoint comes from and what came of it.

    Attributes:
        checkpoint: The checkpoint.
        ancestors: Edges between what it comes from, the nearest first.
        descendants: Edges between what came of it, the nearest first.
        truncated: There is more in one of the directions than was asked for.
        session_begin: An earlier checkpoint of the same session, which says where the session began; None when there
            is none.
    """

    checkpoint: LineageNode
    ancestors: tuple[LineageEdge, ...]
    descendants: tuple[LineageEdge, ...]
    truncated: bool
    session_begin: LineageNode | None

    @classmethod
    def of(cls, message: lineage_pb2.GetLineageResponse) -> Lineage:
        """Returns what ``message`` says."""
        has_begin = message.HasField("session_begin")
        return cls(
            checkpoint=LineageNode.of(message.checkpoint),
            ancestors=tuple(map(LineageEdge.of, message.ancestors)),
            descendants=tuple(map(LineageEdge.of, message.descendants)),
            truncated=message.truncated,
            session_begin=LineageNode.of(message.session_begin) if has_begin else None,
        )

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {
            "checkpoint": self.checkpoint.to_json(),
            "ancestors": [edge.to_json() for edge in self.ancestors],
            "descendants": [edge.to_json() for edge in self.descendants],
            "truncated": self.truncated,
            "session_begin": None if self.session_begin is None else self.session_begin.to_json(),
        }


__all__ = ["Lineage", "LineageEdge", "LineageKind", "LineageNode"]
