"""The fleet's protocol from a device's side: typed calls that outlive broken connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from emutune.errors import FleetError
from emutune.fleet.device.patience import Backoff, PassingError, Patience
from emutune.fleet.protocol import Enrolment, FleetInfo, Lease, Received, Report, Result, Transferred
from emutune.fleet.security import Credentials
from emutune.fleet.shaping import TokenBucket

# How long the server is asked to hold an answer back that it does not have yet.
POLL_S = 20.0
# What a long poll may take beyond the time that the server was asked to wait.
_POLL_MARGIN_S = 15.0
_DAMAGED_AT_MOST = 3
_UPLOAD_AT_ONCE = 1 << 23
_UPLOAD_PIECE = 1 << 18
# Answers that say: later.
_PASSING = frozenset({408, 425, 429})
_REMEDIES = {
    401: "the server does not know this device's key, or it was revoked; join again with new credentials",
    403: "the server refuses these credentials: they were used by another device, or are for another fleet",
}
Content = TypeVar("Content", bound=BaseModel)
Answer = TypeVar("Answer")


class RefusedError(FleetError):
    """The server understood a request and refuses it; asking again would not help.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Sink(Protocol):
    """Where a download goes, and how far it is."""

    @property
    def size(self) -> int:
        """Bytes that are there."""
        ...

    async def write(self, piece: bytes) -> None:
        """Append."""
        ...

    async def restart(self) -> None:
        """Throw away what is there."""
        ...


