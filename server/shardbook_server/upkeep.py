"""What a server does by itself every now and then so that its database does not only grow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from shardbook_server.rpc.bridge import Bridge
from shardbook_server.service.requests import REMEMBERED_S
from shardbook_server.service.services import Services

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


async def drop_what_is_old(bridge: Bridge, things: tuple[Old, ...]) -> None:
    """Drops what is old, for as long as the server lives."""
    while True:
        await asyncio.sleep(EVERY_S * random.uniform(0.5, 1.0))
        for old in things:
            try:
                dropped = await bridge.write_own(old.what, old.drop, round(old.age_s * 1e6))
            except Exception as error:  # noqa: BLE001 - the database may be away; the next round tries again
                _log.warning("cannot drop what is old", what=old.what, error=str(error))
            else:
                if dropped:
                    _log.info("dropped what is old", what=old.what, count=dropped)
