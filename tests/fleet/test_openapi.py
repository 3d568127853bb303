"""Requests made up from the application's own description of itself; none may surprise it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, CheckFunction
from served import DASHBOARD_KEY, KEYS, Served

from emutune.fleet import protocol
from emutune.fleet.security import self_made_certificate
from emutune.fleet.server.app import serve
from emutune.fleet.server.dashboard import messages

FRAMING = {"transfer-encoding", "content-length"}
FEW, MANY = 6, 300
HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@dataclass
class Running:
    """A server in a thread of its own.

    Attributes:
        url: where it is.
        authority: PEM file of whom it may be trusted by.
        described: its OpenAPI document.
    """

    url: str
    authority: Path
    described: dict[str, object]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("fleet")
    tls = self_made_certificate(directory / "tls", [])
    started, stop = threading.Event(), threading.Event()
    found: list[Running] = []

    async def run() -> None:
        # The ledger is used by the thread that opened it.
        fleet = Served(directory)
        server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
        url = f"https://127.0.0.1:{server.port}"
        found.append(Running(url, directory / "tls" / "ca.pem", fleet.app.openapi()))
        started.set()
        await asyncio.to_thread(stop.wait)
        await server.stop()
        fleet.close()

    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    assert started.wait(20)
    yield found[0]
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


def routes_in(text: str | None) -> list[tuple[str, str]]:
    """The routes that a table in a documentation has."""
    return [(method, path) for method, path in re.findall(r"``([A-Z]+) (/v1/[^?`]*)[^`]*``", text or "")]


def operations() -> list[tuple[str, str]]:
    """All routes: those of devices, and those of the dashboard."""
    return routes_in(protocol.__doc__) + watching()


def watching() -> list[tuple[str, str]]:
    """The routes that take the dashboard's key."""
    return routes_in(messages.__doc__)


def ask(running: Running, method: str, path: str, mode: GenerationMode, device: str, examples: int) -> None:
    """Send requests made up for a route; each answer must be one that the description promises for it."""
    key = DASHBOARD_KEY if (method, path) in watching() else KEYS[device]
    schema = schemathesis.openapi.from_dict(running.described)

    @settings(max_examples=examples, suppress_health_check=HEALTH, database=None)
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def one(case: Case) -> None:
        # What frames a message is HTTP's own, and refused before any route is looked up.
        assume(not FRAMING & {name.lower() for name in case.headers or {}})
        case.call_and_validate(
            base_url=running.url,
            headers={"Authorization": f"Bearer {key}"},
            verify=str(running.authority),
            timeout=20,
            excluded_checks=excused(case),
        )

    one()


def excused(case: Case) -> list[CheckFunction]:
    """What the description says less exactly than the server does.

    Parameters and headers that nobody knows are ignored, as in all of HTTP, and the key is always sent. JSON
    Schema takes 1.0 for an integer, the server does not.
    """
    checks = []
    wrong = {str(where.value) for where, part in case.meta.components.items() if part.mode.is_negative}
    if wrong <= {"query", "header"}:
        checks.append(CHECKS.get_one("negative_data_rejection"))
    if isinstance(case.body, dict) and any(
        isinstance(value, float) and value.is_integer() for value in case.body.values()
    ):
        checks.append(CHECKS.get_one("positive_data_acceptance"))
    return checks


def test_all_routes_of_the_protocol_are_described(running: Running) -> None:
    described = {
        (method.upper(), path) for path, methods in running.described["paths"].items() for method in methods
    }
    assert described == set(operations())
    for method, path in described - {("POST", "/v1/enrolment")}:
        operation = running.described["paths"][path][method.lower()]
        scheme = "DashboardKey" if (method, path) in watching() else "HTTPBearer"
        assert operation["security"] == [{scheme: []}]
        assert "401" in operation["responses"]
    assert running.described["info"]["version"] == "1"


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize(("method", "path"), operations())
def test_no_request_surprises(running: Running, method: str, path: str, mode: GenerationMode) -> None:
    ask(running, method, path, mode, "ue1", FEW)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["ue1", "ue2"])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize(("method", "path"), operations())
def test_no_request_of_many_surprises(
    running: Running, method: str, path: str, mode: GenerationMode, device: str
) -> None:
    ask(running, method, path, mode, device, MANY)
