"""A relay's one connection to the service, and calls that are passed on over it as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc
import grpc.aio

from shardbook._address import ServerAddress, target_of
from shardbook._channel import channel_options
from shardbook.errors import UnavailableError

Context = grpc.aio.ServicerContext[bytes, bytes]
Metadata = tuple[tuple[str, str | bytes], ...]

#: Prefixes of metadata that belongs to one connection and not to the call, and what looks like them and does not.
_OWN: Final = ("grpc-", ":")
_OWN_KEYS: Final = frozenset({"user-agent", "te", "content-type"})
_DETAILS_KEY: Final = "grpc-status-details-bin"
#: How long calls of a connection may go on once its addresses are those of other machines, seconds.
_LEAVE_S: Final = 60.0


class Upstream:
    """The connection; belongs to the event loop's thread.

    Args:
        address: The service. A list is looked up again where it does not answer.
    """

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._endpoints: frozenset[tuple[str, int]] = frozenset()
        self._channel: grpc.aio.Channel | None = None
        self._looking = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    async def channel(self, *, look_again: bool = False) -> grpc.aio.Channel:
        """Returns the channel that all calls share.

        Args:
            look_again: Whether the names of a list may mean other machines than before.

        Raises:
            UnavailableError: No name of a list can be looked up.
        """
        if self._channel is not None and not (look_again and self._address.is_list):
            return self._channel
        async with self._looking:
            endpoints = frozenset[tuple[str, int]]()
            if self._address.is_list:
                endpoints = await asyncio.to_thread(self._address.endpoints)
            if self._channel is not None and endpoints == self._endpoints:
                return self._channel
            if self._channel is not None:
                task = asyncio.get_running_loop().create_task(self._channel.close(_LEAVE_S))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
            target = target_of(endpoints) if endpoints else str(self._address)
            # Without retries: ranks are told what happened, and have retries of their own.
            self._channel = grpc.aio.insecure_channel(target, options=channel_options(self._address, retries=False))
            self._endpoints = endpoints
            return self._channel

    async def close(self) -> None:
        """Closes the connection."""
        for task in self._leaving:
            task.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def pass_on(self, method: str, payload: bytes, context: Context) -> AsyncIterator[bytes]:
        """Makes a call as it came, and yields what is answered as it comes; the only message of a unary call, too.

        The caller's metadata goes with it, tokens too; status and trailing metadata come back as they are.
        """
        try:
            channel = await self.channel()
        except UnavailableError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        start: Any = channel.unary_stream(method)
        call = start(payload, timeout=context.time_remaining(), metadata=_kept(context.invocation_metadata()))
        try:
            async for message in call:
                yield message
            trailing = _kept(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", _kept(error.trailing_metadata()))
        finally:
            call.cancel()
        context.set_trailing_metadata(trailing)


def _kept(metadata: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    """Returns what belongs to the call."""
    return tuple(
        (key, value)
        for key, value in metadata or ()
        if key == _DETAILS_KEY or not (key.startswith(_OWN) or key in _OWN_KEYS)
    )
