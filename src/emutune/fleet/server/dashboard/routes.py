"""The page and what it is told; data only for who brings the key of the dashboard."""

from __future__ import annotations

import hmac
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from emutune.fleet.security import secret_sha256
from emutune.fleet.server.dashboard.access import PAGE
from emutune.fleet.server.dashboard.board import Board, Page
from emutune.fleet.server.dashboard.messages import Overview, StepDetail
from emutune.fleet.server.dashboard.watch import Watching
from emutune.fleet.server.refusals import Problem, Refused

# The page shows what devices said of themselves: nothing that is put into it may run, load or send anything.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data: 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/tables.js": ("tables.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
_bearer = HTTPBearer(
    scheme_name="DashboardKey",
    auto_error=False,
    description="The key in ``dashboard.key`` of the server's directory; no device's.",
)


async def _board(request: Request) -> Board:
    board: Board = request.app.state.dashboard
    return board


Shared = Annotated[Board, Depends(_board)]


async def _operator(
    board: Shared, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Refuse whoever does not bring the key; every request costs one hash and one comparison."""
    key = "" if credentials is None else credentials.credentials
    if not hmac.compare_digest(secret_sha256(key), board.key_sha256):
        raise Refused(
            401, "the key of the dashboard is missing or wrong", {"WWW-Authenticate": "Bearer", **HEADERS}
        )


IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", description="The ETag of what is known.")]
AcceptEncoding = Annotated[str, Header(alias="Accept-Encoding", include_in_schema=False)]


async def dashboard(
    board: Shared,
    since: Annotated[int, Query(ge=0, le=1 << 53, description="The revision that is known.")] = 0,
    known: IfNoneMatch = None,
    encodings: AcceptEncoding = "",
) -> Response:
    """The fleet at a glance; with ``since``, without the steps that have stayed as they were."""
    return _answer(await board.overview(since), known, encodings)


async def dashboard_step(
    board: Shared,
    step: Annotated[int, InPath(ge=0, le=1_000_000, description="Counted from 0.")],
    known: IfNoneMatch = None,
    encodings: AcceptEncoding = "",
) -> Response:
    """A step and its leases."""
    page = await board.step(step)
    if page is None:
        raise Refused(404, "this step was not begun", HEADERS)
    return _answer(page, known, encodings)


def install(app: FastAPI, board: Board) -> None:
    """Let an application serve the page and its data."""
    app.state.dashboard = board
    app.add_middleware(Watching, watch=board.watch)
    data = APIRouter(dependencies=[Depends(_operator)])
    for path, answer, kind, codes in (
        ("/v1/dashboard", dashboard, Overview, (401, 422, 503)),
        ("/v1/dashboard/steps/{step}", dashboard_step, StepDetail, (401, 404, 422, 503)),
    ):
        data.add_api_route(path, answer, response_model=kind, responses=_responses(*codes))
    app.include_router(data)
    folder = resources.files(__package__)
    for end, (name, kind_of_file) in _FILES.items():
        content = (folder / name).read_bytes()
        app.add_api_route(
            PAGE + end, _sender(content, kind_of_file), include_in_schema=False, name=f"dashboard {name}"
        )


def _responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    meanings = {
        401: "The key of the dashboard is missing or wrong.",
        404: "There is none.",
        422: "The request cannot be understood.",
        503: "The server cannot do this now.",
    }
    return {
        304: {"description": "Nothing has changed."},
        **{code: {"model": Problem, "description": meanings[code]} for code in codes},
    }


def _sender(content: bytes, media_type: str) -> Any:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send


def _answer(page: Page, known: str | None, encodings: str) -> Response:
    # Weak, since it is of the content whether that is sent compressed or not.
    headers = {**HEADERS, "ETag": f'W/"{page.tag}"', "Vary": "Accept-Encoding, Authorization"}
    if known is not None and (f'"{page.tag}"' in known or known.strip() == "*"):
        return Response(status_code=304, headers=headers)
    if "gzip" in encodings:
        return Response(
            page.zipped, media_type="application/json", headers={**headers, "Content-Encoding": "gzip"}
        )
    return Response(page.body, media_type="application/json", headers=headers)
