"""The client of a Shardbook server: every call of the API, typed, with deadlines and retries."""

from __future__ import annotations

from typing import Final

from shardbook._address import ServerAddress
from shardbook._describing import DescribingCalls
from shardbook._lineage import LineageCalls
from shardbook._reading import ReadingCalls
from shardbook._retaining import RetainingCalls
from shardbook._saving import SavingCalls
from shardbook._transport import OUTAGE_S, Transport
from shardbook._watching import WatchingCalls
from shardbook.breaker import SaveBudget
from shardbook.errors import InvalidArgumentError

#: Deadline of a call that names none, seconds.
DEFAULT_TIMEOUT_S: Final = 30.0


class Client(SavingCalls, ReadingCalls, DescribingCalls, RetainingCalls, LineageCalls, WatchingCalls):
    """Speaks to a Shardbook server, or to any of several replicas over one database.

    Cheap to make: nothing is opened before the first call, and all clients of a process that name the same server
    share one channel. Thread-safe. Picklable: what travels is the address, the token and the timeout. In a process
    forked from one that had made a call, every call raises ForkedClientError at once; the parent works on.

    Every call raises subclasses of ``shardbook.errors.ShardbookError``, chosen by the reason the server gave. A server
    that cannot be reached is UnavailableError after ``outage_s``, one that does not answer in time
    DeadlineExceededError. Calls are idempotent, so they are retried until their deadline where that may help.

    Args:
        target: ``host:port``; ``a:port,b:port`` for replicas, tried in random order; ``unix:/path``. None reads
            ``SHARDBOOK_SERVER`` and the configuration file.
        token: Bearer token; with ``target=None`` the configured one is used when this is None.
        timeout_s: Deadline of calls that name none, seconds.
        outage_s: Seconds for which a server that gives no sign of life is tried again, however long a call may take.
        budget: See ``guarded``.

    Raises:
        InvalidArgumentError: ``target`` is no address, or None and nothing is configured.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        outage_s: float = OUTAGE_S,
        budget: SaveBudget | None = None,
    ) -> None:
        if target is None:
            target, token = _configured(token)
        if not timeout_s > 0:
            raise InvalidArgumentError(f"timeout_s is {timeout_s}, not above 0", field="timeout_s")
        self._transport = Transport(ServerAddress.parse(target), token, timeout_s, budget, outage_s)

    @property
    def target(self) -> str:
        """Address of the server."""
        return str(self._transport.address)

    @property
    def timeout_s(self) -> float:
        """Deadline of calls that name none, seconds."""
        return self._transport.timeout_s

    def guarded(self, budget: SaveBudget) -> Client:
        """Returns a client of the same server whose calls are charged to one save, see ``shardbook.breaker``.

        Streams and catalogue lists may be called on it too; only calls that a save makes are bounded. The result is
        thread-safe and not picklable.
        """
        own = self._transport
        return Client(self.target, token=own.token, timeout_s=own.timeout_s, outage_s=own.outage_s, budget=budget)

    def __repr__(self) -> str:
        return f"Client({self.target!r}, timeout_s={self.timeout_s})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.target, self._transport.token, self.timeout_s, self._transport.outage_s)


def _rebuild(target: str, token: str | None, timeout_s: float, outage_s: float) -> Client:
    return Client(target, token=token, timeout_s=timeout_s, outage_s=outage_s)


def _configured(token: str | None) -> tuple[str, str | None]:
    from shardbook.config import ClientConfig

    config = ClientConfig.from_env()
    if config.server is None:
        raise InvalidArgumentError(
            "no Shardbook server is configured: set SHARDBOOK_SERVER=host:port or pass an address; "
            "`shardbook-server serve` starts one and prints the line to export",
            reason="NO_SERVER",
            field="target",
        )
    return config.server, token if token is not None else config.token
