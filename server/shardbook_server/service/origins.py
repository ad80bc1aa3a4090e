"""What commits tell of where their checkpoints come from. Nothing of it is a reason to refuse a commit.

Inside the transaction that commits, under the run's lock; see decision 0033.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shardbook.core import limits
from shardbook.core.lineage import Origin, check_end
from shardbook.core.names import CheckpointId, CheckpointName, PartName
from shardbook.errors import ShardbookError
from shardbook_server.service import present
from shardbook_server.service.views import CheckpointState
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import lineage as lineage_rows
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection
from shardbook_server.storage.lineage import Ends

_LOG = logging.getLogger(__name__)

#: States of checkpoints that lineage may name.
KNOWN = frozenset({CheckpointState.COMMITTED, CheckpointState.DELETED})


def lock_for_commit(connection: Connection, part: PartName, row: CheckpointRow, origins: Sequence[Origin]) -> bool:
    """Takes the lock of lineage where a commit may add or link edges, and returns whether it did.

    Before any row is written, so that nobody waits twice. Most commits add none, and wait for nobody.
    """
    may_link = bool(origins or lineage_rows.find_named(connection, names_of(part, row)))
    if may_link:
        lineage_rows.lock(connection)
    return may_link


def tell(
    connection: Connection, row: CheckpointRow, origins: Sequence[Origin], now_us: int, *, recovered: bool
) -> None:
    """Records where a checkpoint comes from that is about to be committed, before it takes the place of another.

    What a session has told with an earlier checkpoint is not told again: a job says it with every save until it hears
    that one was committed, and saves that were recorded afterwards come in any order. What an alias meant
    when such a save was made nobody knows any more, so it stays a name.
    """
    for origin in origins:
        ends = _ends(connection, row, origin, recovered=recovered)
        if ends.parent_id is not None and closes_cycle(connection, ends.parent_id, row.id):
            _LOG.warning("checkpoint %d: its origin %s would close a cycle, and is left out", row.id, origin.source)
            continue
        is_told = lineage_rows.is_told(connection, row.part_id, row.incarnation, ends)
        if not is_told and lineage_rows.find_edge(connection, ends) is None:
            lineage_rows.insert_edge(connection, ends, row.incarnation, now_us)


def adopt(connection: Connection, part: PartName, row: CheckpointRow, *, live: bool) -> None:
    """Links edges to a checkpoint that is committed only now, which knew it by name: `sync` records in any order.

    Under the lock of lineage.
    """
    for edge in lineage_rows.find_named(connection, names_of(part, row, live=live)):
        child_id = edge.ends.child_id
        linked = Ends(edge.ends.kind, row.id, child_id)
        if child_id is None or closes_cycle(connection, row.id, child_id):
            continue
        if lineage_rows.find_edge(connection, linked) is None:
            lineage_rows.link(connection, edge.id, row.id)
        else:
            lineage_rows.delete_edge(connection, edge.ends)


def closes_cycle(connection: Connection, parent_id: int, child_id: int) -> bool:
    """Returns True when an edge would close a cycle, or when too much would have to be looked at to know."""
    found = lineage_rows.ancestors(connection, parent_id, limits.MAX_ANCESTORS)
    return child_id in found or len(found) > limits.MAX_ANCESTORS


def _ends(connection: Connection, row: CheckpointRow, origin: Origin, *, recovered: bool) -> Ends:
    """Returns the edge to an origin; by name where the catalogue does not have it, or not yet."""
    meant = check_end(origin.source, "origins")
    if isinstance(meant, CheckpointName) and not (recovered and meant.id.alias is not None):
        try:
            found = present.resolve(connection, meant)
        except ShardbookError:
            found = None
        if found is not None and checkpoint_rows.find_by_id(connection, found).state in KNOWN:
            return Ends(origin.kind, found, row.id)
    return Ends(origin.kind, None, row.id, str(meant))


def names_of(part: PartName, row: CheckpointRow, *, live: bool = True) -> list[str]:
    """Returns the names by which an edge may know a checkpoint that was not there when it was told."""
    ids = [
        CheckpointId.full(row.step, row.session, row.attempt, row.incarnation),
        CheckpointId(step=row.step, session=row.session),
    ]
    if live:
        ids.append(CheckpointId(step=row.step))
    return [str(CheckpointName(part, one)) for one in ids]


__all__ = ["KNOWN", "adopt", "closes_cycle", "lock_for_commit", "names_of", "tell"]
