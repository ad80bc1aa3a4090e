"""One channel per (process, address), made on first use and shared by every client of the process."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Final

import grpc

from shardbook._address import ServerAddress, target_of
from shardbook._fork import ForkGuard
from shardbook._version import __version__
from shardbook.v1 import catalog_pb2_grpc, metadata_pb2_grpc, registration_pb2_grpc

#: Largest request, bytes. Above ``MAX_BLOB_BYTES`` of core, so that a blob always travels with its call.
MAX_REQUEST_BYTES: Final = 32 << 20
#: Largest single message of a reply, bytes; larger replies are streamed.
MAX_REPLY_BYTES: Final = 256 << 20
#: A list of addresses is looked up again at most this often, seconds.
_LOOK_AGAIN_S: Final = 5.0

_SERVICE_CONFIG: Final = json.dumps(
    {
        # Not round_robin, which opens every client to every replica.
        "loadBalancingConfig": [{"pick_first": {"shuffleAddressList": True}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    # Few and quick, for a blip: they hide the reason from the application, whose retry is the real one.
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            },
            # A stream without a deadline that gRPC makes again by itself after its server was killed can hang for ever.
            {"name": [{"service": "shardbook.v1.CatalogService", "method": "WatchCheckpoints"}]},
        ],
        # When most calls fail the server is down, not flaky: the application's slower retry takes over.
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
    }
)


def channel_options(address: ServerAddress, *, retries: bool = True) -> list[tuple[str, str | int]]:
    """Returns gRPC's options for a channel to ``address``; without ``retries`` a call ends as its only try does."""
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.enable_retries", int(retries)),
        # The default of 256 KiB silently turns retries off for any larger request.
        ("grpc.per_rpc_retry_buffer_size", 2 * MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
        # Servers permit a ping every 30 s. Pings only while calls wait: idle ranks cost nothing.
        ("grpc.keepalive_time_ms", 40_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        # A server that comes back is found within seconds; the default climbs to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.primary_user_agent", f"shardbook/{__version__}"),
    ]
    if address.authority is not None:
        options.append(("grpc.default_authority", address.authority))
    if address.is_local:
        options.append(("grpc.enable_http_proxy", 0))
    return options


@dataclass(frozen=True, eq=False)
class Connection:
    """An open channel and the stubs on it. Thread-safe, as channels are.

    Attributes:
        channel: The channel; never closed while calls may be in flight.
        endpoints: The (ip, port) pairs behind a list of addresses; empty for a single one, which gRPC looks up.
    """

    channel: grpc.Channel
    endpoints: frozenset[tuple[str, int]]
    registration: registration_pb2_grpc.RegistrationServiceStub = field(init=False)
    metadata: metadata_pb2_grpc.MetadataServiceStub = field(init=False)
    catalog: catalog_pb2_grpc.CatalogServiceStub = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "registration", registration_pb2_grpc.RegistrationServiceStub(self.channel))
        object.__setattr__(self, "metadata", metadata_pb2_grpc.MetadataServiceStub(self.channel))
        object.__setattr__(self, "catalog", catalog_pb2_grpc.CatalogServiceStub(self.channel))


class Connections:
    """The connections of this process by address. Thread-safe; refuses to work in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fork_guard = ForkGuard()
        self._open: dict[ServerAddress, Connection] = {}
        self._looked_at_s: dict[ServerAddress, float] = {}
        self._abandoned: list[Connection] = []

    def get(self, address: ServerAddress) -> Connection:
        """Returns the process's connection to ``address``, opening it when there is none.

        Raises:
            ForkedClientError: This process was forked from one that had a connection.
            UnavailableError: No name in a list of addresses can be looked up.
        """
        self._fork_guard.check()
        connection = self._open.get(address)
        return connection if connection is not None else self._connect(address)

    def look_again(self, address: ServerAddress) -> None:
        """Opens a new connection to a list of addresses whose names mean other machines now.

        A single address needs none of this: gRPC looks it up again by itself.
        """
        if not address.is_list:
            return
        now = time.monotonic()
        with self._lock:
            if now - self._looked_at_s.get(address, now) < _LOOK_AGAIN_S:
                return
            self._looked_at_s[address] = now
            known = self._open.get(address)
        if known is not None and known.endpoints != address.endpoints():
            with self._lock:
                # Not closed: other threads' calls end on it, then it goes with its last reference.
                if self._open.get(address) is known:
                    del self._open[address]

    def _connect(self, address: ServerAddress) -> Connection:
        # Looked up outside the lock: it may take seconds.
        endpoints = address.endpoints() if address.is_list else frozenset()
        with self._lock:
            connection = self._open.get(address)
            if connection is None:
                self._fork_guard.mark_used()
                target = target_of(endpoints) if endpoints else str(address)
                connection = Connection(grpc.insecure_channel(target, options=channel_options(address)), endpoints)
                self._open[address] = connection
                self._looked_at_s[address] = time.monotonic()
            return connection

    def abandon(self) -> None:
        """Forgets every connection without touching it: run in a forked child, where even closing one can hang."""
        # Another thread of the parent may have held the lock at the moment of the fork.
        self._lock = threading.Lock()
        self._abandoned.extend(self._open.values())
        self._open = {}


#: The connections of this process.
connections: Final = Connections()
os.register_at_fork(after_in_child=connections.abandon)
