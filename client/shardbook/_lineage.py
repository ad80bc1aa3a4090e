"""The calls of CatalogService about lineage: where checkpoints come from, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator

from shardbook._targets import resource_name
from shardbook._transport import Rpc, Transport
from shardbook.core.limits import MAX_PAGE_SIZE
from shardbook.core.lineage import LineageKind, check_end
from shardbook.core.names import CheckpointName
from shardbook.errors import InvalidArgumentError
from shardbook.lineage import Lineage, LineageEdge
from shardbook.v1 import lineage_pb2

ADD_LINEAGE = Rpc("AddLineage", lambda on: on.catalog.AddLineage)
REMOVE_LINEAGE = Rpc("RemoveLineage", lambda on: on.catalog.RemoveLineage)
LIST_LINEAGE = Rpc("ListLineage", lambda on: on.catalog.ListLineage)
GET_LINEAGE = Rpc("GetLineage", lambda on: on.catalog.GetLineage)

_DIRECTIONS = {
    "both": lineage_pb2.LINEAGE_DIRECTION_UNSPECIFIED,
    "up": lineage_pb2.LINEAGE_DIRECTION_UP,
    "down": lineage_pb2.LINEAGE_DIRECTION_DOWN,
}


class LineageCalls:
    """Lineage of checkpoints. Every call may be made again: the same again changes nothing. Thread-safe.

    A kind is ``resumed_from``, ``fine_tuned_from``, ``converted_from`` or ``evaluated_by``; a direction is ``up`` (what
    a checkpoint comes from), ``down`` (what came of it, evaluations too) or ``both``.
    """

    _transport: Transport

    def add_lineage(
        self,
        subject: CheckpointName | str,
        kind: LineageKind | str,
        other: CheckpointName | str,
        *,
        deadline_s: float | None = None,
    ) -> LineageEdge:
        """Says that a checkpoint comes from something, or was evaluated by something; returns the edge.

        Args:
            subject: The checkpoint that it is about.
            kind: How it belongs to ``other``.
            other: A checkpoint of any run; or the name of something that is not in the catalogue: words, a path or a
                URL without credentials.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: A checkpoint that is named does not exist.
            FailedPreconditionError: It was never committed (``NOT_COMMITTED``), or the edge would close a cycle
                (``LINEAGE_CYCLE``).
            InvalidArgumentError: An end cannot be one, or the checkpoint has too many edges.
        """
        request = lineage_pb2.AddLineageRequest(subject=resource_name(subject), kind=_kind(kind), object=_end(other))
        return LineageEdge.of(self._transport.write(ADD_LINEAGE, request, deadline_s=deadline_s).edge)

    def remove_lineage(
        self,
        subject: CheckpointName | str,
        kind: LineageKind | str,
        other: CheckpointName | str,
        *,
        deadline_s: float | None = None,
    ) -> bool:
        """Takes an edge back, whoever told it; returns False when there was none.

        Raises:
            NotFoundError: A checkpoint that is named does not exist.
        """
        request = lineage_pb2.RemoveLineageRequest(subject=resource_name(subject), kind=_kind(kind), object=_end(other))
        return self._transport.write(REMOVE_LINEAGE, request, deadline_s=deadline_s).removed

    def list_lineage(
        self,
        name: CheckpointName | str,
        *,
        direction: str = "both",
        page_size: int = MAX_PAGE_SIZE,
        deadline_s: float | None = None,
    ) -> Iterator[LineageEdge]:
        """Yields the edges of a checkpoint itself, in the order in which they were recorded.

        Raises:
            NotFoundError: There is no such checkpoint.
        """
        request = lineage_pb2.ListLineageRequest(
            parent=resource_name(name), direction=_direction(direction), page_size=page_size
        )
        for page in self._transport.pages(LIST_LINEAGE, request, deadline_s=deadline_s):
            yield from map(LineageEdge.of, page.edges)

    def get_lineage(
        self,
        name: CheckpointName | str,
        *,
        direction: str = "both",
        max_depth: int = 0,
        max_edges: int = 0,
        deadline_s: float | None = None,
    ) -> Lineage:
        """Returns all that a checkpoint comes from and all that came of it, in one call.

        Args:
            name: The checkpoint.
            direction: Which way.
            max_depth: How many edges away, at most 100; 10 when 0.
            max_edges: Most edges in each direction, the nearest ones; 1,000 when 0, and at most.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: There is no such checkpoint.
        """
        request = lineage_pb2.GetLineageRequest(
            name=resource_name(name), direction=_direction(direction), max_depth=max_depth, max_edges=max_edges
        )
        return Lineage.of(self._transport.call(GET_LINEAGE, request, deadline_s=deadline_s))


def _kind(kind: LineageKind | str) -> str:
    known = LineageKind.parse(kind) if isinstance(kind, str) else kind
    return f"LINEAGE_KIND_{known.name}"


def _end(other: CheckpointName | str) -> str:
    return str(other if isinstance(other, CheckpointName) else check_end(other, "object"))


def _direction(text: str) -> lineage_pb2.LineageDirection:
    if text not in _DIRECTIONS:
        raise InvalidArgumentError(f"direction is {text!r}, not one of {', '.join(_DIRECTIONS)}", field="direction")
    return _DIRECTIONS[text]
