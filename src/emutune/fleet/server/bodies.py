"""Reading what devices send: never more than allowed, never for longer than a link may be silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from emutune.fleet.protocol import Message
from emutune.fleet.server.refusals import Refused, explain

MESSAGE_BYTES = 1 << 16
SILENCE_S = 30.0
_GATHERED_BYTES = 1 << 20
Content = TypeVar("Content", bound=Message)


async def pieces(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it arrives, at most ``limit`` bytes of it.

    Raises:
        Refused: 413 if it is longer, 408 if nothing comes for 30 s.
        ClientDisconnect: the connection broke.
    """
    too_long = Refused(413, f"the body may have at most {limit} bytes here")
    declared = request.headers.get("content-length")
    if declared is not None and declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise too_long
    stream = request.stream()
    total = 0
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                piece = await anext(stream)
        except StopAsyncIteration:
            request.state.body_read = True
            return
        except TimeoutError as error:
            raise Refused(408, f"nothing came for {SILENCE_S:g} s; go on from where the server is") from error
        total += len(piece)
        if total > limit:
            raise too_long
        yield piece


async def gathered(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a write; what came before a connection broke is among them."""
    buffer = bytearray()
    try:
        async for piece in stream:
            buffer += piece
            if len(buffer) >= _GATHERED_BYTES:
                yield bytes(buffer)
                buffer.clear()
    except (ClientDisconnect, Refused):
        if buffer:
            yield bytes(buffer)
        raise
    if buffer:
        yield bytes(buffer)


async def message(request: Request, kind: type[Content]) -> Content:
    """A message of the protocol.

    Raises:
        Refused: 408 if it takes longer than a link may be silent, 413 if it is too long, 422 if it is none.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(SILENCE_S):
            async for piece in pieces(request, MESSAGE_BYTES):
                body += piece
    except TimeoutError as error:
        raise Refused(408, f"the message was not complete within {SILENCE_S:g} s; send it again") from error
    try:
        return kind.model_validate_json(bytes(body), strict=True)
    except ValidationError as error:
        raise Refused(422, explain(error)) from None
