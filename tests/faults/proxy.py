"""A TCP proxy that hurts what passes through it: blackhole, delay, cut at byte N, reset.

It runs in a thread of the test. Any process of the test may switch it, and knows that it is switched when ``switch``
returns; so faults strike between two calls of a rank, not after a sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Final

_CHUNK_BYTES: Final = 1 << 16
_SWITCH_S: Final = 30.0
#: Closing a socket with this on it sends a reset.
_RESET: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """What happens to connections.

    Attributes:
        kind: ``pass``; ``blackhole`` takes bytes and says nothing; ``delay`` holds back every piece; ``cut`` ends a
            connection in mid-request, ``cut-reply`` in mid-reply; ``reset`` ends connections with a TCP reset.
        number: Seconds of a delay; bytes of a connection that still pass before it is cut.
        once: The first connection that it strikes is the last.
    """

    kind: str = "pass"
    number: float = 0.0
    once: bool = False

    def __post_init__(self) -> None:
        assert self.kind in {"pass", "blackhole", "delay", "cut", "cut-reply", "reset"}, self.kind

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {int(self.once)}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Reads what ``str`` wrote."""
        kind, number, once = text.split()
        return cls(kind, float(number), bool(int(once)))


def switch(control: str, fault: Fault) -> None:
    """Has the proxy behind ``control`` do something else from now on; from any process."""
    host, _, port = control.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_SWITCH_S) as connection:
        connection.sendall(f"{fault}\n".encode())
        assert b"ok\n" == connection.makefile("rb").readline()


class TcpProxy:
    """A proxy before one server, which may come and go.

    Attributes:
        address: Where clients connect.
        control: What ``switch`` takes.
        accepted_count: Connections so far.
        struck_count: Pieces of traffic, or connections, that a fault has struck.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._fault = Fault()
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: Future[tuple[str, str, asyncio.AbstractEventLoop]] = Future()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="proxy")
        self.address = self.control = ""
        self.accepted_count = self.struck_count = 0

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        self.address, self.control, self._loop = self._ready.result(_SWITCH_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(_SWITCH_S)

    def switch(self, fault: Fault) -> None:
        """Does something else from now on; from any thread but its own."""
        switch(self.control, fault)

    async def _run(self) -> None:
        try:
            data = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            control = await asyncio.start_server(self._obey, "127.0.0.1", 0)
        except BaseException as error:
            self._ready.set_exception(error)
            raise
        names = [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (data, control)]
        self._ready.set_result((names[0], names[1], asyncio.get_running_loop()))
        await self._ended.wait()
        data.close()
        control.close()
        for pair in list(self._pairs):
            pair.end()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_SWITCH_S)

    async def _obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = Fault.parse((await reader.readline()).decode())
        # Nothing can be made of a stream that bytes are missing from.
        if fault.kind == "reset" or self._fault.kind == "blackhole":
            for pair in list(self._pairs):
                pair.end()
        for pair in self._pairs:
            pair.passed_bytes = 0
        self._fault = fault
        writer.write(b"ok\n")
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._accept(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted_count += 1
        pair = _Pair(writer)
        if self._strikes("reset"):
            pair.end()
            return
        try:
            up_reader, pair.up = await asyncio.open_connection(*self._upstream)
        except OSError:
            pair.end()
            return
        self._pairs.add(pair)
        ways = [
            asyncio.create_task(self._pump(reader, pair.up, pair, "cut")),
            asyncio.create_task(self._pump(up_reader, writer, pair, "cut-reply")),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pair.end()
            self._pairs.discard(pair)
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair, cutting: str
    ) -> None:
        """Carries bytes one way until either end is gone, or a fault ends it."""
        with contextlib.suppress(ConnectionError):
            while content := await reader.read(_CHUNK_BYTES):
                fault = self._fault
                if fault.kind == "blackhole":
                    self.struck_count += 1
                    continue
                if fault.kind == "delay":
                    self.struck_count += 1
                    await asyncio.sleep(fault.number)
                if fault.kind == cutting:
                    left = max(0, int(fault.number) - pair.passed_bytes)
                    pair.passed_bytes += len(content)
                    if len(content) > left and self._strikes(cutting):
                        writer.write(content[:left])
                        await writer.drain()
                        return
                writer.write(content)
                await writer.drain()

    def _strikes(self, kind: str) -> bool:
        """Tells whether the fault is of a kind; it is over then when it was to strike once."""
        struck = self._fault.kind == kind
        self.struck_count += struck
        if struck and self._fault.once:
            self._fault = Fault()
        return struck


class _Pair:
    """The two connections of a client: with us, and ours with the server."""

    def __init__(self, down: asyncio.StreamWriter) -> None:
        self.down = down
        self.up: asyncio.StreamWriter | None = None
        self.passed_bytes = 0

    def end(self) -> None:
        """Resets both."""
        for writer in (self.down, self.up):
            if writer is not None and not writer.transport.is_closing():
                found: socket.socket = writer.get_extra_info("socket")
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()
