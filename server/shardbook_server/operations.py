"""What operators see of a running server: metrics, readiness, HTTP. Wired here, so that ``app`` need not know how."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

from shardbook_server.connections import count_connections
from shardbook_server.metrics.recorder import Recorder
from shardbook_server.metrics.state import Build, Sources, State
from shardbook_server.periodic import Periodic
from shardbook_server.release import release
from shardbook_server.rpc.attempts import Attempts
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.feed import Feed
from shardbook_server.rpc.health import HealthHandlers
from shardbook_server.rpc.waits import Waits
from shardbook_server.service.vitals import VitalsService
from shardbook_server.settings import Settings
from shardbook_server.storage.database import Database
from shardbook_server.storage.deadline import statements_until
from shardbook_server.storage.urls import is_postgres
from shardbook_server.web.http import HttpServer
from shardbook_server.web.ops import OpsPages

#: Time between two pings of the database, and how old the last answer may be, seconds.
PING_EVERY_S: Final = 1.0
ANSWER_AGE_S: Final = 5.0
#: Longest that a ping may take, where the database itself still keeps time, seconds.
_PING_S: Final = 3.0
#: Time between two looks at sizes, staging and runs, seconds.
LOOK_EVERY_S: Final = 15.0
#: Time between two looks at the last answer, seconds.
_HEALTH_EVERY_S: Final = 0.25

_log = structlog.get_logger(__name__)


#: Opens another handle to the database, for one connection.
Connect = Callable[[], Database]


class Operations:
    """Watches one server, and tells. Belongs to the event loop's thread, but for two threads of its own.

    Args:
        settings: Of the server.
        health: Its gRPC health, which follows the database.
        connect: Opens the database once more: looks of the server's own neither wait for the connections that calls
            use, nor hold one up.
        schema: Revision of the database's schema.

    Attributes:
        recorder: Observer for all parts of the server.
        registry: Its metrics, no other server's.
        http_address: Where HTTP is served, ``host:port``; empty when it is off, and before ``bind``.
    """

    def __init__(self, settings: Settings, health: HealthHandlers, connect: Connect, schema: str = "") -> None:
        self._settings = settings
        self._health = health
        self._connect = connect
        self._schema = schema
        self.registry = CollectorRegistry()
        self.recorder = Recorder(self.registry)
        ProcessCollector(registry=self.registry)
        self.http_address = ""
        self._http: HttpServer | None = None
        self._state: State | None = None
        self._stage = "the server is starting"
        self._answered_s = time.monotonic()
        self._threads: list[Periodic] = []
        self._watching: asyncio.Task[None] | None = None

    def watch(self, waits: Waits, bridge: Bridge, attempts: Attempts, feed: Feed) -> None:
        """Adds the gauges of a server's parts to its metrics."""
        on_postgres = is_postgres(self._settings.database_url)
        build = Build(
            version=release(),
            schema=self._schema,
            database="postgres" if on_postgres else "sqlite",
            # SQLite's connections all say so, see ``storage.sqlite``.
            synchronous_commit=self._settings.postgres_synchronous_commit if on_postgres else "full",
        )
        sources = Sources(
            waiting=lambda: waits.waiting_count,
            watching=lambda: feed.watcher_count,
            calls=lambda: bridge.pending_count,
            queues=attempts.queues,
            is_ready=lambda: not self.not_ready(),
        )
        self._state = State(build, sources)
        self.registry.register(self._state)

    async def bind(self) -> None:
        """Serves HTTP, when the settings ask for it; ``/readyz`` says that the server is starting.

        Raises:
            UnavailableError: The address cannot be bound.
        """
        if self._settings.http_listen:
            pages = OpsPages(self.not_ready, lambda: generate_latest(self.registry), CONTENT_TYPE_LATEST)
            self._http = HttpServer(self._settings.http_listen, pages.routes())
            await self._http.start()
            self.http_address = self._http.address

    def serve(self, address: str) -> None:
        """Says that calls are answered at ``address``, and watches the database from now on."""
        self._stage = ""
        self._answered_s = time.monotonic()
        pinged = self._connect()
        self._threads = [Periodic("shardbook-ping", lambda: self._ping(pinged), PING_EVERY_S, pinged.close)]
        if self._http is not None:
            # Nobody reads the numbers otherwise.
            looked = self._connect()
            service = VitalsService(looked)
            work = partial(self._look, address, service)
            self._threads.append(Periodic("shardbook-look", work, LOOK_EVERY_S, looked.close))
        for thread in self._threads:
            thread.start()
        self._watching = asyncio.get_running_loop().create_task(self._watch_database())

    def drain(self) -> None:
        """Says that no further calls are answered: ``/readyz`` fails from now on."""
        self._stage = "the server is shutting down"
        if self._watching is not None:
            self._watching.cancel()

    async def close(self) -> None:
        """Ends the threads and HTTP; a database that hangs does not hold it up."""
        self.drain()
        await asyncio.gather(*(asyncio.to_thread(thread.stop) for thread in self._threads))
        if self._http is not None:
            await self._http.close()

    def not_ready(self) -> str:
        """Returns why calls cannot be answered now; empty when they can. May be asked from any thread."""
        if self._stage:
            return self._stage
        silent_s = time.monotonic() - self._answered_s
        return "" if silent_s <= ANSWER_AGE_S else f"the database has not answered for {silent_s:.0f} s"

    def _ping(self, database: Database) -> None:
        with statements_until(time.monotonic() + _PING_S):
            database.ping()
        self._answered_s = time.monotonic()

    def _look(self, address: str, service: VitalsService) -> None:
        if self._state is not None:
            self._state.connection_count = count_connections(address)
            self._state.looked(service.measure())

    async def _watch_database(self) -> None:
        """Lets gRPC's health follow the database."""
        was_ready = True
        while True:
            await asyncio.sleep(_HEALTH_EVERY_S)
            why = self.not_ready()
            if was_ready and why:
                _log.warning("not ready", why=why)
            elif why == "" and not was_ready:
                _log.info("ready again")
            was_ready = not why
            self._health.set_serving(was_ready)
