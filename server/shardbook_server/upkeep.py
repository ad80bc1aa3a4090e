"""What a server does by itself every now and then so that its database does not only grow."""

from __future__ import annotations

import asyncio
import random
from typing import Final

import structlog

from shardbook_server.rpc.bridge import Bridge
from shardbook_server.service.events import EventService

#: Time between two looks for old events, seconds; jittered, so that replicas do not meet.
EVENTS_EVERY_S: Final = 600.0

_log = structlog.get_logger(__name__)


async def keep_events_few(bridge: Bridge, events: EventService, retention_s: float) -> None:
    """Drops events older than ``retention_s``, for as long as the server lives."""
    while True:
        await asyncio.sleep(EVENTS_EVERY_S * random.uniform(0.5, 1.0))
        try:
            dropped = await bridge.write_own("events", events.drop_old, round(retention_s * 1e6))
        except Exception as error:  # noqa: BLE001 - the database may be away; the next round tries again
            _log.warning("cannot drop old events", error=str(error))
        else:
            if dropped:
                _log.info("dropped old events", count=dropped)
