from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx2
import pytest
from intruders import (
    ADAPTERS,
    ATTACKS,
    AUTHENTICATION,
    CROWDS,
    DASHBOARD,
    ENROLMENT,
    MALFORMED,
    OTHERS_LEASES,
    OVERSIZED,
    TRAVERSAL,
    Attack,
    attempt,
    count,
    crowd,
    send,
)
from served import DASHBOARD_KEY, KEYS, SHA, SHARD, TOKENS, report, served

from emutune.fleet.config import Limits
from emutune.fleet.ledger import Ledger
from emutune.fleet.security import self_made_certificate, trusting
from emutune.fleet.server import bodies, connections
from emutune.fleet.server.app import serve

GROUPS = {
    "authentication": AUTHENTICATION,
    "dashboard": DASHBOARD,
    "leases": OTHERS_LEASES,
    "enrolment": ENROLMENT,
    "malformed": MALFORMED,
    "oversized": OVERSIZED,
    "adapters": ADAPTERS,
    "traversal": TRAVERSAL,
}


@pytest.mark.parametrize("group", GROUPS)
def test_nobody_is_let_in(group: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(tmp_path) as fleet:
        for attack in GROUPS[group]:
            caplog.clear()
            outcome = asyncio.run(attempt(fleet, attack))
            assert outcome.refused, f"{attack.name}: {outcome.status} {outcome.text[:200]}"
            assert outcome.noted, f"{attack.name}: no row in the ledger"
            assert outcome.unchanged, f"{attack.name}: something changed"
            warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert warnings, f"{attack.name}: not logged"
            said = outcome.text + caplog.text + "".join(row.detail for row in fleet.ledger.audit_rows())
            for secret in (DASHBOARD_KEY, *KEYS.values(), *TOKENS.values()):
                assert secret not in said, f"{attack.name}: a secret was repeated"
            assert "\n" not in fleet.ledger.audit_rows()[-1].detail


def test_names_of_attacks_are_unique() -> None:
    names = [(attack.name, attack.path) for attack in ATTACKS]
    assert len(set(names)) == len(names)


def test_count_for_a_benchmark(tmp_path: Path) -> None:
    some = ATTACKS[::10]
    assert asyncio.run(count(tmp_path / "fleet", some)) == {"tried": len(some), "let_in": 0, "not_noted": 0}


def test_nobody_is_let_in_over_tls(tmp_path: Path) -> None:
    """The same where a real HTTP parser stands before the application."""
    tls = self_made_certificate(tmp_path / "tls", [])
    # Bytes that no HTTP library sends are left to the parser, which closes the connection.
    attacks = [attack for attack in ATTACKS if attack not in AUTHENTICATION]

    async def run() -> list[tuple[Attack, int]]:
        with served(tmp_path) as fleet:
            before = fleet.state()
            server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
            wrong = []
            context = trusting(tls.authority)
            async with httpx2.AsyncClient(
                verify=context, base_url=f"https://127.0.0.1:{server.port}"
            ) as client:
                for attack in attacks:
                    key = KEYS.get(attack.device or "", attack.key)
                    client.headers = httpx2.Headers({} if key is None else {"Authorization": f"Bearer {key}"})
                    status, _ = await send(client, attack)
                    if status not in attack.statuses:
                        wrong.append((attack, status))
            await server.stop()
            assert fleet.state() == before
            return wrong

    assert asyncio.run(run()) == []


@pytest.mark.parametrize("kind", CROWDS)
def test_a_crowd_that_stays_locks_nobody_out(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More connections than there is room for, from a device's own address, while it does its work."""
    monkeypatch.setattr(bodies, "SILENCE_S", 1.0)
    monkeypatch.setattr(connections, "room_for_connections", lambda: 40)
    monkeypatch.setattr("emutune.fleet.server.listen.room_for_connections", lambda: 40)
    tls = self_made_certificate(tmp_path / "tls", [])
    limits = Limits(data_mb=1, adapter_mb=0.1, request_s=1.0)

    def noted_in(ledger: Ledger) -> bool:
        return any(row.event == "refused" and "127.0.0.1 (" in row.detail for row in ledger.audit_rows())

    async def work(port: int) -> None:
        headers = {"Authorization": f"Bearer {KEYS['ue1']}"}
        for _ in range(5):
            # A connection each time: one that is open could not be locked out.
            async with httpx2.AsyncClient(verify=trusting(tls.authority), headers=headers) as client:
                answer = await client.get(f"https://127.0.0.1:{port}/v1/shards/{SHA}")
                assert answer.content == SHARD

    async def run() -> None:
        with served(tmp_path, limits) as fleet:
            before = fleet.state()
            server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
            async with (
                asyncio.timeout(20),
                crowd(kind, server.port, trusting(tls.authority), 80, 0.2) as staying,
            ):
                await asyncio.sleep(0.3)
                await work(server.port)
                assert len(fleet.app.state.connections) <= 40
                await asyncio.gather(*staying)
            assert fleet.state() == before
            await server.stop()
            # The word in the log does not wait for the row: the ledger's thread writes it.
            end = asyncio.get_running_loop().time() + 5
            while not noted_in(fleet.ledger) and asyncio.get_running_loop().time() < end:
                await asyncio.sleep(0.02)
            assert noted_in(fleet.ledger), "no row in the ledger"
        warnings = [record for record in caplog.records if "connections closed" in record.getMessage()]
        assert 1 <= len(warnings) <= 3, "a word in the log, not one a connection"

    asyncio.run(run())


def test_a_device_without_end_of_tasks_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New tasks without pause: some are taken, no more until something is decided; other devices go on."""
    tls = self_made_certificate(tmp_path / "tls", [])

    async def run() -> None:
        with served(tmp_path) as fleet:
            server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
            base = f"https://127.0.0.1:{server.port}"
            async with httpx2.AsyncClient(verify=trusting(tls.authority), base_url=base) as client:

                async def told(device: str, task: str) -> int:
                    headers = {"Authorization": f"Bearer {KEYS[device]}"}
                    return (await client.post("/v1/reports", json=report(task), headers=headers)).status_code

                statuses = [await told("ue1", f"x-{number}") for number in range(100)]
                assert statuses == [204] * 8 + [429] * 92
                assert await told("ue1", "x-7") == 204, "a task that is known may be reported again"
                assert await told("ue2", "t2") == 204
            await server.stop()
            assert [report.task for _, report in fleet.ledger.open_reports()] == ["x-7", "t2"]
            assert [row.device for row in fleet.ledger.audit_rows() if "429" in row.detail] == ["ue1"]

    asyncio.run(run())
    assert "429 POST /v1/reports" in caplog.text
