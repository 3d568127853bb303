"""The server's application: the routes of the protocol and their documentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

from emutune.fleet.config import Limits
from emutune.fleet.protocol import (
    VERSION,
    Enrolment,
    FleetInfo,
    Lease,
    Message,
    Received,
    Report,
    Result,
    Transferred,
)
from emutune.fleet.server import refusals, routes
from emutune.fleet.server.connections import Connections
from emutune.fleet.server.dashboard import routes as dashboard
from emutune.fleet.server.dashboard.board import Board
from emutune.fleet.server.hub import Hub
from emutune.fleet.server.ledger_thread import AskLedger
from emutune.fleet.server.listen import Listening, serve
from emutune.fleet.server.refusals import Problem
from emutune.fleet.server.routes import BucketOf

__all__ = ["Listening", "create_app", "serve"]

_BYTES: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def create_app(
    hub: Hub,
    ledger: AskLedger,
    catalogues: Mapping[str, Path],
    work: Path,
    limits: Limits,
    bucket_of: BucketOf,
    board: Board | None = None,
) -> FastAPI:
    """The server's application.

    Args:
        hub: decides, and is told what arrived. Data come as ``work/uploads/LEASE.data``, which it moves or
            copies before the ledger says that they are complete; adapters as
            ``work/adapters/SHA256.safetensors``.
        ledger: knows the devices' keys.
        catalogues: by the hash of each foundation model the directory whose shards and tokenizer are served.
        work: of uploads and adapters; made if it does not exist.
        limits: of what is taken.
        bucket_of: the link that a device's shards for a lease go over; None if it is not shaped.
        board: the page for operators; there is none if not given.
    """
    app = FastAPI(
        title="emutune fleet",
        version=str(VERSION),
        description="What a fleet's server and its devices say to each other. Devices ask, the server answers.",
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.fleet = routes.Shared(hub, ledger, catalogues, work, limits, bucket_of)
    app.state.connections = Connections(limits, ledger)
    app.add_middleware(routes.Using, places=app.state.fleet.places)
    refusals.install(app, ledger)
    _add_tasks(app)
    _add_files(app)
    _add_outcomes(app)
    if board is not None:
        dashboard.install(app, board)
    return app


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    meanings = {
        401: "The key is missing, unknown or revoked.",
        403: "The token is unknown or was used with another key.",
        404: "There is none, or it is another device's.",
        408: "Nothing came for too long.",
        409: "It does not fit what the server has.",
        413: "The body is too long.",
        416: "The range lies outside of the file.",
        422: "The request cannot be understood.",
        429: "There are too many already; later there may be fewer.",
        503: "The server cannot do this now.",
        507: "The server's disk is full; nothing is lost.",
    }
    return {code: {"model": Problem, "description": meanings[code]} for code in codes}


def _body(kind: type[Message]) -> dict[str, Any]:
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": kind.model_json_schema()}},
        }
    }


_RAW_BODY = {"requestBody": {"required": True, "content": _BYTES}}
_NOTHING: dict[int | str, dict[str, Any]] = {204: {"description": "Done, now or before."}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file.", "content": _BYTES},
    206: {"description": "The part that was asked for.", "content": _BYTES},
}


_TAKEN = {**_NOTHING, **_problems(401, 404, 408, 413, 422, 503, 507)}


def _add_tasks(app: FastAPI) -> None:
    """A device joins, reports a task and is leased what to do about it."""
    app.add_api_route(
        "/v1/enrolment",
        routes.enrolment,
        methods=["POST"],
        status_code=204,
        openapi_extra=_body(Enrolment),
        responses={**_NOTHING, **_problems(403, 408, 413, 422, 503, 507)},
    )
    app.add_api_route("/v1/fleet", routes.fleet_info, response_model=FleetInfo, responses=_problems(401, 503))
    app.add_api_route(
        "/v1/reports",
        routes.reports,
        methods=["POST"],
        status_code=204,
        openapi_extra=_body(Report),
        responses={**_NOTHING, **_problems(401, 408, 413, 422, 429, 503, 507)},
    )
    app.add_api_route(
        "/v1/lease",
        routes.lease,
        response_model=Lease,
        responses={204: {"description": "There is none yet."}, **_problems(401, 422, 503)},
    )


def _add_files(app: FastAPI) -> None:
    """What is fetched and what is sent for a lease."""
    for path, file in (("/v1/shards/{sha256}", routes.shard), ("/v1/tokenizer/{name}", routes.tokenizer)):
        app.add_api_route(
            path, file, response_class=Response, responses={**_FILE, **_problems(401, 404, 416, 422, 503)}
        )
    app.add_api_route(
        "/v1/leases/{lease}/adapter",
        routes.get_adapter,
        response_class=Response,
        responses={**_FILE, 204: {"description": "There is none yet."}, **_problems(401, 404, 416, 422, 503)},
    )
    app.add_api_route(
        "/v1/leases/{lease}/adapter",
        routes.put_adapter,
        methods=["PUT"],
        status_code=204,
        openapi_extra=_RAW_BODY,
        responses={**_TAKEN, **_problems(409)},
    )
    app.add_api_route(
        "/v1/leases/{lease}/data",
        routes.get_data,
        response_model=Received,
        responses=_problems(401, 404, 409, 422, 503, 507),
    )
    app.add_api_route(
        "/v1/leases/{lease}/data",
        routes.patch_data,
        methods=["PATCH"],
        response_model=Received,
        openapi_extra=_RAW_BODY,
        responses=_problems(401, 404, 408, 409, 413, 422, 503, 507),
    )


def _add_outcomes(app: FastAPI) -> None:
    """What a device says when it is done, with a lease or with the fleet."""
    for name, told, kind in (
        ("transferred", routes.transferred, Transferred),
        ("result", routes.result, Result),
    ):
        app.add_api_route(
            f"/v1/leases/{{lease}}/{name}",
            told,
            methods=["POST"],
            status_code=204,
            openapi_extra=_body(kind),
            responses=_TAKEN,
        )
    app.add_api_route(
        "/v1/leave",
        routes.leave,
        methods=["POST"],
        status_code=204,
        responses={**_NOTHING, **_problems(401, 503, 507)},
    )
