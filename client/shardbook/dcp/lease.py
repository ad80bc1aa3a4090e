"""Keeps the leases of a session alive while its job runs, so that no other job takes the run by accident."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from shardbook.client import Client
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.session import Session
from shardbook.errors import SessionUnknownError, ShardbookError
from shardbook.v1 import registration_pb2 as pb

_LOG = logging.getLogger(__name__)

#: A lease is renewed this many times before it would end.
_RENEWALS_PER_LEASE: Final = 4
_LEAST_RENEWAL_S: Final = 0.5
#: What releasing a lease at exit may take, seconds.
_RELEASE_S: Final = 2.0


class LeaseKeeper:
    """A daemon thread that renews leases until it is closed, which ends them.

    Args:
        client: The server.
        session: Whose leases.
        numbers: Returns the numbers of the session's parts to be kept; 0 for one that has to be started anew.
        restart: Starts a session anew that the server does not know any more, given its part and number.
    """

    def __init__(
        self,
        client: Client,
        session: Session,
        numbers: Callable[[], dict[str, int]],
        restart: Callable[[str, int, Client], None],
    ) -> None:
        self._client = client
        self._session = session
        self._numbers = numbers
        self._restart = restart
        self._period_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, lease_ttl_s: float) -> None:
        """Renews from now on, often enough for leases of this length, seconds."""
        period_s = max(_LEAST_RENEWAL_S, lease_ttl_s / _RENEWALS_PER_LEASE)
        self._period_s = period_s if self._thread is None else min(period_s, self._period_s)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="shardbook-lease", daemon=True)
            thread.start()  # raises where the interpreter ends
            self._thread = thread

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._send(release=False, deadline_s=self._period_s)

    def _send(self, *, release: bool, deadline_s: float) -> None:
        for part, number in self._numbers().items():
            try:
                if number:
                    self._client.keep_alive(self._request(part, number, release=release), deadline_s=deadline_s)
                    continue
            except SessionUnknownError:
                pass
            except ShardbookError as error:
                # Saves notice what matters (a fenced session, an outage); a lease alone is nothing to raise for.
                _LOG.debug("lease of %s:%s was not renewed: %s", self._session.run, part, error)
                continue
            if not release:
                with best_effort(f"start a new session of {self._session.run}:{part}"):
                    self._restart(part, number, self._client)

    def _request(self, part: str, number: int, *, release: bool) -> pb.KeepAliveRequest:
        return pb.KeepAliveRequest(
            run=str(self._session.run_name),
            part=part,
            session=number,
            incarnation=self._session.incarnation,
            release=release,
        )

    def close(self) -> None:
        """Stops renewing and ends the leases."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_RELEASE_S)
        self._send(release=True, deadline_s=_RELEASE_S)
