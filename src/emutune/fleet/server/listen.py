"""An application on a socket, over TLS."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from emutune.errors import FleetError
from emutune.fleet.addresses import bracketed
from emutune.fleet.security import serving
from emutune.fleet.server.connections import Connection, Connections, room_for_connections

log = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 16
_PEER_GONE_S = 60
_STOP_S = 2
_NO_FILES_S = 1.0
# Longer than clients keep a connection that is idle, five seconds: one that both end at once loses a request.
_IDLE_S = 30


class _Protocol(HttpToolsProtocol):
    """HTTP whose headers have a limit, since they are kept in memory before anybody is authenticated."""

    _header_bytes = 0

    def __init__(self, connection: Connection, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._connection = connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._connection.close = transport.abort
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.ended()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._connection.begins()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._connection.heard()
        super().on_headers_complete()

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        super().on_message_begin()
        self.scope["state"]["connection"] = self._connection

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        super().on_header(name, value)

    def _count(self, *parts: bytes) -> None:
        self._header_bytes += sum(len(part) + 4 for part in parts)
        if self._header_bytes > _HEADER_BYTES:
            raise ValueError("the headers are too long")


class _Gate:
    """Accepts connections, for as long as there is room, and shakes hands with each.

    uvicorn's own would shake hands with any number of them, and tell nobody before that is done.
    """

    def __init__(self, listener: socket.socket, server: _Server, connections: Connections) -> None:
        self._listener, self._server, self._connections = listener, server, connections
        assert server.config.ssl is not None
        self.context = server.config.ssl
        self._shaking: set[asyncio.Task[Any]] = set()
        self._accepting = asyncio.create_task(self._accept())

    def close(self) -> None:
        """Accept no more; what uvicorn expects of a server."""
        for task in (self._accepting, *self._shaking):
            task.cancel()

    async def wait_closed(self) -> None:
        """Until nothing is accepted any more."""
        await asyncio.gather(self._accepting, *self._shaking, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(self._listener)
            except ConnectionError:
                continue  # it was gone before it was accepted
            except OSError as error:
                # Whatever has used the files up, a stranger has to go.
                log.error("no connection can be accepted: %s; raise the limit of open files", error)
                self._connections.make_room()
                await asyncio.sleep(_NO_FILES_S)
                continue
            connection = self._connections.admit(address[0])
            shaking = asyncio.create_task(self._shake_hands(accepted, connection))
            connection.close = shaking.cancel
            self._shaking.add(shaking)
            shaking.add_done_callback(partial(self._shaken, accepted, connection))

    async def _shake_hands(self, accepted: socket.socket, connection: Connection) -> None:
        server, loop = self._server, asyncio.get_running_loop()
        protocol = partial(
            _Protocol,
            connection,
            config=server.config,
            server_state=server.server_state,
            app_state=server.lifespan.state,
        )
        # How long that may take is the connection's affair.
        await loop.connect_accepted_socket(protocol, accepted, ssl=self.context)

    def _shaken(self, accepted: socket.socket, connection: Connection, task: asyncio.Task[None]) -> None:
        self._shaking.discard(task)
        if task.cancelled() or task.exception() is not None:
            connection.ended()
            accepted.close()


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it, and connections to its gate."""

    gate: _Gate

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        assert sockets is not None
        self.gate = _Gate(sockets[0], self, self._connections)
        self.servers = [self.gate]  # type: ignore[list-item]
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        # Ten times a second.
        if counter % 10 == 0:
            await self._connections.sweep()
        return await super().on_tick(counter)


class Listening:
    """A server that listens.

    Attributes:
        port: the real one, also if port 0 was asked for.
    """

    def __init__(self, server: _Server, task: asyncio.Task[None], port: int) -> None:
        self._server, self._task = server, task
        self.port = port

    def show(self, context: ssl.SSLContext) -> None:
        """Show another certificate to whoever connects from now on."""
        self._server.gate.context = context

    async def stop(self) -> None:
        """Take no more requests, and end those under way within two seconds."""
        self._server.should_exit = True
        await self._task

    async def wait(self) -> None:
        """Until it stops."""
        await asyncio.shield(self._task)


async def serve(app: FastAPI, host: str, port: int, certificate: Path, key: Path) -> Listening:
    """Listen, and return as soon as requests are answered.

    Args:
        app: what answers; ``app.state.connections`` says who may stay connected.
        host: address or name of one of this machine's interfaces.
        port: 0 takes a free one.
        certificate: PEM file, with the certificates between it and its authority.
        key: PEM file of its key.

    Raises:
        FleetError: the address or the port cannot be had, or the certificate cannot be used.
    """
    listener = _listener(host, port)
    try:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_S,
            timeout_keep_alive=_IDLE_S,
            ssl_context_factory=lambda *_: serving(certificate, key),
        )
        config.load()
    except BaseException:
        listener.close()
        raise
    connections: Connections = app.state.connections
    connections.room = room_for_connections()
    server = _Server(config, connections)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        done, _ = await asyncio.wait({task}, timeout=0.01)
        if done:
            task.result()
            raise FleetError(f"server.host: {bracketed(host)}:{port} cannot be served; see the log")
    real = int(listener.getsockname()[1])
    log.info("listening on %s:%d, with room for %d connections", bracketed(host), real, connections.room)
    return Listening(server, task, real)


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise FleetError(f"server.host: {host} is no address of this machine ({error})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        _set_options(listener)
        listener.bind(address)
        # A second server on the same port would not fail before it listens.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise FleetError(
            f"server.port: {bracketed(host)}:{port} cannot be had ({error.strerror}); end what listens there, or "
            "choose another port"
        ) from error
    listener.setblocking(False)
    return listener


def _set_options(listener: socket.socket) -> None:
    """Accepted connections inherit these: whose peer has gone is closed, though nobody said so."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options: list[tuple[str, Any]] = [
        ("TCP_KEEPIDLE", _PEER_GONE_S // 2),
        ("TCP_KEEPINTVL", 10),
        ("TCP_USER_TIMEOUT", _PEER_GONE_S * 1000),
    ]
    for name, value in options:
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
