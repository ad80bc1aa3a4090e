"""What a server address may look like, and how a list of addresses becomes one gRPC target."""

from __future__ import annotations

import ipaddress
import random
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shardbook.errors import InvalidArgumentError, UnavailableError

#: Longest time that looking up the names of an address list may take, seconds.
_LOOKUP_S: Final = 3.0
#: Most addresses in one list.
MAX_ADDRESSES: Final = 64


@dataclass(frozen=True)
class ServerAddress:
    """Where the service is: one address, or several of replicas that share a database.

    Attributes:
        hosts: ``host:port`` pairs, ``[ipv6]:port`` pairs, or a single ``unix:/path`` or ``dns:...`` target.
    """

    hosts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """Reads ``host:port``, ``a:1,b:2``, ``unix:/path`` or ``dns:///name:port``.

        Raises:
            InvalidArgumentError: It is none of these.
        """
        hosts = tuple(part.strip() for part in text.split(",") if part.strip())
        if not hosts:
            raise _bad_address(text, "it is empty")
        if len(hosts) > MAX_ADDRESSES:
            raise _bad_address(text, f"it has {len(hosts)} addresses, the limit is {MAX_ADDRESSES}")
        if len(hosts) == 1 and hosts[0].startswith(("unix:", "dns:")):
            return cls(hosts)
        for host in hosts:
            _split(host)
        return cls(hosts)

    def __str__(self) -> str:
        return ",".join(self.hosts)

    @property
    def is_list(self) -> bool:
        """True when there is more than one address."""
        return len(self.hosts) > 1

    @property
    def authority(self) -> str | None:
        """Host name that a list stands for; None when gRPC takes it from the target."""
        return self.hosts[0] if self.is_list else None

    @property
    def is_local(self) -> bool:
        """True when every address is on this machine, where no proxy belongs in between."""
        return all(host.startswith("unix:") or _is_loopback(_split(host)[0]) for host in self._without_dns())

    def _without_dns(self) -> tuple[str, ...]:
        return tuple(host.removeprefix("dns:").lstrip("/") for host in self.hosts)

    def endpoints(self) -> frozenset[tuple[str, int]]:
        """Returns the (ip, port) pairs of a list, looking names up; IPv4 only, or IPv6 only where nothing has IPv4.

        Raises:
            UnavailableError: No name of the list could be looked up in time.
        """
        pairs = _look_up([_split(host) for host in self.hosts])
        wanted = {pair for pair in pairs if "." in pair[0]} or pairs
        if not wanted:
            raise UnavailableError(f"none of the Shardbook servers {self} can be looked up")
        return frozenset(wanted)


def target_of(endpoints: frozenset[tuple[str, int]]) -> str:
    """Returns a gRPC target of these (ip, port) pairs in random order: gRPC takes the first that answers."""
    pairs = sorted(endpoints)
    random.SystemRandom().shuffle(pairs)
    scheme = "ipv4" if "." in pairs[0][0] else "ipv6"
    return f"{scheme}:" + ",".join(f"{ip}:{port}" if scheme == "ipv4" else f"[{ip}]:{port}" for ip, port in pairs)


def _split(host: str) -> tuple[str, int]:
    name, _, port = host.rpartition(":")
    if "://" in host or "/" in host or "@" in host:
        raise _bad_address(host, "it has a scheme, a path or a user")
    if ":" not in host or not port:
        raise _bad_address(host, "it has no port")
    if not port.isascii() or not port.isdigit():
        raise _bad_address(host, f"its port {port!r} is not a number")
    if not 0 < int(port) < 65536:
        raise _bad_address(host, f"its port {port} is not within 1 and 65535")
    if not name:
        raise _bad_address(host, "it has no host")
    if name.startswith("[") and name.endswith("]") and _is_ip(name[1:-1]):
        return name[1:-1], int(port)
    if ":" in name or "[" in name:
        raise _bad_address(host, "an IPv6 address stands in brackets")
    return name, int(port)


def _bad_address(text: str, why: str) -> InvalidArgumentError:
    # What stands before an @ may be a password: it is not repeated.
    shown = text.rpartition("@")[2]
    return InvalidArgumentError(
        f"{shown!r} is no address of a Shardbook server: {why}; write host:port, or host:port,host:port for replicas",
        reason="INVALID_ADDRESS",
        field="server",
    )


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_ip(name) and ipaddress.ip_address(name).is_loopback)


def _look_up(hosts: Sequence[tuple[str, int]]) -> set[tuple[str, int]]:
    """Returns all (ip, port) pairs that were found in time. Lookups that hang are left to threads of their own."""
    found: set[tuple[str, int]] = set()
    lock = threading.Lock()

    def look_up(name: str, port: int) -> None:
        try:
            answers = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError:
            return
        with lock:
            found.update((str(answer[4][0]), port) for answer in answers)

    threads = []
    for name, port in hosts:
        if _is_ip(name):
            found.add((name, port))
        else:
            threads.append(threading.Thread(target=look_up, args=(name, port), daemon=True))
    for thread in threads:
        thread.start()
    limit = time.monotonic() + _LOOKUP_S
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
    with lock:
        return set(found)
