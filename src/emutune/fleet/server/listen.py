"""An application on a socket, over TLS."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from emutune.errors import FleetError
from emutune.fleet.security import serving

log = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 16
_PEER_GONE_S = 60
_STOP_S = 2


class _Protocol(HttpToolsProtocol):
    """HTTP whose headers have a limit, since they are kept in memory before anybody is authenticated."""

    _header_bytes = 0

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        super().on_message_begin()

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


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Listening:
    """A server that listens.

    Attributes:
        port: the real one, also if port 0 was asked for.
    """

    def __init__(self, server: _Server, task: asyncio.Task[None], port: int) -> None:
        self._server, self._task = server, task
        self.port = port

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
        app: what answers.
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
            ssl_context_factory=lambda *_: serving(certificate, key),
        )
        config.load()
    except BaseException:
        listener.close()
        raise
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        done, _ = await asyncio.wait({task}, timeout=0.01)
        if done:
            task.result()
            raise FleetError(f"server.host: {host}:{port} cannot be served; see the log")
    real = int(listener.getsockname()[1])
    log.info("listening on %s:%d", host, real)
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
            f"server.port: {host}:{port} cannot be had ({error.strerror}); end what listens there, or choose "
            "another port"
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
