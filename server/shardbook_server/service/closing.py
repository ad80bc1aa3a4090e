"""The ends of an attempt: failed, or committed. Inside a write transaction that holds the run's lock alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardbook.errors import FailedPreconditionError
from shardbook_server.service import origins
from shardbook_server.service.aliases import follow
from shardbook_server.service.describing import Description
from shardbook_server.service.descriptions import describe
from shardbook_server.service.timing import RankStats, timing_to_json
from shardbook_server.service.types import RankFailure
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import descriptions as description_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import plans as plan_rows
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage import structures as structure_rows
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection
from shardbook_server.storage.events import Event, EventKind
from shardbook_server.storage.runs import PartRow


@dataclass(frozen=True)
class Folded:
    """A complete set of registrations, made ready to be committed.

    Attributes:
        structure_id: The assembled structure.
        segments: (first rank, payload) of the packed registrations.
        size_bytes: Bytes that all extents cover.
        explicit: True when some rank gave lengths that do not follow from its structure.
        stats: What the ranks took and wrote.
    """

    structure_id: int
    segments: tuple[tuple[int, bytes], ...]
    size_bytes: int
    explicit: bool
    stats: RankStats


def empty_staging(connection: Connection, checkpoint_ids: Sequence[int]) -> None:
    """Deletes the plans and registrations of attempts that are closed for good."""
    plan_rows.delete_plans(connection, checkpoint_ids)
    registration_rows.delete_registrations(connection, checkpoint_ids)


def failure_text(failure: RankFailure) -> str:
    """Returns a rank's failure as people read it on the checkpoint."""
    return _failure_head(failure.rank, failure.host, failure.phase) + failure.reason


def failure_of(row: CheckpointRow) -> RankFailure | None:
    """Returns what a rank reported; None when none did."""
    if row.failed_rank is None:
        return None
    host, phase = row.failed_host or "", row.failed_phase or ""
    return RankFailure(
        row.failed_rank, host, phase, row.failure.removeprefix(_failure_head(row.failed_rank, host, phase))
    )


def _failure_head(rank: int, host: str, phase: str) -> str:
    return f"rank {rank}{f' on {host}' if host else ''} failed to {phase}: "


def fail_attempt(
    connection: Connection, checkpoint: CheckpointRow, text: str, now_us: int, failure: RankFailure | None = None
) -> None:
    """Turns an attempt FAILED, because of a rank or not."""
    if failure is None:
        checkpoint_rows.fail(connection, checkpoint.id, text)
    else:
        checkpoint_rows.fail(connection, checkpoint.id, text, rank=failure.rank, host=failure.host, phase=failure.phase)
    empty_staging(connection, [checkpoint.id])
    event_rows.append(connection, [Event(EventKind.FAILED, checkpoint.part_id, checkpoint.id)], now_us)


def commit_attempt(
    connection: Connection,
    part: PartRow,
    checkpoint: CheckpointRow,
    folded: Folded,
    now_us: int,
    *,
    recovered: bool,
    description: Description,
    took_ms: int,
    may_link: bool,
) -> None:
    """Turns an attempt COMMITTED: supersedes what was live, moves aliases, empties staging, says so.

    Args:
        connection: In the transaction.
        part: Its part.
        checkpoint: The attempt.
        folded: What it holds.
        now_us: The database's time.
        recovered: Recorded after the fact.
        description: What is said of it.
        took_ms: What it took to get here.
        may_link: Edges of lineage may be added and linked: their lock is held.

    Raises:
        FailedPreconditionError: See ``check_not_superseded``.
    """
    live = checkpoint_rows.find_live(connection, part.id, checkpoint.step)
    check_not_superseded(checkpoint, live, recovered=recovered)
    events = [Event(EventKind.COMMITTED, part.id, checkpoint.id)]
    # Before it takes the place of what it may come from.
    origins.tell(connection, checkpoint, description.origins, now_us, recovered=recovered)
    takes_over = live is None or is_newer(checkpoint, live)
    if live is not None and takes_over:
        checkpoint_rows.supersede(connection, live.id)
        events.append(Event(EventKind.SUPERSEDED, part.id, live.id))
    registration_rows.insert_segments(connection, checkpoint.id, folded.segments)
    structure_rows.touch(connection, folded.structure_id, now_us)
    checkpoint_rows.commit(
        connection,
        checkpoint.id,
        live=takes_over,
        recovered=recovered or checkpoint.recovered,
        explicit=folded.explicit,
        structure_id=folded.structure_id,
        size_bytes=folded.size_bytes,
        now_us=now_us,
    )
    if may_link:
        origins.adopt(connection, part.name, checkpoint, live=takes_over)
    if takes_over and moves_latest(connection, part, checkpoint):
        run_rows.set_latest(connection, part.id, checkpoint.id)
        events.append(Event(EventKind.LATEST_MOVED, part.id, checkpoint.id))
    hosts = plan_rows.read_hosts(connection, checkpoint.id, folded.stats.slowest())
    describe(connection, checkpoint, description, timing_to_json(folded.stats.timing(hosts, took_ms)))
    description_rows.insert_rank_stats(connection, checkpoint.id, folded.stats.encode())
    events += follow(connection, part.id, now_us)
    empty_staging(connection, [checkpoint.id])
    event_rows.append(connection, events, now_us)


def check_not_superseded(checkpoint: CheckpointRow, live: CheckpointRow | None, *, recovered: bool) -> None:
    """Refuses to record an attempt of a step that a later session holds.

    Raises:
        FailedPreconditionError: It does; reason ``STEP_SUPERSEDED``.
    """
    if recovered and live is not None and live.session > checkpoint.session:
        raise FailedPreconditionError(
            f"session {live.session} holds a commit of step {live.step}, so this attempt of session "
            f"{checkpoint.session} is not recorded; its files can be loaded by path",
            reason="STEP_SUPERSEDED",
            metadata={"session": str(live.session)},
        )


def is_newer(one: CheckpointRow, other: CheckpointRow) -> bool:
    """Returns True when ``one`` is to be what ``@step`` means rather than ``other``."""
    if one.session == other.session == 0 and one.incarnation != other.incarnation:
        return _written_later(one, other)
    return (one.session, one.attempt) > (other.session, other.attempt)


def _written_later(one: CheckpointRow, other: CheckpointRow) -> bool:
    """Offline attempts of unlike incarnations have no order but time; where it is not known the last to come wins."""
    if one.write_time_us is None or other.write_time_us is None:
        return True
    return one.write_time_us >= other.write_time_us


def moves_latest(connection: Connection, part: PartRow, checkpoint: CheckpointRow) -> bool:
    """Returns True when ``latest`` follows this commit: its session is current, and it is not behind its own steps.

    Or its session is later than the current one: then the catalogue was put back, or is a new one, and the directory
    knows better. The next session is later than all of them.
    """
    latest = None
    if part.latest_id is not None:
        latest = checkpoint_rows.find_by_ids(connection, [part.latest_id]).get(part.latest_id)
    if checkpoint.session == 0:
        # Offline attempts count as long as nobody has ever started a session.
        if part.last_session > 0:
            return False
        if latest is not None and latest.incarnation != checkpoint.incarnation:
            return _written_later(checkpoint, latest)
    elif checkpoint.session > part.session:
        return latest is None or (latest.session, latest.step) <= (checkpoint.session, checkpoint.step)
    elif (part.session, part.incarnation) != (checkpoint.session, checkpoint.incarnation):
        return False
    if latest is not None and latest.flags & checkpoint_rows.DATA_MISSING:
        return True
    return latest is None or latest.session != checkpoint.session or latest.step <= checkpoint.step
