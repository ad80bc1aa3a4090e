"""What a server does by itself every now and then: it ends what was left, and drops what is old."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from shardbook_server.rpc.bridge import Bridge
from shardbook_server.service.requests import REMEMBERED_S
from shardbook_server.service.services import Services
from shardbook_server.service.sessions import SessionService

#: Time between two looks for what is old, seconds; jittered, so that replicas do not meet.
EVERY_S: Final = 600.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Old:
    """Something that is dropped when it is old.

    Attributes:
        what: What it is, for people.
        drop: Drops what is older than so many microseconds; returns how many.
        age_s: The age, seconds.
    """

    what: str
    drop: Callable[[int], int]
    age_s: float


def old_things(services: Services, event_retention_s: float) -> tuple[Old, ...]:
    """Returns what is dropped when it is old."""
    return (
        Old("events", services.events.drop_old, event_retention_s),
        Old("requests", services.requests.forget_old, REMEMBERED_S),
    )


async def expire_leases(bridge: Bridge, sessions: SessionService, every_s: float) -> None:
    """Ends attempts whose writers are gone, for as long as the server lives."""
    while True:
        # At once after a start: the leases of jobs that could not reach the service are made good first.
        count = await _tried(bridge, "reap", sessions.expire_leases, failure="cannot look for ended leases")
        if count:
            _log.info("expired attempts whose lease had ended", count=count)
        await asyncio.sleep(every_s)


async def drop_what_is_old(bridge: Bridge, things: tuple[Old, ...]) -> None:
    """Drops what is old, for as long as the server lives."""
    while True:
        await asyncio.sleep(EVERY_S * random.uniform(0.5, 1.0))
        for old in things:
            drop = partial(old.drop, round(old.age_s * 1e6))
            count = await _tried(bridge, old.what, drop, failure=f"cannot drop old {old.what}")
            if count:
                _log.info(f"dropped old {old.what}", count=count)


async def _tried(bridge: Bridge, name: str, work: Callable[[], int], *, failure: str) -> int:
    """Returns how many were ended or dropped; 0 when the database was away, which is logged."""
    try:
        return await bridge.write_own(name, work)
    except Exception as error:  # noqa: BLE001 - the next round tries again
        _log.warning(failure, error=str(error))
        return 0