class FleetClient:
    """A device's connection to its fleet's server.

    Every call is repeated until it is answered. What the server refuses is a ``RefusedError``; what this
    device's key or certificate is not good for, a ``FleetError``.
    """

    def __init__(
        self,
        credentials: Credentials,
        transport: httpx2.AsyncBaseTransport,
        *,
        url: str | None = None,
        backoff: Backoff | None = None,
        remark: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            credentials: of the device.
            transport: what carries requests.
            url: where the server is, if not where the credentials say.
            backoff: how to wait between attempts.
            remark: told when the server cannot be reached, and when it can again.
        """
        self.credentials = credentials
        self.url = (url or credentials.url).rstrip("/")
        self._patience = Patience(self.url, credentials, backoff or Backoff(), remark)
        self._http = httpx2.AsyncClient(base_url=self.url, transport=transport, timeout=_timeout(0))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def enrol(self, key: str, key_sha256: str) -> None:
        """Take this device's place in the fleet; from then on requests carry the key."""
        content = Enrolment(
            device=self.credentials.device, token=self.credentials.token, key_sha256=key_sha256
        )
        await self._post("/v1/enrolment", content)
        self._http.headers["Authorization"] = f"Bearer {key}"

    async def info(self) -> FleetInfo:
        """What the server says about its fleet."""
        return _read(FleetInfo, await self._request("GET", "/v1/fleet"))

    async def report(self, report: Report) -> None:
        """Say that there is a task."""
        await self._post("/v1/reports", report)

    async def lease(self, wait_s: float) -> Lease | None:
        """The open lease, or None if there is none within some time."""
        response = await self._request("GET", f"/v1/lease?wait={wait_s:g}", wait_s=wait_s)
        return None if response.status_code == 204 else _read(Lease, response)

    async def download(self, path: str, size: int | None, sink: Sink) -> None:
        """Fetch a file from where the sink is on, as often as it takes.

        Args:
            path: of the route.
            size: bytes of the whole file; None if only the server knows.
            sink: gets the bytes in their order.

        Raises:
            RefusedError: the server does not have it, or it is longer than it should be.
        """
        failures = 0
        while size is None or sink.size < size:
            before = sink.size
            try:
                await self._stream(path, size, sink)
                if size is None:
                    return
                if sink.size < size:
                    raise PassingError(f"the transfer ended after {sink.size} of {size} bytes")
            except (httpx2.TransportError, PassingError) as error:
                failures = 1 if sink.size > before else failures + 1
                await self._patience.wait(error, failures)
            except httpx2.InvalidURL as error:
                raise FleetError(f"{self.url}: no address of a server ({error})") from error
        self._patience.answered()

    async def adapter(self, lease: str, sink: Sink, wait_s: float) -> bool:
        """Fetch the adapter that belongs to a lease; False if there is none within some time."""

        async def attempt() -> bool:
            await sink.restart()
            path = f"/v1/leases/{lease}/adapter?wait={wait_s:g}"
            return await self._stream(path, None, sink, wait_s=wait_s) != 204

        return await self._repeat(attempt)

    async def put_adapter(self, lease: str, path: Path) -> None:
        """Send a trained adapter.

        Raises:
            RefusedError: with status 422 if it is none, or belongs elsewhere.
        """
        size = path.stat().st_size
        headers = {"content-length": str(size), "content-type": "application/octet-stream"}

        async def attempt() -> httpx2.Response:
            content = _pieces(path, 0, size)
            return self._checked(
                await self._http.put(f"/v1/leases/{lease}/adapter", content=content, headers=headers)
            )

        await self._repeat(attempt)

    async def upload(
        self, lease: str, path: Path, size: int, bucket: TokenBucket | None, progress: Callable[[int], None]
    ) -> None:
        """Send a lease's data, from where the server has it on.

        Args:
            lease: the lease.
            path: the file.
            size: its bytes.
            bucket: paces the bytes; None to send them as fast as they go.
            progress: told how many bytes the server has.

        Raises:
            RefusedError: the server does not take it.
            FleetError: the file was changed.
        """
        route = f"/v1/leases/{lease}/data"
        received = _read(Received, await self._request("GET", route))
        damaged = failures = 0
        while not received.complete:
            progress(received.bytes)
            before = received.bytes
            try:
                received = await self._upload_part(route, path, before, size, bucket)
                # The server takes all bytes or throws them all away.
                damaged += received.bytes <= before and not received.complete
            except (httpx2.TransportError, httpx2.StreamError, PassingError) as error:
                failures += 1
                await self._patience.wait(error, failures)
                received = _read(Received, await self._request("GET", route))
                failures = 0 if received.bytes > before else failures
            if damaged >= _DAMAGED_AT_MOST:
                raise FleetError(
                    f"{path}: arrived damaged {damaged} times; was it changed after its task was reported?"
                )
        progress(size)

    async def _upload_part(
        self, route: str, path: Path, offset: int, size: int, bucket: TokenBucket | None
    ) -> Received:
        """Send some of the data; returns how far the server is."""
        part = min(_UPLOAD_AT_ONCE, max(0, size - offset))
        headers = {"content-length": str(part), "content-type": "application/octet-stream"}
        content = _pieces(path, offset, part, bucket)
        try:
            response = self._checked(
                await self._http.patch(f"{route}?offset={offset}", content=content, headers=headers)
            )
        except RefusedError as error:
            if error.status != 409:
                raise
            raise PassingError(str(error)) from error
        return _read(Received, response)

    async def transferred(self, lease: str, message: Transferred) -> None:
        """Say that a lease's bytes have moved."""
        await self._post(f"/v1/leases/{lease}/transferred", message)

    async def result(self, lease: str, message: Result) -> None:
        """Say what became of a lease."""
        await self._post(f"/v1/leases/{lease}/result", message)

    async def leave(self) -> None:
        """Take no part any more."""
        await self._request("POST", "/v1/leave")

    async def _post(self, path: str, message: BaseModel) -> None:
        await self._request("POST", path, message.model_dump_json())

    async def _request(
        self, method: str, path: str, content: str | None = None, wait_s: float = 0.0
    ) -> httpx2.Response:
        headers = {} if content is None else {"content-type": "application/json"}
        timeout = _timeout(wait_s)

        async def attempt() -> httpx2.Response:
            return self._checked(
                await self._http.request(method, path, content=content, headers=headers, timeout=timeout)
            )

        return await self._repeat(attempt)

    async def _repeat(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        failures = 0
        while True:
            try:
                answer = await attempt()
            except (httpx2.TransportError, httpx2.DecodingError, PassingError) as error:
                failures += 1
                await self._patience.wait(error, failures)
            except httpx2.InvalidURL as error:
                raise FleetError(f"{self.url}: no address of a server ({error})") from error
            else:
                self._patience.answered()
                return answer

    async def _stream(self, path: str, size: int | None, sink: Sink, wait_s: float = 0.0) -> int:
        """One attempt at a download; returns the answer's status."""
        offset = sink.size
        # Compressed, a range would be one of other bytes.
        headers = {"accept-encoding": "identity"} | ({"range": f"bytes={offset}-"} if offset else {})
        timeout = _timeout(wait_s)
        async with AsyncExitStack() as stack:
            response = await stack.enter_async_context(
                self._http.stream("GET", path, headers=headers, timeout=timeout)
            )
            if response.status_code == 416:
                await sink.restart()
                raise PassingError("the server has fewer bytes than this device")
            if response.is_error or response.status_code == 204:
                await response.aread()
                self._checked(response)
                return response.status_code
            self._checked(response)  # a redirection is no answer either
            if offset and not _begins_at(response, offset):
                await sink.restart()
            async for piece in response.aiter_raw():
                if size is not None and sink.size + len(piece) > size:
                    await sink.restart()
                    raise PassingError(f"{path}: more than {size} bytes")
                await sink.write(piece)
            return response.status_code

    def _checked(self, response: httpx2.Response) -> httpx2.Response:
        self._patience.heard()
        status = response.status_code
        if status < 300:
            return response
        if status >= 500 or status in _PASSING:
            raise PassingError(
                f"the server answers {status} {_detail(response)}".rstrip(), _retry_after_s(response)
            )
        remedy = _REMEDIES.get(status)
        if remedy is not None:
            raise RefusedError(status, f"{self.url}: {remedy}")
        raise RefusedError(status, f"{response.request.url.path}: refused with {status} {_detail(response)}")


def _timeout(wait_s: float) -> httpx2.Timeout:
    """Patience with an answer that the server was asked to hold back for so long."""
    return httpx2.Timeout(30.0, connect=10.0, read=wait_s + _POLL_MARGIN_S if wait_s else 30.0)


def _begins_at(response: httpx2.Response, offset: int) -> bool:
    """Whether an answer is the asked-for rest; a server may send the whole file instead."""
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(
        f"bytes {offset}-"
    )


def _read(kind: type[Content], response: httpx2.Response) -> Content:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FleetError(
            f"{response.request.url}: not an answer of a fleet's server ({kind.__name__} {where}: {first['msg']}); "
            "check the address, and that server and device run the same version of emutune"
        ) from error


def _detail(response: httpx2.Response) -> str:
    return response.text[:300] if response.is_closed else ""


def _retry_after_s(response: httpx2.Response) -> float:
    try:
        return min(30.0, max(0.0, float(response.headers.get("retry-after", 0))))
    except ValueError:
        return 0.0


async def _pieces(
    path: Path, offset: int, count: int, bucket: TokenBucket | None = None
) -> AsyncIterator[bytes]:
    """A part of a file, at the bucket's pace."""
    at_once = _UPLOAD_PIECE if bucket is None else bucket.piece_bytes
    with path.open("rb") as file:
        file.seek(offset)
        while count > 0:
            piece = file.read(min(at_once, count))
            if not piece:
                raise FleetError(f"{path}: is shorter than it was when its task was reported")
            count -= len(piece)
            if bucket is not None:
                await bucket.take(len(piece))
            yield piece
