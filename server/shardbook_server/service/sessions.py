"""Sessions: who may write a (run, part), and until when."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from shardbook.core.names import CheckpointName
from shardbook.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    RunBusyError,
    SessionFencedError,
    ShardbookError,
)
from shardbook_server.observer import SILENT, Observer
from shardbook_server.service import closing, present
from shardbook_server.service.attempts import find_current, renew
from shardbook_server.service.types import OnLive, SessionKey, SessionStart
from shardbook_server.service.views import CheckpointState, LeaseInfo, SessionInfo
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage import sessions as session_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.events import Event, EventKind
from shardbook_server.storage.runs import PartRow
from shardbook_server.storage.sessions import LeaseRow, SessionRow

#: Time between looks for ended leases, unless told otherwise, seconds.
REAP_INTERVAL_S: Final = 10.0
#: Leases dealt with in one call of the reaper; the rest waits for the next.
_REAP_COUNT: Final = 1000
#: Attempts that are being recorded afterwards have no lease; after this long their sync is taken to have died.
_RECORD_TTL_US: Final = 86_400_000_000


class SessionService:
    """Starts sessions, keeps their leases, ends what outlived them. Thread-safe."""

    def __init__(
        self,
        database: Database,
        *,
        lease_ttl_s: float,
        reap_interval_s: float = REAP_INTERVAL_S,
        observer: Observer = SILENT,
    ) -> None:
        """Keeps no state of its own; ``expire_leases`` is called every ``reap_interval_s`` seconds."""
        self._database = database
        self._reap_interval_s = reap_interval_s
        self._lease_ttl_s = lease_ttl_s
        self._observer = observer
        self._lease_ttl_us = round(lease_ttl_s * 1e6)

    def start(self, request: SessionStart) -> SessionInfo:
        """Starts a session, or returns the one that this incarnation already holds.

        Starting one supersedes the session before: what that left open can not be committed any more. An incarnation
        supersedes none that began after it, so a request that was long on its way, or that a job makes late, does not
        fence the job that was restarted meanwhile (decision 0016).

        Raises:
            SessionFencedError: A later incarnation of the same job holds the (run, part), or has.
            AlreadyExistsError: The incarnation holds a session with another ``job_id``.
            FailedPreconditionError: A session was started since ``known_session``; reason ``SESSION_MOVED``. Look
                again, then ask again.
            RunBusyError: Another job's lease is alive and ``on_live`` is not TAKEOVER; ``metadata`` has host, user,
                job_id, last_seen (RFC 3339); ``retry_delay_s`` is what is left of the lease.
            NotFoundError, FailedPreconditionError, InvalidArgumentError: ``resumed_from`` does not name a committed
                checkpoint of this (run, part).
        """
        with self._database.write([request.part_name.run]) as connection:
            now_us = self._database.now_us(connection)
            part = run_rows.ensure_part(connection, request.part_name, now_us)
            held = session_rows.find_session(connection, part.id, incarnation=request.incarnation)
            if held is not None and held.job_id != request.job_id:
                raise AlreadyExistsError(
                    f"the incarnation holds session {held.number} as job {held.job_id!r}", field="job_id"
                )
            before = expired_count = 0
            if held is None:
                current = self._credited(connection, part.id, now_us)
                refusal = _moved(request, part) or _fenced(request, current, now_us) or _busy(request, current, now_us)
                if refusal is not None:
                    raise refusal
                before = part.session
                part, expired_count = self._take(connection, part, request, now_us)
            elif held.number == part.session:
                renew(connection, [part], now_us, self._lease_ttl_s)
            number = part.session if held is None else held.number
            latest = "" if part.latest_id is None else present.checkpoint_info(connection, part.latest_id).name
        if before:
            self._observer.session_fenced()
        self._observer.attempts_expired(expired_count)
        return SessionInfo(number, self._lease_ttl_s, number == part.session, latest)

    def _take(self, connection: Connection, part: PartRow, request: SessionStart, now_us: int) -> tuple[PartRow, int]:
        """Makes the request's session the current one; returns the part, and how many open attempts that expired."""
        number = part.last_session + 1
        session = SessionRow(
            part.id,
            number,
            request.incarnation,
            request.job_id,
            request.host,
            request.user,
            _begin_us(request, now_us),
        )
        session_rows.insert_session(connection, session)
        run_rows.set_session(connection, part.id, number)
        session_rows.start_lease(connection, part.id, number, now_us, now_us + self._lease_ttl_us)
        staged, open_ids = checkpoint_rows.expire_superseded(connection, part.id)
        closing.empty_staging(connection, staged)
        events = [Event(EventKind.EXPIRED, part.id, checkpoint_id) for checkpoint_id in open_ids]
        if request.resumed_from:
            resumed = _resumed(connection, request)
            if resumed != part.latest_id:
                run_rows.set_latest(connection, part.id, resumed)
                events.append(Event(EventKind.LATEST_MOVED, part.id, resumed))
        event_rows.append(connection, events, now_us)
        return run_rows.part_by_id(connection, part.id), len(open_ids)

    def lease_remaining_s(self, request: SessionStart) -> float:
        """Returns how long ``start`` would still be refused with RUN_BUSY, seconds; 0 when it would not.

        A few indexed reads, for whoever waits: ask again until it is 0, then ``start``.
        """
        with self._database.read() as connection:
            part = run_rows.find_parts(connection, [request.part_name]).get(request.part_name)
            if part is None or part.incarnation == request.incarnation:
                return 0.0
            now_us = self._database.now_us(connection)
            busy = _busy(request, self._credited(connection, part.id, now_us), now_us)
        return 0.0 if busy is None else busy.retry_delay_s or 0.0

    def _credited(self, connection: Connection, part_id: int, now_us: int) -> tuple[SessionRow, LeaseRow] | None:
        """Returns the current session with its lease, extended where the service was away and nobody has done so yet.

        While it is away no sign of life arrives. The next round of the reaper makes it good; a job that waits for the
        lease must not be quicker, and fence one that lives.
        """
        # In this order: of a round of the reaper between the two reads, what it gave is then seen at least.
        last_us = event_rows.read_reap_time(connection)
        held = session_rows.current_lease(connection, part_id)
        if held is None or not self._was_away(last_us, now_us) or held[1].expire_time_us <= last_us:
            return held
        session, lease = held
        until_us = min(lease.expire_time_us + now_us - last_us, now_us + self._lease_ttl_us)
        return session, replace(lease, expire_time_us=max(lease.expire_time_us, until_us))

    def _was_away(self, last_us: int, now_us: int) -> bool:
        """Returns True when nobody has looked for ended leases for much longer than it takes."""
        period_us = round(self._reap_interval_s * 1e6)
        return last_us > 0 and now_us - last_us > period_us + max(period_us, self._lease_ttl_us // 4)

    def keep_alive(self, key: SessionKey, *, release: bool = False) -> LeaseInfo:
        """Renews a lease, or ends it.

        Raises:
            SessionUnknownError: No session has this number and incarnation.
            SessionFencedError: A later session holds the (run, part).
        """
        with self._database.write([key.part_name.run], exclusive=False) as connection:
            now_us = self._database.now_us(connection)
            part = find_current(connection, [key])[key]
            if isinstance(part, ShardbookError):
                raise part
            if release:
                session_rows.end_lease(connection, part.id, now_us)
            else:
                renew(connection, [part], now_us, self._lease_ttl_s)
            lease = session_rows.find_lease(connection, part.id)
        return LeaseInfo(now_us if lease is None else lease.expire_time_us)

    def expire_leases(self) -> int:
        """Ends open attempts whose writers' lease has ended; returns how many. Called every ``reap_interval_s``.

        When the last call is much longer ago than that, the service or its database was away: live leases
        are extended by the gap first, to a full lease at most, and nothing is ended in that call.
        """
        # One replica at a time, so that a gap is credited once.
        with self._database.write(lock="reaper") as connection:
            now_us = self._database.now_us(connection)
            last_us = event_rows.read_reap_time(connection)
            gap_us = now_us - last_us
            was_away = self._was_away(last_us, now_us)
            ended: list[int] = []
            forgotten: list[tuple[int, int]] = []
            if was_away:
                session_rows.extend_leases(connection, last_us, gap_us, now_us + self._lease_ttl_us)
            else:
                ended = session_rows.ended_leases(connection, now_us, _REAP_COUNT)
                forgotten = checkpoint_rows.find_stale_records(connection, now_us - _RECORD_TTL_US, _REAP_COUNT)
            parts = {*ended, *(part_id for _, part_id in forgotten)}
            names = {part_id: run_rows.part_by_id(connection, part_id).name for part_id in parts}
            # Last, as in every transaction: the row is the one that all those with an event want.
            event_rows.write_reap_time(connection, now_us)
        count = 0
        for part_id in ended:
            with self._database.write([names[part_id].run]) as connection:
                now_us = self._database.now_us(connection)
                # The lease may have been renewed since it was read.
                if session_rows.mark_ended(connection, part_id, now_us):
                    expired = checkpoint_rows.expire_open(connection, part_id)
                    count += len(expired)
                    event_rows.append(connection, [Event(EventKind.EXPIRED, part_id, one) for one in expired], now_us)
        for checkpoint_id, part_id in forgotten:
            # Its sync never came back; one that does may begin anew.
            with self._database.write([names[part_id].run]) as connection:
                if checkpoint_rows.expire_record(connection, checkpoint_id):
                    closing.empty_staging(connection, [checkpoint_id])
                    count += 1
                    event = Event(EventKind.EXPIRED, part_id, checkpoint_id)
                    event_rows.append(connection, [event], self._database.now_us(connection))
        self._observer.attempts_expired(count)
        return count


def _begin_us(request: SessionStart, now_us: int) -> int:
    """Returns when the request's incarnation began, by the database's clock: only its age is the client's word."""
    return max(0, now_us - request.age_us)


def _same_job(request: SessionStart, session: SessionRow) -> bool:
    return bool(request.job_id) and request.job_id == session.job_id


def _moved(request: SessionStart, part: PartRow) -> FailedPreconditionError | None:
    """Returns the refusal when somebody has started a session since the caller looked."""
    if request.known_session is None or part.session <= request.known_session:
        return None
    return FailedPreconditionError(
        f"session {part.session} of {request.part_name.ref} was started since the caller looked: look again",
        reason="SESSION_MOVED",
        field="known_session",
        metadata={"session": str(part.session)},
    )


def _fenced(request: SessionStart, held: tuple[SessionRow, LeaseRow] | None, now_us: int) -> SessionFencedError | None:
    """Returns the refusal when a later incarnation of the same job has taken the part, be it done already."""
    if held is None or not _same_job(request, held[0]) or held[0].start_time_us <= _begin_us(request, now_us):
        return None
    session = held[0]
    return SessionFencedError(
        f"session {session.number} has taken {request.part_name.ref}: job {session.job_id} was restarted after this "
        "incarnation of it began, which must not write the part any more",
        metadata={"session": str(session.number)},
    )


def _busy(request: SessionStart, held: tuple[SessionRow, LeaseRow] | None, now_us: int) -> RunBusyError | None:
    """Returns the refusal when another job's lease is alive; nobody takes over from a job that began later."""
    if held is None:
        return None
    session, lease = held
    takes_over = request.on_live is OnLive.TAKEOVER and session.start_time_us <= _begin_us(request, now_us)
    if lease.expire_time_us <= now_us or lease.session != session.number or takes_over or _same_job(request, session):
        return None
    seen = datetime.fromtimestamp(lease.seen_time_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return RunBusyError(
        f"{request.part_name.ref} is being written by {session.user or 'someone'} on {session.host or 'some host'}, "
        f"last seen {seen}; its lease ends in {(lease.expire_time_us - now_us) / 1e6:.0f} s unless it goes on. "
        'Wait for that with init(on_live="wait"), stop that job, or take the run over with init(on_live="takeover"); a '
        "restarted job is known again by its job_id and need not wait",
        metadata={"host": session.host, "user": session.user, "job_id": session.job_id, "last_seen": seen},
        retry_delay_s=(lease.expire_time_us - now_us) / 1e6,
    )


def _resumed(connection: Connection, request: SessionStart) -> int:
    name = CheckpointName.parse(request.resumed_from, "resumed_from")
    if name.part != request.part_name:
        raise InvalidArgumentError(f"{name.ref} is not a checkpoint of {request.part_name.ref}", field="resumed_from")
    checkpoint_id = present.resolve(connection, name)
    row = checkpoint_rows.find_by_id(connection, checkpoint_id)
    if row.state != CheckpointState.COMMITTED:
        raise FailedPreconditionError(
            f"{name.ref} is {CheckpointState(row.state).name}, not COMMITTED",
            reason="NOT_COMMITTED",
            field="resumed_from",
        )
    return checkpoint_id
