"""The only wiring: settings, database, services, the gRPC server, and their life from start to drain.

A server binds its port last and lets go of it first: whoever reaches it finds it ready.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from typing import Any, Final

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardbook.v1 import catalog_pb2, metadata_pb2, registration_pb2, relay_pb2
from shardbook.v1.catalog_pb2_grpc import add_CatalogServiceServicer_to_server
from shardbook.v1.metadata_pb2_grpc import add_MetadataServiceServicer_to_server
from shardbook.v1.registration_pb2_grpc import add_RegistrationServiceServicer_to_server
from shardbook.v1.relay_pb2_grpc import add_RelayServiceServicer_to_server
from shardbook_server import loops
from shardbook_server.failpoints import Failpoints
from shardbook_server.listening import cannot_listen, reason_of, server_options
from shardbook_server.observer import SILENT, Observer
from shardbook_server.operations import Operations
from shardbook_server.rpc.attempts import Attempts
from shardbook_server.rpc.batcher import BatchLimits
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.catalog import CatalogHandlers
from shardbook_server.rpc.feed import Feed, FeedLimits
from shardbook_server.rpc.health import HealthHandlers
from shardbook_server.rpc.interceptors import EdgeInterceptor
from shardbook_server.rpc.metadata import MetadataHandlers
from shardbook_server.rpc.registration import RegistrationHandlers
from shardbook_server.rpc.relay import RelayHandlers
from shardbook_server.rpc.waits import Waits
from shardbook_server.rpc.watch import AccessLog
from shardbook_server.service.services import build_services
from shardbook_server.service.views import AttemptCounts
from shardbook_server.settings import Settings, default_data_dir
from shardbook_server.storage import migrate
from shardbook_server.storage.database import Database, PostgresOptions
from shardbook_server.storage.urls import is_postgres
from shardbook_server.tracing import Tracing
from shardbook_server.upkeep import drop_what_is_old, expire_leases, old_things

#: Full names of the services, as health checks ask for them.
SERVICES: Final = tuple(
    service.full_name
    for module in (registration_pb2, metadata_pb2, catalog_pb2, relay_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
#: Calls of the write lane, and batches of each kind, at a time: SQLite has one writer.
_SQLITE_WRITERS: Final = 1
#: Batches of each kind that one replica has in Postgres at a time, at most.
_POSTGRES_BATCHES: Final = 2
#: Objects made since the last collection before the next begins, in a process of the server's own.
_COLLECT_EVERY: Final = 50_000
#: How long writes that have begun may take at the end, once no call is in progress any more, seconds.
_FLUSH_S: Final = 5.0
#: Signals closer than this are one.
_SAME_SIGNAL_S: Final = 1.0

_log = structlog.get_logger(__name__)


def prepare_database(settings: Settings) -> str:
    """Makes sure that the database has a schema that this release serves; returns the schema's revision.

    A new file gets its schema, and the embedded database is upgraded, without being asked. Any other database is
    somebody's to migrate: it is refused when it is not current.

    Raises:
        FailedPreconditionError: The schema is stale or too new; the message has the command.
        InvalidArgumentError: The URL names no database that can be served.
    """
    with closing(open_database(settings, connections=1)) as database:
        if settings.embedded:
            default_data_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
        if settings.embedded or (not is_postgres(settings.database_url) and database.backend.missing() is not None):
            return migrate.upgrade(settings.database_url)
        database.backend.check_durability()
    return migrate.check(settings.database_url)


def open_database(settings: Settings, *, connections: int, observer: Observer = SILENT) -> Database:
    """Returns the database of the settings; nothing is connected yet.

    Raises:
        InvalidArgumentError, FailedPreconditionError: See ``Database``.
    """
    options = PostgresOptions(
        synchronous_commit=settings.postgres_synchronous_commit,
        statement_timeout_s=settings.postgres_statement_timeout_s,
        prepared_statements=settings.postgres_prepared_statements,
    )
    return Database(settings.database_url, connections=connections, postgres=options, observer=observer)


class Server:
    """One server in this process; belongs to the event loop that starts it.

    Attributes:
        database: For tests, which look behind the API.
        address: Where gRPC is served, as clients use it; empty before ``start``.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        failpoints: Failpoints | None = None,
        tracing: Tracing | None = None,
        schema: str = "",
    ) -> None:
        """Wires everything; nothing is bound yet.

        Args:
            settings: What to serve and how.
            failpoints: Faults to inject; those of the environment when None.
            tracing: Where spans go; as the settings and the environment say when None.
            schema: Revision of the database's schema, for the metrics.

        Raises:
            FailedPreconditionError: Tracing is asked for and not installed.
        """
        connections = settings.worker_threads + settings.heavy_threads
        self._settings = settings
        self._tracing = Tracing() if tracing is None and settings.otel else tracing
        self._health = HealthHandlers(SERVICES)
        self._operations = Operations(settings, self._health, lambda: open_database(settings, connections=1), schema)
        observer = self._operations.recorder
        self.database = open_database(settings, connections=connections, observer=observer)
        # On Postgres one thread is kept for reads: writers waiting for each other must not take them all.
        alone = self.database.backend.single_writer
        writers = _SQLITE_WRITERS if alone else max(1, settings.worker_threads - 1)
        self._services = build_services(
            self.database,
            lease_ttl_s=settings.lease_ttl_s,
            reap_interval_s=settings.reap_interval_s,
            undelete_s=settings.undelete_s,
            observer=observer,
        )
        self._bridge = Bridge(
            threads=settings.worker_threads,
            heavy_threads=settings.heavy_threads,
            writers=writers,
            queue_limit=settings.call_queue_limit,
            failpoints=Failpoints.from_environment() if failpoints is None else failpoints,
        )
        self._waits = Waits(self._look, limit=settings.waiter_limit, interval_s=settings.poll_interval_s)
        watching = FeedLimits(settings.watcher_limit, settings.poll_interval_s, settings.watch_heartbeat_s)
        self._feed = Feed(self._services, self._bridge, watching)
        limits = BatchLimits(
            batch_count=settings.batch_max_count,
            batch_bytes=settings.batch_max_bytes,
            queue_count=settings.batch_queue_count,
            queue_bytes=settings.batch_queue_bytes,
        )
        in_flight = _SQLITE_WRITERS if alone else _POSTGRES_BATCHES
        self._attempts = Attempts(
            self._services, self._bridge, self._waits, limits, in_flight=in_flight, observer=observer
        )
        self._operations.watch(self._waits, self._bridge, self._attempts, self._feed)
        edge = EdgeInterceptor(self._operations.recorder, AccessLog(settings.access_log))
        registration = RegistrationHandlers(self._services, self._bridge, self._attempts)
        self._relay = RelayHandlers(edge, registration, settings.max_concurrent_rpcs)
        self._server = self._build(edge, registration)
        self._reaper: asyncio.Task[None] | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._severing: asyncio.TimerHandle | None = None
        self.address = ""

    @property
    def http_address(self) -> str:
        """Where HTTP is served, ``host:port``; empty when it is off."""
        return self._operations.http_address

    async def start(self) -> str:
        """Binds the addresses and serves; returns the one that clients use.

        Raises:
            UnavailableError: An address cannot be bound.
        """
        await self._operations.bind()
        listen = self._settings.listen
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise cannot_listen(listen, reason_of(listen), "Choose another address with --listen") from error
        self.address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"
        await self._server.start()
        self._operations.serve(self.address)
        loop = asyncio.get_running_loop()
        reaping = expire_leases(self._bridge, self._services.sessions, self._settings.reap_interval_s)
        self._reaper = loop.create_task(reaping)
        old = old_things(self._services, self._settings.event_retention_s)
        self._upkeep = loop.create_task(drop_what_is_old(self._bridge, old))
        return self.address

    async def stop(self, grace_s: float | None = None) -> None:
        """Drains: NOT_SERVING, waits end, calls in progress finish, the queue is written, the database closed.

        A database that does not answer holds it up for some seconds beyond the grace, not for ever.

        Args:
            grace_s: How long calls in progress may take; ``drain_s`` of the settings when None.
        """
        self._health.drain()
        self._operations.drain()
        for work in (self._reaper, self._upkeep):
            if work is not None:
                work.cancel()
        self._waits.drain()
        self._feed.drain()
        self._relay.drain()
        grace_s = self._settings.drain_s if grace_s is None else grace_s
        self._sever_in(grace_s + _FLUSH_S)
        await self._server.stop(grace_s)
        await self._attempts.close()
        await self._bridge.close()
        await self._waits.close()
        await self._feed.close()
        if self._severing is not None:
            self._severing.cancel()
        await self._operations.close()
        self.database.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def cut(self) -> None:
        """Ends the calls in progress of a server that is being stopped."""
        self._sever_in(_FLUSH_S)
        await self._server.stop(0)

    def _sever_in(self, seconds: float) -> None:
        """Bounds the end: what waits for the database by then hears that its connection is lost."""
        if self._severing is not None:
            self._severing.cancel()
        self._severing = asyncio.get_running_loop().call_later(seconds, self._sever)

    def _sever(self) -> None:
        _log.warning("the database has not answered in time, its connections are cut")
        self.database.sever()

    def _build(self, edge: EdgeInterceptor, registration: RegistrationHandlers) -> grpc.aio.Server:
        server = grpc.aio.server(
            # Spans around everything else, so that they hold the time and the status that clients see.
            interceptors=[edge] if self._tracing is None else [self._tracing.interceptor, edge],
            options=server_options(self._settings),
            maximum_concurrent_rpcs=self._settings.max_concurrent_rpcs,
        )
        add_RegistrationServiceServicer_to_server(registration, server)
        add_RelayServiceServicer_to_server(self._relay, server)
        add_MetadataServiceServicer_to_server(MetadataHandlers(self._services, self._bridge), server)
        add_CatalogServiceServicer_to_server(CatalogHandlers(self._services, self._bridge, self._feed), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    async def _look(self, attempts: Sequence[int]) -> Mapping[int, AttemptCounts]:
        return await self._bridge.look(self._services.progress.counts, attempts)


def _take_every_descriptor() -> None:
    """Raises the soft limit of open files to the hard one: every client is a connection, and shells begin with 1,024.

    Clients beyond it would connect to a socket that nobody accepts, and hang without a word on either side.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # macOS has a hard limit of "infinity" that it does not grant.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _spare_the_collector() -> None:
    """Leaves what was imported out of collections, and makes them rarer.

    An assembly builds tens of thousands of objects without a cycle; at Python's defaults the collector took a third
    of a commit's time to look at them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY, *gc.get_threshold()[1:])


@asynccontextmanager
async def serving(
    settings: Settings, *, failpoints: Failpoints | None = None, tracing: Tracing | None = None
) -> AsyncIterator[Server]:
    """Runs a server on this event loop until the block ends: ``server.address`` says where."""
    schema = await asyncio.to_thread(prepare_database, settings)
    server = Server(settings, failpoints=failpoints, tracing=tracing, schema=schema)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


async def serve(settings: Settings, ready: Callable[[Server], None], *, schema: str = "") -> None:
    """Serves until SIGTERM or SIGINT, then drains; another signal after a second cuts what is in progress.

    Args:
        settings: What to serve and how; the database is prepared already.
        ready: Called with the server once it answers.
        schema: What ``prepare_database`` returned.

    Raises:
        UnavailableError: An address cannot be bound.
        FailedPreconditionError: Tracing is asked for and not installed.
    """
    _take_every_descriptor()
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    server = Server(settings, schema=schema)
    try:
        await server.start()
        _spare_the_collector()
        ready(server)
        await signals.get()
        _log.info("draining", grace_s=settings.drain_s)
    finally:
        impatient = loop.create_task(_cut_on_second_signal(server, signals))
        await server.stop()
        impatient.cancel()


async def _cut_on_second_signal(server: Server, signals: asyncio.Queue[int]) -> None:
    # One Ctrl-C often arrives twice: from the terminal, and from a parent that passes it on.
    await asyncio.sleep(_SAME_SIGNAL_S)
    while not signals.empty():
        signals.get_nowait()
    await signals.get()
    _log.warning("second signal: calls in progress are cut")
    await server.cut()


@contextmanager
def running_server(
    settings: Settings, *, failpoints: Failpoints | None = None, tracing: Tracing | None = None
) -> Iterator[Server]:
    """Runs a server in a thread of its own until the block ends; for tests and tools that are synchronous.

    ``server.address`` says where, with the port that was found when the settings ask for port 0.
    """
    started: Future[tuple[Server, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        async with serving(settings, failpoints=failpoints, tracing=tracing) as server:
            ended = asyncio.Event()
            started.set_result((server, asyncio.get_running_loop(), ended))
            await ended.wait()

    with ThreadPoolExecutor(1, thread_name_prefix="shardbook-server") as pool:
        done = pool.submit(lambda: loops.run(run()))
        either: list[Future[Any]] = [started, done]
        wait(either, return_when=FIRST_COMPLETED)
        if done.done():
            done.result()
        server, loop, ended = started.result()
        try:
            yield server
        finally:
            # A loop that has ended by itself says why in ``done``.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)
            done.result()
