"""Sessions: who may write a (run, part), and until when."""

from __future__ import annotations

from shardbook_server.service.types import SessionKey, SessionStart
from shardbook_server.service.views import LeaseInfo, SessionInfo
from shardbook_server.storage.database import Database


class SessionService:
    """Starts sessions, keeps their leases, ends what outlived them. Thread-safe."""

    def __init__(self, database: Database, *, lease_ttl_s: float) -> None: ...

    def start(self, request: SessionStart) -> SessionInfo:
        """Starts a session, or returns the one that this incarnation already holds.

        Raises:
            RunBusyError: Another job's lease is alive and ``on_live`` is not TAKEOVER; ``metadata`` has host, user,
                job_id, last_seen (RFC 3339); ``retry_delay_s`` is what is left of the lease.
            NotFoundError, FailedPreconditionError, InvalidArgumentError: ``resumed_from`` does not name a committed
                checkpoint of this (run, part).
        """
        raise NotImplementedError

    def lease_remaining_s(self, request: SessionStart) -> float:
        """Returns how long ``start`` would still be refused with RUN_BUSY, seconds; 0 when it would not.

        One indexed read, for whoever waits: ask again until it is 0, then ``start``.
        """
        raise NotImplementedError

    def keep_alive(self, key: SessionKey, *, release: bool = False) -> LeaseInfo:
        """Renews a lease, or ends it.

        Raises:
            SessionUnknownError: No session has this number and incarnation.
            SessionFencedError: A later session holds the (run, part).
        """
        raise NotImplementedError

    def expire_leases(self, *, period_s: float) -> int:
        """Ends open attempts whose writers' lease has ended; returns how many. Called every ``period_s`` seconds.

        When the last call is much longer ago than ``period_s``, the service or its database was away: live leases
        are extended by the gap first, and nothing is ended in that call.
        """
        raise NotImplementedError
