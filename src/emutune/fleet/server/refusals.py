"""How the server says no: one form of answer, a line in the log, a row in the ledger."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from emutune.errors import AdapterError, EmutuneError
from emutune.fleet.addresses import bracketed
from emutune.fleet.ledger import Ledger
from emutune.fleet.server.ledger_thread import AskLedger

log = logging.getLogger(__name__)

# What honest devices meet on a bad link; it says nothing about an intruder.
_ORDINARY = {408, 409, 416}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LINGER_S = 1.0
_ROWS_PER_MINUTE = 600
# What comes again as soon as it is refused, from whoever does not wait.
_TOO_MANY = 429


class Problem(BaseModel):
    """The answer to every request that is refused."""

    detail: str


class Refused(HTTPException):
    """A request is refused with a status and a reason, neither of which repeats what was sent."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, dict(headers) if headers else None)


class _ProblemResponse(JSONResponse):
    """A ``Problem``; if the request's body was not read to its end, the connection closes after it.

    A connection that is closed while the client still sends is reset, and the client may lose the answer.
    So what arrives is thrown away for a moment more.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None, *, unread: bool) -> None:
        super().__init__(
            {"detail": detail}, status, {**(headers or {}), **({"Connection": "close"} if unread else {})}
        )
        self._unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._unread:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Audit:
    """Rows of refused requests, so many a minute: whoever knocks without pause must not fill the disk."""

    def __init__(self, ledger: AskLedger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger, self._clock = ledger, clock
        self._minute, self._rows, self._more = clock(), 0, 0
        self._once: set[tuple[str | None, str]] = set()

    async def write(self, device: str | None, detail: str, *, once: bool = False) -> None:
        """Write a row of its own: what is filed under a lease is noted once, however often it is tried.

        Args:
            device: that was refused.
            detail: what and why.
            once: whether one row a minute is enough.
        """
        if self._clock() - self._minute >= 60:
            more, self._minute, self._rows, self._more = self._more, self._clock(), 0, 0
            self._once.clear()
            if more:
                await self._ledger(
                    Ledger.audit, "refused", None, None, f"{more} more requests within a minute"
                )
        repeated = once and (device, detail) in self._once
        if once:
            self._once.add((device, detail))
        if repeated or self._rows >= _ROWS_PER_MINUTE:
            self._more += 1
            return
        self._rows += 1
        await self._ledger(Ledger.audit, "refused", device, None, detail)


def explain(error: ValidationError | RequestValidationError) -> str:
    """Which fields are wrong and why, without their values, which may be secrets."""
    return "; ".join(
        f"{'.'.join(str(part)[:64] for part in problem['loc']) or 'message'}: {problem['msg']}"
        for problem in error.errors()[:5]
    )


def install(app: FastAPI, ledger: AskLedger) -> None:
    """Let an application refuse requests in one way."""
    audit = _Audit(ledger)

    async def refuse(
        request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        device = getattr(request.state, "device", None)
        lease = getattr(request.state, "lease", None)
        about = "" if lease is None else f" of lease {lease}"
        line = f"{status} {request.method} {_where(request)}{about}: {detail}"
        if status in _ORDINARY:
            log.info("%s: %s", device, line)
        else:
            log.warning("refused %s of %s: %s", _peer(request), device or "nobody known", line)
            try:
                await audit.write(device, line, once=status == _TOO_MANY)
            except EmutuneError as unwritten:
                log.error("the ledger does not take it: %s", unwritten)
        return _ProblemResponse(status, detail, headers, unread=_unread(request))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await refuse(request, error.status_code, error.detail, error.headers)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await refuse(request, 422, explain(error))

    async def belongs_elsewhere(request: Request, error: Exception) -> Response:
        return await refuse(request, 422, str(error))

    async def disk(request: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        if error.errno not in _NO_SPACE:
            raise error
        log.error("disk full during %s %s", request.method, _where(request))
        return _ProblemResponse(
            507, "the server's disk is full; try again later", None, unread=_unread(request)
        )

    async def unable(request: Request, error: Exception) -> Response:
        log.error("%s %s: %s", request.method, _where(request), error, exc_info=error)
        return _ProblemResponse(
            503, "the server cannot do this now; try again later", None, unread=_unread(request)
        )

    async def gone(request: Request, error: Exception) -> Response:
        log.info("%s %s: the connection broke", request.method, _where(request))
        return Response(status_code=400)

    for kind, handler in (
        (HTTPException, refused),
        (RequestValidationError, malformed),
        (AdapterError, belongs_elsewhere),
        (EmutuneError, unable),
        (OSError, disk),
        (ClientDisconnect, gone),
    ):
        app.add_exception_handler(kind, handler)


def _where(request: Request) -> str:
    """The route, or what was asked for if there is none, printable whatever it is."""
    route = getattr(request.scope.get("route"), "path", None)
    return route if isinstance(route, str) else ascii(request.url.path)[:200]


def _peer(request: Request) -> str:
    client = request.client
    return "a client" if client is None else f"{bracketed(client.host)}:{client.port}"


def _unread(request: Request) -> bool:
    """Whether there is more of the request's body than was read."""
    if getattr(request.state, "body_read", False):
        return False
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
