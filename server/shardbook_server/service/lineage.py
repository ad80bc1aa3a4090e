"""Lineage: where checkpoints come from, and what came of them. What commits tell is in ``origins``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from shardbook.core import limits
from shardbook.core.lineage import LineageKind, check_end
from shardbook.core.names import CheckpointName
from shardbook.errors import FailedPreconditionError, InvalidArgumentError
from shardbook_server.service import origins, present
from shardbook_server.service.pages import Tokens, page_count
from shardbook_server.service.views import CheckpointState, Page
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import lineage as lineage_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.lineage import LOCK, EdgeRow, Ends


class LineageDirection(IntEnum):
    """Which way to look; numbers as in ``shardbook.v1.LineageDirection``."""

    BOTH = 0
    UP = 1
    DOWN = 2


@dataclass(frozen=True)
class EdgeRequest:
    """An edge as it is asked for, as ``shardbook.v1.AddLineageRequest``.

    Attributes:
        subject: Name or ref of the checkpoint that it is about.
        kind: How the checkpoint belongs to the object.
        object: Name or ref of a checkpoint, or the name of something else.
    """

    subject: str
    kind: LineageKind
    object: str

    def __post_init__(self) -> None:
        CheckpointName.parse(self.subject, "subject")
        check_end(self.object, "object")


@dataclass(frozen=True)
class NodeInfo:
    """An end of an edge; ``checkpoint`` is empty, and ``ref`` a name, for what is not in the catalogue."""

    checkpoint: str
    ref: str
    state: CheckpointState | None = None
    create_time_us: int | None = None


@dataclass(frozen=True)
class EdgeInfo:
    """An edge as it is answered; ``depth`` is 0 where no walk led to it."""

    id: int
    kind: LineageKind
    subject: NodeInfo
    object: NodeInfo
    create_time_us: int
    told: bool
    depth: int = 0


@dataclass(frozen=True)
class LineageInfo:
    """What a checkpoint comes from and what came of it, the nearest first."""

    checkpoint: NodeInfo
    ancestors: tuple[EdgeInfo, ...]
    descendants: tuple[EdgeInfo, ...]
    truncated: bool
    session_begin: NodeInfo | None


class LineageService:
    """Adds, removes and follows edges. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps nothing but the key of the page tokens."""
        self._database = database
        self._tokens = Tokens(database)

    def add(self, request: EdgeRequest) -> EdgeInfo:
        """Adds an edge, or returns the one that is there.

        Raises:
            NotFoundError: A checkpoint that is named does not exist.
            FailedPreconditionError: One was never committed (``NOT_COMMITTED``), or the edge would close a cycle
                (``LINEAGE_CYCLE``).
            InvalidArgumentError: The subject has too many edges (``LIMIT_EXCEEDED``).
        """
        with self._database.write(lock=LOCK) as connection:
            ends = _ends(connection, request)
            edge = lineage_rows.find_edge(connection, ends)
            if edge is None:
                _check_room(connection, ends, request.kind)
                _check_no_cycle(connection, ends, request)
                edge = _linked(connection, ends)
            if edge is None:
                edge = lineage_rows.insert_edge(connection, ends, None, self._database.now_us(connection))
            return _infos(connection, [(edge, 0)])[0]

    def remove(self, request: EdgeRequest) -> bool:
        """Removes an edge; returns whether it was there.

        Raises:
            NotFoundError: A checkpoint that is named does not exist.
            FailedPreconditionError: One was never committed (``NOT_COMMITTED``).
        """
        with self._database.write(lock=LOCK) as connection:
            return lineage_rows.delete_edge(connection, _ends(connection, request, may_be_named=True))

    def list(
        self,
        parent: str,
        *,
        direction: LineageDirection = LineageDirection.BOTH,
        page_size: int = 0,
        page_token: str = "",
    ) -> Page[EdgeInfo]:
        """Returns one page of the edges of a checkpoint itself, in the order in which they were recorded.

        Raises:
            NotFoundError: There is no such checkpoint.
            InvalidArgumentError: The name, page size or token is not valid.
        """
        name = CheckpointName.parse(parent, "parent")
        listing = ("lineage", parent, str(int(direction)))
        count = page_count(page_size)
        position = self._tokens.read(listing, page_token)
        up, down = _ways(direction)
        with self._database.read() as connection:
            # The first page says which checkpoint an alias meant.
            checkpoint_id = present.resolve(connection, name) if position is None else int(position[1])
            after = 0 if position is None else int(position[0])
            rows = lineage_rows.page_of_edges(connection, checkpoint_id, up=up, down=down, after=after, count=count + 1)
            items = _infos(connection, [(row, 0) for row in rows[:count]])
        token = self._tokens.make(listing, (rows[count - 1].id, checkpoint_id)) if len(rows) > count else ""
        return Page(tuple(items), token)

    def get(
        self,
        name: str,
        *,
        direction: LineageDirection = LineageDirection.BOTH,
        max_depth: int = 0,
        max_edges: int = 0,
    ) -> LineageInfo:
        """Returns what a checkpoint comes from and what came of it, directly or not.

        Args:
            name: The checkpoint.
            direction: Which way.
            max_depth: How many edges away; 10 when 0.
            max_edges: Most edges in each direction; 1,000 when 0.

        Raises:
            NotFoundError: There is no such checkpoint.
            InvalidArgumentError: The name or a limit is not valid.
        """
        parsed = CheckpointName.parse(name, "name")
        depth = _bounded(max_depth, limits.DEFAULT_LINEAGE_DEPTH, limits.MAX_LINEAGE_DEPTH, "max_depth")
        most = _bounded(max_edges, limits.MAX_LINEAGE_SHOWN, limits.MAX_LINEAGE_SHOWN, "max_edges")
        with self._database.read() as connection:
            row = checkpoint_rows.find_by_id(connection, present.resolve(connection, parsed))
            walks = [
                lineage_rows.walk(connection, row.id, up=up, max_depth=depth, limit=most) if wanted else ([], False)
                for up, wanted in zip((True, False), _ways(direction), strict=True)
            ]
            begin_id = lineage_rows.session_begin(connection, row.part_id, row.incarnation, row.step)
            nodes = _nodes(connection, [row.id] if begin_id is None else [row.id, begin_id])
            (above, more_above), (below, more_below) = walks
            return LineageInfo(
                nodes[row.id],
                tuple(_infos(connection, above)),
                tuple(_infos(connection, below)),
                more_above or more_below,
                None if begin_id in (None, row.id) else nodes[begin_id],
            )


def _ways(direction: LineageDirection) -> tuple[bool, bool]:
    return direction is not LineageDirection.DOWN, direction is not LineageDirection.UP


def _bounded(value: int, default: int, largest: int, field: str) -> int:
    if not 0 <= value <= largest:
        raise InvalidArgumentError(f"{value} is not between 0 and {largest}", reason="LIMIT_EXCEEDED", field=field)
    return value or default


def _ends(connection: Connection, request: EdgeRequest, *, may_be_named: bool = False) -> Ends:
    """Returns the edge that a request means; raises where a checkpoint that it names is none of the catalogue's.

    With ``may_be_named`` the object may be one that an edge knows by name alone.
    """
    subject = _known(connection, CheckpointName.parse(request.subject, "subject"), "subject")
    meant = check_end(request.object, "object")
    older: int | None
    older, name = None, ""
    if not isinstance(meant, CheckpointName):
        name = meant
    elif not (may_be_named and lineage_rows.find_edge(connection, Ends(request.kind, None, subject, str(meant)))):
        older = _known(connection, meant, "object")
    else:
        name = str(meant)
    if request.kind is LineageKind.EVALUATED_BY:
        # What measures a checkpoint comes after it.
        return Ends(request.kind, subject, older, name)
    return Ends(request.kind, older, subject, name)


def _linked(connection: Connection, ends: Ends) -> EdgeRow | None:
    """Returns the same edge where it knew its older end by name alone, now linked to it; None when there is none."""
    if ends.parent_id is None or ends.child_id is None:
        return None
    row = checkpoint_rows.find_by_id(connection, ends.parent_id)
    names = origins.names_of(run_rows.part_by_id(connection, row.part_id).name, row)
    for edge in lineage_rows.find_named(connection, names):
        if (edge.ends.child_id, edge.ends.kind) == (ends.child_id, ends.kind):
            lineage_rows.link(connection, edge.id, ends.parent_id)
            return replace(edge, ends=ends)
    return None


def _known(connection: Connection, name: CheckpointName, field: str) -> int:
    checkpoint_id = present.resolve(connection, name)
    row = checkpoint_rows.find_by_id(connection, checkpoint_id)
    if row.state not in origins.KNOWN:
        raise FailedPreconditionError(
            f"{name.ref} is {CheckpointState(row.state).name}, not COMMITTED", reason="NOT_COMMITTED", field=field
        )
    return checkpoint_id


def _check_room(connection: Connection, ends: Ends, kind: LineageKind) -> None:
    """Refuses more edges about one subject than are kept; what others say about it is not counted."""
    column = "parent_id" if kind is LineageKind.EVALUATED_BY else "child_id"
    about = ends.parent_id if kind is LineageKind.EVALUATED_BY else ends.child_id
    count = 0 if about is None else lineage_rows.count_edges(connection, column, about, kind)
    if count >= limits.MAX_LINEAGE_EDGES:
        raise InvalidArgumentError(
            f"the checkpoint has {count} such edges, the limit is {limits.MAX_LINEAGE_EDGES}",
            reason="LIMIT_EXCEEDED",
            field="subject",
        )


def _ref(name: str) -> str:
    """Returns the short form of what means a checkpoint."""
    return CheckpointName.parse(name).ref


def _check_no_cycle(connection: Connection, ends: Ends, request: EdgeRequest) -> None:
    if ends.parent_id is None or ends.child_id is None:
        return
    if ends.parent_id == ends.child_id:
        raise FailedPreconditionError(
            f"{_ref(request.subject)} and {_ref(request.object)} are the same checkpoint",
            reason="LINEAGE_CYCLE",
            field="object",
        )
    found = lineage_rows.ancestors(connection, ends.parent_id, limits.MAX_ANCESTORS)
    if ends.child_id in found:
        older, younger = _ref(request.object), _ref(request.subject)
        if request.kind is LineageKind.EVALUATED_BY:
            older, younger = younger, older
        raise FailedPreconditionError(
            f"{older} comes from {younger} itself, so the edge would close a cycle; `shardbook lineage {older} --up` "
            "shows how",
            reason="LINEAGE_CYCLE",
            field="object",
        )
    if len(found) > limits.MAX_ANCESTORS:
        raise InvalidArgumentError(
            f"{_ref(request.object)} comes from more than {limits.MAX_ANCESTORS} checkpoints, the limit",
            reason="LIMIT_EXCEEDED",
            field="object",
        )


def _nodes(connection: Connection, ids: Iterable[int]) -> dict[int, NodeInfo]:
    found = {}
    for checkpoint_id, listed in checkpoint_rows.find_listed(connection, sorted(set(ids))).items():
        info = present.checkpoint_of(listed)
        found[checkpoint_id] = NodeInfo(info.name, info.ref, info.state, info.create_time_us)
    return found


def _infos(connection: Connection, edges: list[tuple[EdgeRow, int]]) -> list[EdgeInfo]:
    ids = {end for edge, _ in edges for end in (edge.ends.parent_id, edge.ends.child_id) if end is not None}
    nodes = _nodes(connection, ids)
    infos = []
    for edge, depth in edges:
        ends, kind = edge.ends, LineageKind(edge.ends.kind)
        older, younger = (_node(nodes, end, ends.name) for end in (ends.parent_id, ends.child_id))
        subject, other = (older, younger) if kind is LineageKind.EVALUATED_BY else (younger, older)
        told = edge.incarnation is not None
        infos.append(EdgeInfo(edge.id, kind, subject, other, edge.create_time_us, told, depth))
    return infos


def _node(nodes: dict[int, NodeInfo], checkpoint_id: int | None, name: str) -> NodeInfo:
    if checkpoint_id is not None:
        return nodes[checkpoint_id]
    meant = check_end(name, "name")
    return NodeInfo("", meant.ref if isinstance(meant, CheckpointName) else meant)
