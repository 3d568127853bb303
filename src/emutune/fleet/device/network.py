"""TCP and TLS for the device's client: asyncio's own protocols, below httpx2.

httpx2 reads a TLS connection one record (16 KiB) at a time and pays its way through several layers for each. asyncio
decrypts all that has arrived and hands it over at once, which moves an emulator several times faster.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Iterable
from typing import Any

import httpcore2
import httpx2

# Bytes that wait for a reader before the peer is made to wait.
_WAITING_AT_MOST = 1 << 22
_READ_AT_ONCE = 1 << 18


def tls_transport(context: ssl.SSLContext) -> httpx2.AsyncBaseTransport:
    """A transport over TLS.

    Args:
        context: whom it trusts; of a fleet's device, ``emutune.fleet.security.trusting``.
    """
    transport = httpx2.AsyncHTTPTransport(verify=context)
    transport._pool = httpcore2.AsyncConnectionPool(ssl_context=context, network_backend=AsyncioBackend())
    return transport


class AsyncioBackend(httpcore2.AsyncNetworkBackend):
    """Connections by asyncio's event loop."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect; ``OSError`` and timeouts become httpcore2's own."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                transport, protocol = await loop.create_connection(_Pieces, host, port)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        for option in socket_options or ():
            transport.get_extra_info("socket").setsockopt(*option)
        return _Stream(transport, protocol)

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)


class _Pieces(asyncio.Protocol):
    """What has arrived and was not read yet, in the pieces in which it came."""

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()
        self.size = 0
        self.lost: BaseException | None = None
        self.ended = False
        self.transport: Any = None
        self._paused = False
        self._arrival = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)
        self.size += len(data)
        self._arrival.set()
        if self.size > _WAITING_AT_MOST and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def eof_received(self) -> None:
        self.ended = True
        self._arrival.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.ended, self.lost = True, exc
        self._arrival.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def take(self) -> bytes:
        """What is there, up to some size; empty at the end of the stream."""
        while not self.pieces:
            if self.lost is not None:
                raise self.lost
            if self.ended:
                return b""
            self._arrival.clear()
            await self._arrival.wait()
        taken = [self.pieces.popleft()]
        size = len(taken[0])
        while self.pieces and size + len(self.pieces[0]) <= _READ_AT_ONCE:
            taken.append(self.pieces.popleft())
            size += len(taken[-1])
        self.size -= size
        if self._paused and self.size <= _WAITING_AT_MOST // 2:
            self._paused = False
            self.transport.resume_reading()
        return taken[0] if len(taken) == 1 else b"".join(taken)

    async def drained(self) -> None:
        await self._writable.wait()
        if self.ended:
            raise self.lost or ConnectionResetError("the connection was closed")


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection as httpcore2 wants it."""

    def __init__(self, transport: asyncio.Transport, protocol: _Pieces) -> None:
        self._transport, self._protocol = transport, protocol

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        # More than asked for is welcome: the parser above keeps what it does not need yet.
        try:
            async with asyncio.timeout(timeout):
                return await self._protocol.take()
        except TimeoutError as error:
            raise httpcore2.ReadTimeout(str(error)) from error
        except (OSError, ssl.SSLError) as error:
            raise httpcore2.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        try:
            self._transport.write(buffer)
            async with asyncio.timeout(timeout):
                await self._protocol.drained()
        except TimeoutError as error:
            raise httpcore2.WriteTimeout(str(error)) from error
        except (OSError, ssl.SSLError) as error:
            raise httpcore2.WriteError(str(error)) from error

    async def aclose(self) -> None:
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        protocol = _Pieces()
        try:
            async with asyncio.timeout(timeout):
                transport = await loop.start_tls(
                    self._transport, protocol, ssl_context, server_hostname=server_hostname
                )
        except TimeoutError as error:
            self._transport.abort()
            raise httpcore2.ConnectTimeout(str(error)) from error
        except (OSError, ssl.SSLError) as error:
            self._transport.abort()
            raise httpcore2.ConnectError(str(error)) from error
        assert transport is not None
        protocol.transport = transport
        return _Stream(transport, protocol)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            # A connection that is idle and has something to read was closed by the server.
            return self._protocol.ended or bool(self._protocol.pieces)
        return self._transport.get_extra_info(info)
