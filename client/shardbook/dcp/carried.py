"""A session that travels with a pickled storage writer: torch's process executor saves in a process that it spawns.

The trainer keeps the lease, which has to end with it. The other process has a client, a circuit breaker and a count of
its own, and keeps them from save to save.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Final

from shardbook.config import ClientConfig
from shardbook.dcp.runtime import Member, Runtime, current_or_none
from shardbook.dcp.session import Session


@dataclass(frozen=True)
class CarriedSession:
    """What another process needs to save in this one's session. Immutable, picklable, without credentials.

    Attributes:
        session: The session.
        config: Settings; the token is left out, for the other process has the same environment.
        alone: Place of this process without a process group.
        joined: Place of this process among those that called ``init`` with it.
        is_shared: Other ranks hold the session too.
        began_s: When ``init`` was called, by ``time.monotonic``, which the processes of a host share.
        numbers: Numbers of the incarnation's sessions, by part.
        lease_ttl_s: How long a lease lives, seconds.
        attempt: A number that no attempt of this process has or will get.
    """

    session: Session
    config: ClientConfig
    alone: Member
    joined: Member
    is_shared: bool
    began_s: float
    numbers: dict[str, int]
    lease_ttl_s: float
    attempt: int


def carry(runtime: Runtime) -> CarriedSession:
    """Returns a session for one save by another process."""
    return CarriedSession(
        session=replace(runtime.session, origins=runtime.origins.waiting),
        config=replace(runtime.config, token=None),
        alone=runtime.alone,
        joined=runtime.joined,
        is_shared=runtime.is_shared,
        began_s=runtime.began_s,
        numbers=runtime.sessions,
        lease_ttl_s=runtime.lease_ttl_s,
        attempt=runtime.reserve_attempt(),
    )


class _CarriedRuntime(Runtime):
    """A session that another process began, and keeps alive."""

    def start_keeping(self, part: str | None = None) -> None:
        """Leaves the leases to that process."""


_known: Final[dict[bytes, Runtime]] = {}
_lock: Final = threading.Lock()


def runtime_of(carried: CarriedSession) -> Runtime:
    """Returns the session in this process: its own when it never left it, else the one made for the first save."""
    own = current_or_none()
    if own is not None and own.session.incarnation == carried.session.incarnation:
        return own
    with _lock:
        runtime = _known.get(carried.session.incarnation)
        if runtime is None:
            config = replace(carried.config, token=ClientConfig.from_env().token)
            runtime = _known[carried.session.incarnation] = _CarriedRuntime(
                carried.session,
                config,
                carried.alone,
                carried.joined,
                is_shared=carried.is_shared,
                began_s=carried.began_s,
            )
    runtime.adopt_sessions(carried.numbers, carried.lease_ttl_s)
    runtime.origins.tell(carried.session.origins)
    return runtime


__all__ = ["CarriedSession", "carry", "runtime_of"]
